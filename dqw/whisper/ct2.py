"""Reader of faster-whisper (CTranslate2) folders: model.bin to a Hugging Face Whisper.

model.bin, little endian: u32 version; string spec; u32 revision; u32 count; then per variable:
string name, u8 rank, u32 dims[rank], u8 dtype, u32 bytes, data; then u32 count of aliases, each
two strings (name, target). A string is a u16 length that counts its closing NUL, then the bytes.
Quantized weights (int8, int16) have a float32 variable NAME_scale, one number a row or one for
all, and weight = stored / scale. q, k and v of self-attention are one fused matrix, k and v of
cross-attention another; Whisper's k has no bias, so that part of the fused bias is zero.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dqw.errors import UserError
from dqw.whisper.tokenizer import load_tokenizer, prompt_ids

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

VERSIONS = (4, 5, 6)
_DTYPES = (
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
)
_CURE = "copy the folder again or convert the model once more with ct2-transformers-converter"


@dataclass(frozen=True)
class Ct2File:
    """The content of a model.bin: `variables` name -> tensor as stored, aliases resolved."""

    version: int
    revision: int
    variables: dict[str, torch.Tensor]

    def number(self, name: str, default: int | None = None) -> int:
        if name not in self.variables and default is not None:
            return default
        return int(self._stored(name).item())

    def weight(self, name: str) -> torch.Tensor:
        """The float tensor `name`; quantized ones are divided by their scale, in float32."""
        stored = self._stored(name)
        if stored.is_floating_point():
            return stored
        scale = self._stored(name + "_scale").float()
        return stored.float() / scale.reshape(-1, *[1] * (stored.dim() - 1))

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.variables:
            raise UserError(f"model.bin lacks the variable {name}: it is not a Whisper; {_CURE}")
        return self.variables[name]


class _Cursor:
    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.data = np.memmap(path, dtype=np.uint8, mode="c")

    def take(self, count: int) -> np.ndarray:
        if self.at + count > len(self.data):
            raise UserError(
                f"{self.path} is cut off: {len(self.data)} bytes are there, at least "
                f"{self.at + count} are needed; {_CURE}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)).tobytes())[0]

    def string(self) -> str:
        raw = self.take(self.number("H")).tobytes()
        try:
            return raw.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is damaged near byte {self.at}; {_CURE}") from None


def is_ct2_folder(folder: Path) -> bool:
    return (folder / "model.bin").is_file()


def read_model_bin(path: str | Path) -> Ct2File:
    """Map a model.bin into memory (copy on write) and name its variables.

    Raises UserError for a missing, truncated or damaged file, an unknown binary version, and a
    model that is no Whisper.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a faster-whisper folder with a model.bin")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); {_CURE}")
    file = _Cursor(path)
    version = file.number("I")
    if version not in VERSIONS:
        raise UserError(
            f"{path} has binary version {version}, and {VERSIONS[0]} to {VERSIONS[-1]} can be read "
            "(or it is no CTranslate2 model at all); convert it with a current "
            "ct2-transformers-converter"
        )
    spec, revision = file.string(), file.number("I")
    if spec != "WhisperSpec":
        raise UserError(f"{path} holds a {spec!r}, not a WhisperSpec; give a Whisper model")
    variables: dict[str, torch.Tensor] = {}
    for _ in range(file.number("I")):
        name = file.string()
        shape = [file.number("I") for _ in range(file.number("B"))]
        code, size = file.number("B"), file.number("I")
        if code >= len(_DTYPES) or size != math.prod(shape) * _DTYPES[code].itemsize:
            raise UserError(f"{path} is damaged at variable {name!r}; {_CURE}")
        raw = torch.from_numpy(file.take(size))
        if file.at % 8 != size % 8:  # a view needs an aligned start
            raw = raw.clone()
        variables[name] = raw.view(_DTYPES[code]).reshape(shape)
    for _ in range(file.number("I")):
        name, target = file.string(), file.string()
        if target not in variables:
            raise UserError(f"{path}: alias {name} names {target}, which is not there; {_CURE}")
        variables[name] = variables[target]
    if file.at != len(file.data):
        raise UserError(f"{path} has {len(file.data) - file.at} bytes too many; {_CURE}")
    return Ct2File(version, revision, variables)


