"""What a model folder holds: bits and bytes by kind of layer, read from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqw.convert import quant_modules
from dqw.errors import UserError
from dqw.grids import is_spelled_out
from dqw.whisper.checkpoint import safetensors_header, verify_folder, weight_files
from dqw.whisper.ct2 import is_ct2_folder, read_model_bin
from dqw.whisper.native import skeleton

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class Part:
    """One kind of layer: its `parameters`, and bytes in the folder."""

    kind: str
    parameters: int = 0
    codes: int = 0
    scales: int = 0
    floats: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        return self.codes + self.scales + self.floats

    @property
    def bits(self) -> float:
        """Stored bits a parameter, scales included."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class Report:
    """`format`: how the folder is stored; `model_bytes`: see the function;
    `all_bytes`: with the tokenizer and the rest; `layers`: packed layer -> how it is stored."""

    format: str
    parts: list[Part]
    model_bytes: int
    all_bytes: int
    config: dict[str, Any]
    layers: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Part:
        total = Part("all")
        for part in self.parts:
            total.parameters += part.parameters
            total.codes += part.codes
            total.scales += part.scales
            total.floats += part.floats
        return total


# What a model's size does not count: the tokenizer is the same for every Whisper.
_UNCOUNTED = {
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocabulary.json",  # CTranslate2
    "vocabulary.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "README.md",
    *(f"openvino_{k}tokenizer.{e}" for k in ("", "de") for e in ("xml", "bin")),
}


# How the hub keeps the same weights once more, and a trainer its state.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".pt", ".pth"}


def model_bytes(folder: str | Path) -> int:
    """Bytes of the model's files in ``folder`` but the tokenizer's and the model card.

    Where the weights are safetensors, other copies of them and a trainer's state do not count.
    """
    sizes = _file_sizes(Path(folder))
    return sum(size for name, size in sizes.items() if name not in _UNCOUNTED)


def _file_sizes(folder: Path) -> dict[str, int]:
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}
    if sizes.keys() & {"model.safetensors", "model.safetensors.index.json"}:
        other = [name for name in sizes if Path(name).suffix in _OTHER_WEIGHTS]
        for name in {*other} - {*weight_files(folder)}:
            del sizes[name]
    return sizes


def inspect_folder(folder: str | Path) -> Report:
    """Read the headers of a packed, Hugging Face or faster-whisper folder.

    Raises UserError for what is no model folder or is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the model's folder")
    if not folder.is_dir():
        raise UserError(f"the model folder {folder} does not exist; check the path")
    config: dict[str, Any] = {}
    plan: dict[str, dict[str, Any]] = {}
    if is_ct2_folder(folder):
        form, tensors, weights = "faster-whisper (CTranslate2)", _ct2_tensors(folder), ["model.bin"]
    else:
        config = verify_folder(folder)
        quantization = config.get("quantization_config") or {}
        plan = quantization.get("plan") or {}
        form = "Hugging Face"
        if quantization.get("quant_method") == "dqw":
            form = f"dqw packed, version {quantization.get('format_version', '?')}"
        weights = weight_files(folder)
        tensors = {}
        for name in weights:
            tensors |= _safetensors(folder / name)
    parts = _parts(tensors, plan, _packed_weights(config) if plan else {})
    layers = {name: _spec_words(spec) for name, spec in plan.items()}
    all_bytes = sum(_file_sizes(folder).values())
    return Report(form, parts, model_bytes(folder), all_bytes, config, layers)


# name -> (element type, number of elements, bytes)
_Tensors = dict[str, tuple[str, int, int]]


def _safetensors(path: Path) -> _Tensors:
    out: _Tensors = {}
    for name, tensor in safetensors_header(path).items():
        count = 1
        for length in tensor["shape"]:
            count *= length
        start, end = tensor["data_offsets"]
        out[name] = (_FLOATS.get(tensor["dtype"], tensor["dtype"]), count, end - start)
    return out


def _ct2_tensors(folder: Path) -> _Tensors:
    out: _Tensors = {}
    seen: set[int] = set()
    for name, tensor in read_model_bin(folder / "model.bin").variables.items():
        if tensor.dim() and tensor.data_ptr() not in seen:  # scalars are settings, aliases repeats
            seen.add(tensor.data_ptr())
            kind = str(tensor.dtype).removeprefix("torch.")
            out[name] = (kind, tensor.numel(), tensor.nbytes)
    return out


def _packed_weights(config: dict[str, Any]) -> dict[str, int]:
    """Layer → weights, of the packed layers of this config.json: no size in bytes tells it."""
    modules = quant_modules(skeleton(config))
    return {name: module.rows * module.cols for name, module in modules.items()}


def _parts(
    tensors: _Tensors, plan: dict[str, dict[str, Any]], weights: dict[str, int]
) -> list[Part]:
    parts: dict[str, Part] = {}
    for name, (dtype, count, size) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        kind = _kind(name if owner not in plan or leaf == "bias" else owner)
        part = parts.setdefault(kind, Part(kind))
        if name.endswith("_scale") or (owner in plan and leaf in ("scale", "levels")):
            part.scales += size
        elif owner in plan and leaf == "weight":
            part.codes += size
            part.parameters += weights[owner]
            part.formats[_spec_words(plan[owner], listed=False)] += 1
        elif dtype.startswith("int"):
            part.codes += size
            part.parameters += count
            part.formats[dtype] += 1
        else:
            part.floats += size
            part.parameters += count
            part.formats[dtype] += 1
    return sorted(parts.values(), key=lambda part: -part.bytes)


def _spec_words(spec: dict[str, Any], listed: bool = True) -> str:
    """Grid, bits and what shares a scale: "apot 4 / 64", "uniform 8 / row"."""
    group = spec.get("group_size")
    scale = "per tensor" if spec.get("per_tensor") else f"/ {group}" if group else "/ row"
    int8 = " int8" if spec.get("activations") == "int8" else ""
    grid = str(spec.get("grid", ""))
    if not listed and is_spelled_out(grid):
        grid = "levels"  # a learned grid: each layer's own
    return f"{grid} {spec['bits']}{int8} {scale}"


def _kind(name: str) -> str:
    """The kind of layer that a tensor of either naming belongs to."""
    side = "decoder" if "decoder" in name else "encoder"
    if "embed_tokens" in name or "decoder/embeddings" in name or "proj_out" in name:
        return "embedding"
    if "positions" in name or "position_encodings" in name:
        return "positions"
    if "norm" in name or name.endswith("bias"):
        return "norms, biases"
    if "conv" in name:
        return "convolutions"
    if "encoder_attn" in name or "/attention/" in name:
        return "decoder cross"
    if "self_att" in name:
        return f"{side} attn"
    return f"{side} FFN"


def architecture(report: Report) -> str:
    """The model's shape from config.json, to be appended; "" for faster-whisper folders."""
    config = report.config
    if not config:
        return ""
    return (
        f", {config['encoder_layers']} + {config['decoder_layers']} layers, "
        f"width {config['d_model']}, "
        f"{config['vocab_size']} tokens, {config['num_mel_bins']} mel bins"
    )


def to_dict(report: Report) -> dict[str, Any]:
    """Plain values for JSON."""
    rows = [
        {
            "kind": part.kind,
            "parameters": part.parameters,
            "stored": dict(part.formats),
            "codes": part.codes,
            "scales": part.scales,
            "floats": part.floats,
            "bits_per_parameter": round(part.bits, 3),
        }
        for part in [*report.parts, report.total]
    ]
    return {
        "format": report.format,
        "bytes": report.model_bytes,
        "parts": rows,
        "layers": report.layers,
    }
