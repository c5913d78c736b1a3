"""A tiny Whisper with a real tokenizer, speech made of tones, the command line, and a writer of
CTranslate2 files."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import make_tiny_whisper
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from typer.testing import CliRunner

from dqw.cli import app
from dqw.whisper.tokenizer import load_tokenizer, prompt_ids

LANGUAGES = ("en", "de", "ja")
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
SPECIALS = (
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
    "<|notimestamps|>",
)  # fmt: skip
TIMES = tuple(f"<|{i * 0.02:.2f}|>" for i in range(51))  # one second


def tone(seconds: float = 0.5, rate: int = 16_000, channels: int = 1, hertz: float = 440.0):
    """(samples,) or (samples, channels) float32: a sine, every channel alike."""
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    wave = wave.astype(np.float32)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def voices(*seconds: float) -> list[np.ndarray]:
    """Noise of these lengths at 16 kHz, the same each time."""
    dice = np.random.default_rng(0)
    return [(0.1 * dice.standard_normal(round(s * 16_000))).astype(np.float32) for s in seconds]


def write_tone(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, channels), rate)
    return path


def tokenizer_json(merges: list[tuple[str, str]] = MERGES, times: tuple[str, ...] = TIMES) -> dict:
    """A byte-level tokenizer.json, laid out as Whisper's."""
    pieces = [*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    added = [
        {"id": len(pieces) + n, "content": token, "special": token in SPECIALS,
         "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for n, token in enumerate([*SPECIALS, *times])
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(merge) for merge in merges]}
    return {"version": "1.0", "added_tokens": added, "model": model}


def tiny(folder: Path) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A random Whisper that hears one second; its tokenizer.json is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = make_tiny_whisper(
        vocab_size=len(tokenizer), max_source_positions=50, max_target_positions=24,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end + 1,
    )  # fmt: skip
    with torch.no_grad():  # else every step says what the one before said
        model.model.decoder.embed_positions.weight.normal_()
    config = model.generation_config
    for name, value in prompt_ids(tokenizer).items():
        setattr(config, name, value)
    config.max_length = 24
    config._from_model_config = False  # else generate would build another from the model
    # like Whisper: no special token but the end, and not the end at once
    config.suppress_tokens = [1, 2, 7, *range(end + 1, end + len(SPECIALS))]
    config.begin_suppress_tokens = [end]
    config.max_initial_timestamp_index = 50
    features = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return model, WhisperProcessor(features, tokenizer)


def save_tiny(folder: Path) -> Path:
    """`tiny` as a Hugging Face folder."""
    model, processor = tiny(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_speech(
    folder: Path, texts: Sequence[str], languages: Sequence[str] = ("en",), step: float = 0.1
) -> Path:
    """Labelled tones from 0.4 s on, each ``step`` seconds longer, the languages in turn; returns
    their manifest."""
    rows = []
    for number, text in enumerate(texts):
        write_tone(folder / f"{number}.wav", 0.4 + step * number)
        language = languages[number % len(languages)]
        rows.append({"audio": f"{number}.wav", "text": text, "language": language})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def run_dqw(*arguments: object) -> tuple[int, str]:
    """`dqw` in this process: exit code and everything printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# ------------------------------------------------------------------ CTranslate2

_CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4, torch.bfloat16: 5}


def save_ct2(folder: Path, dtype: torch.dtype = torch.float16) -> WhisperForConditionalGeneration:
    """`tiny` as a faster-whisper folder with weights in `dtype`; returns the model it came from."""
    model, _ = tiny(folder)
    config = model.generation_config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "suppress_ids": config.suppress_tokens,
                "suppress_ids_begin": config.begin_suppress_tokens,
                "lang_ids": [1],
            }
        )
    )
    (folder / "model.bin").write_bytes(ct2_bytes(ct2_variables(model, dtype)))
    return model


def ct2_variables(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """CTranslate2's names -> tensors, with q, k, v fused and matrices quantized for int8, int16."""
    state = model.state_dict()
    out: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        if dtype.is_floating_point:
            out[name] = tensor.to(dtype)
        elif tensor.dim() == 1 or "position" in name:
            out[name] = tensor
        elif dtype == torch.int8:
            rows = tensor.reshape(len(tensor), -1)
            scale = 127 / rows.abs().amax(1)
            out[name] = (rows * scale[:, None]).round().to(dtype).reshape(tensor.shape)
            out[name + "_scale"] = scale
        else:
            scale = 2**10 / tensor.abs().max()
            out[name] = (tensor * scale).round().to(dtype)
            out[name + "_scale"] = scale.reshape(())

    def dense(name: str, *sources: str) -> None:
        put(f"{name}/weight", torch.cat([state[f"{s}.weight"] for s in sources]))
        biases = [state.get(f"{s}.bias", torch.zeros(len(state[f"{s}.weight"]))) for s in sources]
        put(f"{name}/bias", torch.cat(biases))

    def norm(name: str, source: str) -> None:
        put(f"{name}/gamma", state[f"{source}.weight"])
        put(f"{name}/beta", state[f"{source}.bias"])

    for side in ("encoder", "decoder"):
        for index in range(2):
            layer, source = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            own, other = f"{source}.self_attn", f"{source}.encoder_attn"
            dense(f"{layer}/self_attention/linear_0", *(f"{own}.{x}_proj" for x in "qkv"))
            dense(f"{layer}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{layer}/self_attention/layer_norm", f"{own}_layer_norm")
            if side == "decoder":
                dense(f"{layer}/attention/linear_0", f"{other}.q_proj")
                dense(f"{layer}/attention/linear_1", f"{other}.k_proj", f"{other}.v_proj")
                dense(f"{layer}/attention/linear_2", f"{other}.out_proj")
                norm(f"{layer}/attention/layer_norm", f"{other}_layer_norm")
            dense(f"{layer}/ffn/linear_0", f"{source}.fc1")
            dense(f"{layer}/ffn/linear_1", f"{source}.fc2")
            norm(f"{layer}/ffn/layer_norm", f"{source}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        put(f"{side}/position_encodings/encodings", state[f"model.{side}.embed_positions.weight"])
        out[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
    dense("encoder/conv1", "model.encoder.conv1")
    dense("encoder/conv2", "model.encoder.conv2")
    put("decoder/embeddings/weight", state["model.decoder.embed_tokens.weight"])
    return out


def ct2_bytes(
    variables: dict[str, torch.Tensor], version: int = 6, spec: str = "WhisperSpec"
) -> bytes:
    """The bytes of a model.bin whose projection is an alias of the embedding."""

    def string(text: str) -> bytes:
        raw = text.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    out = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(variables))]
    for name, tensor in variables.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        out += [string(name), struct.pack("<B", tensor.dim())]
        out += [struct.pack("<I", length) for length in tensor.shape]
        out += [struct.pack("<BI", _CODES[tensor.dtype], len(raw)), raw]
    out += [struct.pack("<I", 1), string("decoder/projection/weight")]
    out += [string("decoder/embeddings/weight")]
    return b"".join(out)


def refused(words: str, *arguments: object) -> None:
    """dqw compress with these says no in a sentence with `words` in it."""
    code, output = run_dqw("compress", *arguments)
    assert code == 1 and "Traceback" not in output, output
    assert output.strip().splitlines()[-1].startswith("Error: "), output
    assert words in output, output