def load_ct2(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A faster-whisper folder (model.bin, config.json, tokenizer.json) as a Hugging Face Whisper.

    Returns the model in eval mode on the CPU with float weights in `dtype`, and its processor; a
    normalizer.json (English spellings, for scoring) is used when the folder has one.
    """
    from transformers import (
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    folder = Path(folder)
    file = read_model_bin(folder / "model.bin")
    tokenizer = load_tokenizer(folder)
    config = _config(file, tokenizer)
    state = {name: tensor.to(dtype) for name, tensor in state_dict(file, config).items()}
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.shape != expected[name]:
            raise UserError(f"{folder / 'model.bin'}: {name} has shape {list(tensor.shape)}, not "
                            f"{list(expected[name])}; {_CURE}")  # fmt: skip
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.generation_config = _generation_config(folder, config, tokenizer)
    model.name_or_path = str(folder)
    window = config.max_source_positions // 50  # seconds: 100 frames each, halved by conv2
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window)
    return model.eval(), WhisperProcessor(features, tokenizer)


def state_dict(file: Ct2File, config: WhisperConfig) -> dict[str, torch.Tensor]:
    """Hugging Face names -> float tensors; fused matrices are taken apart."""
    out: dict[str, torch.Tensor] = {}

    def dense(ours: str, theirs: str, part: int = 0, parts: int = 1, bias: bool = True) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            whole = file.weight(f"{theirs}/{kind}")
            rows = whole.shape[0] // parts
            out[f"{ours}.{kind}"] = whole[part * rows : (part + 1) * rows]

    def norm(ours: str, theirs: str) -> None:
        out[f"{ours}.weight"] = file.weight(f"{theirs}/gamma")
        out[f"{ours}.bias"] = file.weight(f"{theirs}/beta")

    def attention(ours: str, theirs: str, fused: tuple[tuple[str, int, int, int], ...]) -> None:
        for name, linear, part, parts in fused:
            dense(f"{ours}.{name}", f"{theirs}/linear_{linear}", part, parts, name != "k_proj")
        norm(f"{ours}_layer_norm", f"{theirs}/layer_norm")

    own = (("q_proj", 0, 0, 3), ("k_proj", 0, 1, 3), ("v_proj", 0, 2, 3), ("out_proj", 1, 0, 1))
    cross = (("q_proj", 0, 0, 1), ("k_proj", 1, 0, 2), ("v_proj", 1, 1, 2), ("out_proj", 2, 0, 1))
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for index in range(count):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", own)
            if side == "decoder":
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", cross)
            dense(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            dense(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        positions = file.weight(f"{side}/position_encodings/encodings")
        out[f"model.{side}.embed_positions.weight"] = positions
    dense("model.encoder.conv1", "encoder/conv1")
    dense("model.encoder.conv2", "encoder/conv2")
    out["model.decoder.embed_tokens.weight"] = file.weight("decoder/embeddings/weight")
    out["proj_out.weight"] = out["model.decoder.embed_tokens.weight"]
    return out


def _config(file: Ct2File, tokenizer: WhisperTokenizer) -> WhisperConfig:
    from transformers import WhisperConfig

    def layers(side: str) -> int:
        return len({n.split("/")[1] for n in file.variables if n.startswith(f"{side}/layer_")} -
                   {"layer_norm"})  # fmt: skip

    vocabulary, width = file.weight("decoder/embeddings/weight").shape
    if vocabulary < len(tokenizer):
        raise UserError(
            f"model.bin has {vocabulary} embeddings and tokenizer.json {len(tokenizer)} tokens: "
            "they belong to different models; take both from the same folder"
        )  # fmt: skip
    ids = tokenizer.get_vocab()
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=file.variables["encoder/conv1/weight"].shape[1],
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=file.number("encoder/num_heads", width // 64),
        decoder_attention_heads=file.number("decoder/num_heads", width // 64),
        encoder_ffn_dim=file.variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=file.variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=file.variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=file.variables["decoder/position_encodings/encodings"].shape[0],
        scale_embedding=bool(file.number("decoder/scale_embeddings", 0)),
        decoder_start_token_id=ids["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        begin_suppress_tokens=None,
        tie_word_embeddings=True,
        architectures=["WhisperForConditionalGeneration"],
    )


def _generation_config(
    folder: Path, config: WhisperConfig, tokenizer: WhisperTokenizer
) -> GenerationConfig:
    """What `generate` needs beside the weights: from config.json and the tokenizer's ids. Languages
    come from the tokenizer, because converters wrote the ids of .en models one too high."""
    from transformers import GenerationConfig

    stored: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        try:
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / 'config.json'} is not JSON ({error}); {_CURE}") from None
    extra = prompt_ids(tokenizer)
    if "alignment_heads" in stored:
        extra["alignment_heads"] = stored["alignment_heads"]
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=stored.get("suppress_ids"),
        begin_suppress_tokens=stored.get("suppress_ids_begin"),
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **extra,
    )
