"""Bytes of a Whisper as the paper's authors count them, and as dqw stores it.

The authors' size script counts 8 bits for the token embedding and for every decoder matrix and
layer norm weight, and 16 for the rest. With sizes in whole MiB it gives 89 and 44 for base and
tiny, and with small in float16 (461) the published 5.18 and 10.48 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dqw.budget import model_size
from dqw.recipe import Recipe

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Whisper's width, heads, and layers in encoder and decoder alike."""

    width: int
    heads: int
    layers: int


SHAPES = {"small": Shape(768, 12, 12), "base": Shape(512, 8, 6), "tiny": Shape(384, 6, 4)}


def empty_model(shape: Shape) -> Any:
    """A multilingual Whisper of this shape without memory for its weights."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=51865,
        d_model=shape.width,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width,
    )
    with torch.device("meta"):
        return WhisperForConditionalGeneration(config)


def authors_bytes(model: Any) -> int:
    """The authors' count."""
    eight = sixteen = 0
    for name, parameter in model.model.named_parameters():
        small = name.startswith("decoder") and name.endswith(".weight")
        if small and "embed_positions" not in name:
            eight += parameter.numel()
        else:
            sixteen += parameter.numel()
    return eight + 2 * sixteen


def size_table(recipes: dict[str, Recipe]) -> list[list[str]]:
    """Rows of text, the first the heads: the authors' accounting, and dqw under ``recipes``."""
    small = round(2 * sum(p.numel() for p in empty_model(SHAPES["small"]).parameters()) / MIB)
    times = "× under small float16"
    table = [["student", "authors' accounting", times]]
    for name in recipes:
        table[0] += [f"dqw, {name}", times]
    for name in ("base", "tiny"):
        model = empty_model(SHAPES[name])
        theirs = round(authors_bytes(model) / MIB)
        row = [name, f"{theirs} MiB", f"{small / theirs:.2f}"]
        for recipe in recipes.values():
            mib = model_size(model, recipe.plan(model)) / MIB
            row += [f"{mib:.1f} MiB", f"{small / mib:.2f}"]
        table.append(row)
    return table
