"""A student cut from its teacher: some of its layers, the rest of it whole."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from dqw.errors import UserError

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


def parse_layers(text: str) -> tuple[int, int]:
    """ "4,2" → (4, 2): encoder and decoder layers to keep. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not found:
        raise UserError(
            f"--student-layers is {text!r}: give the encoder's and the decoder's layers, like 4,4."
        )
    return int(found[1]), int(found[2])


def kept_layers(count: int, of: int) -> list[int]:
    """Which ``count`` of ``of`` layers a cut keeps: evenly spaced, first and last included.

    distil-whisper keeps the same ones (arXiv 2311.00430, section 4).
    """
    if count == 1:
        return [0]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def cut_student(
    teacher: WhisperForConditionalGeneration, encoder_layers: int, decoder_layers: int
) -> WhisperForConditionalGeneration:
    """A copy of ``teacher`` with ``encoder_layers`` + ``decoder_layers`` of its layers.

    Raises UserError if more layers are asked for than the teacher has, or none.
    """
    for stack, count in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        has = getattr(teacher.config, f"{stack}_layers")
        if not 1 <= count <= has:
            raise UserError(
                f"--student-layers asks for {count} {stack} layers, and the teacher has {has}: "
                f"give 1 to {has}."
            )
    student = copy.deepcopy(teacher)
    keep = {}
    for stack, count in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        module = getattr(student.model, stack)
        keep[stack] = kept_layers(count, len(module.layers))
        module.layers = nn.ModuleList(module.layers[i] for i in keep[stack])
        setattr(student.config, f"{stack}_layers", count)
    student.config.num_hidden_layers = encoder_layers
    for index, layer in enumerate(
        student.model.decoder.layers
    ):  # each knows its place in the cache
        for attention in (layer.self_attn, layer.encoder_attn):
            attention.layer_idx = index
    _remap_alignment_heads(student, keep["decoder"])
    return student


def _remap_alignment_heads(student: WhisperForConditionalGeneration, kept: list[int]) -> None:
    """Word timestamps name decoder layers: keep the heads whose layer is still there. Without any,
    transformers is to say that there are no word timestamps, not to fail on an empty list."""
    config: Any = student.generation_config
    heads = getattr(config, "alignment_heads", None)
    if heads:
        place = {layer: index for index, layer in enumerate(kept)}
        config.alignment_heads = [[place[layer], head] for layer, head in heads if layer in place]
        if not config.alignment_heads:
            del config.alignment_heads
