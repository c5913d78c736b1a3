"""A float Whisper written as whisper.cpp's model file, in float16, q8_0, q4_0 or q4_k.

The quantized matrices are those that whisper.cpp's own quantizer chooses: all but the positions;
convolutions stay float16, vectors float32. q4_k is for speed: its scales and minima come from the
extremes of 32 weights, where whisper.cpp's quantizer searches better ones for the same bytes.
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dqw.errors import UserError

# tensor type, file type
TYPES = {"f16": (1, 1), "q4_0": (2, 2002), "q4_k": (12, 2012), "q8_0": (8, 2007)}
BLOCK = 32
SUPERBLOCK = 256  # weights of q4_k that share two float16 numbers
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
    """``model`` (float) and its tokenizer as ``file``; kind: one of ``TYPES``.

    Raises UserError for q4_k and a width that its blocks do not divide.
    """
    c = model.config
    tensor_type, file_type = TYPES[kind]
    if kind == "q4_k" and c.d_model % SUPERBLOCK:
        raise UserError(f"q4_k needs rows of {SUPERBLOCK} weights or more: {c.d_model} do not fit")
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
    if kind == 12:
        return encoded_q4_k(blocks.reshape(-1, SUPERBLOCK // BLOCK, BLOCK))
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


def encoded_q4_k(blocks: np.ndarray) -> bytes:
    """(superblocks, 8, 32) float32 → 144 bytes each: weight = d · scale · code − dmin · minimum.

    d, dmin float16; 8 scales and 8 minima of 6 bits in 12 bytes, the upper two bits of the last
    four in the first eight bytes; 4-bit codes, of each two blocks the first in the low nibbles.
    """
    low = np.minimum(blocks.min(2), 0)
    step = (np.maximum(blocks.max(2), 0) - low) / 15
    d, dmin = ((x.max(1, keepdims=True) / 63).astype(np.float16) for x in (step, -low))

    def six_bits(x: np.ndarray, unit: np.ndarray) -> np.ndarray:
        unit = unit.astype(np.float32)
        return np.clip(np.round(np.divide(x, unit, out=np.zeros_like(x), where=unit > 0)), 0, 63)

    scale, minimum = six_bits(step, d), six_bits(-low, dmin)
    unit = (scale * d)[..., None]
    raised = blocks + (minimum * dmin)[..., None]
    codes = np.clip(np.round(np.divide(raised, unit, out=np.zeros_like(blocks), where=unit > 0)),
                    0, 15).astype(np.uint8)  # fmt: skip
    s, m = scale.astype(np.uint8), minimum.astype(np.uint8)
    packed = np.concatenate(
        [
            s[:, :4] | s[:, 4:] >> 4 << 6,
            m[:, :4] | m[:, 4:] >> 4 << 6,
            s[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    nibbles = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(blocks), -1)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], 1).tobytes()
