"""A float Whisper written as whisper.cpp's model file, in float16, q8_0 or q4_0.

The quantized matrices are those that whisper.cpp's own quantizer chooses: all but the positions;
convolutions stay float16, vectors float32.
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TYPES = {"f16": (1, 1), "q4_0": (2, 2002), "q8_0": (8, 2007)}  # tensor type, file type
BLOCK = 32
NAMES = {
    "self_attn_layer_norm": "attn_ln",
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "encoder_attn.q_proj": "cross_attn.query",
    "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value",
    "encoder_attn.out_proj": "cross_attn.out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}


def write(file: Path, model: Any, processor: Any, kind: str) -> Path:
    """``model`` (float) and its tokenizer as ``file``; kind: f16, q8_0 or q4_0."""
    c = model.config
    tensor_type, file_type = TYPES[kind]
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as out:
        numbers = (
            c.vocab_size, c.max_source_positions, c.d_model, c.encoder_attention_heads,
            c.encoder_layers, c.max_target_positions, c.d_model, c.decoder_attention_heads,
            c.decoder_layers, c.num_mel_bins, file_type,
        )  # fmt: skip
        out.write(struct.pack("<I11i", 0x67676D6C, *numbers))
        filters = np.ascontiguousarray(processor.feature_extractor.mel_filters.T, np.float32)
        out.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
        write_vocabulary(out, processor.tokenizer)
        for name, tensor in model.state_dict().items():
            if name != "proj_out.weight":
                write_tensor(out, renamed(name), tensor.float().numpy(), tensor_type)
    temporary.replace(file)
    return file


def write_vocabulary(out: BinaryIO, tokenizer: Any) -> None:
    """The pieces in front of the special tokens, as bytes."""
    byte_of = byte_of_character()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    special = set(tokenizer.get_added_vocab())
    pieces = sorted((i, piece) for piece, i in vocabulary.items() if piece not in special)
    out.write(struct.pack("<i", len(pieces)))
    for _, piece in pieces:
        raw = bytes(byte_of[char] for char in piece)
        out.write(struct.pack("<i", len(raw)) + raw)


def byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte that prints as itself, the others as characters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [number for number in range(256) if number not in prints]
    others = {chr(256 + i): number for i, number in enumerate(rest)}
    return {chr(number): number for number in prints} | others


def renamed(name: str) -> str:
    name = name.removeprefix("model.").replace("layers.", "blocks.")
    name = name.replace("embed_positions.weight", "positional_embedding")
    name = name.replace("embed_tokens", "token_embedding")
    for theirs, ours in NAMES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    if "blocks" not in name:
        last = "ln_post" if name.startswith("encoder") else "ln"
        name = name.replace("layer_norm", last)
    return name


def write_tensor(out: BinaryIO, name: str, data: np.ndarray, tensor_type: int) -> None:
    kind = 0
    if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
        data = data[:, None]
    elif data.ndim == 3:
        kind = 1
    elif data.ndim == 2 and "positional" not in name:
        kind = tensor_type
    raw = name.encode()
    out.write(struct.pack("<3i", data.ndim, len(raw), kind))
    out.write(struct.pack(f"<{data.ndim}i", *data.shape[::-1]) + raw)
    out.write(encoded(data, kind))


def encoded(data: np.ndarray, kind: int) -> bytes:
    if kind in (0, 1):
        return np.ascontiguousarray(data, np.float32 if kind == 0 else np.float16).tobytes()
    blocks = data.reshape(-1, BLOCK)
    if kind == 8:
        scale = np.abs(blocks).max(1, keepdims=True) / 127
    else:  # the value of the largest magnitude, whichever sign it has, becomes -8
        at = np.abs(blocks).argmax(1)[:, None]
        scale = np.take_along_axis(blocks, at, 1) / -8
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    if kind == 8:
        codes = np.round(blocks * inverse).astype(np.int8).view(np.uint8)
    else:
        codes = np.clip(blocks * inverse + 8.5, 0, 15).astype(np.uint8)
        codes = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    halves = scale.astype(np.float16).view(np.uint8)
    return np.concatenate([halves, codes], axis=1).tobytes()
