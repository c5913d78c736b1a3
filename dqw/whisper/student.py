"""A student cut from its teacher: some of its layers, the rest of it whole."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Kept(NamedTuple):
    """Which of the teacher's layers a student has, by their index there, in order."""

    encoder: list[int]
    decoder: list[int]


def kept_layers(count: int, of: int) -> list[int]:
    """``count`` of ``of`` layers evenly spaced, first and last included.

    distil-whisper keeps the same ones (arXiv 2311.00430, section 4).
    """
    if count == 1:
        return [0]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def spaced_evenly(teacher: Any, encoder_layers: int, decoder_layers: int) -> Kept:
    """So many layers of each stack; ``dqw.prune`` measures which.

    Raises UserError if more are asked for than the teacher has, or none.
    """
    found = []
    for stack, count in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        has = getattr(teacher.config, f"{stack}_layers")
        if not 1 <= count <= has:
            raise UserError(
                f"--student-layers asks for {count} {stack} layers, and the teacher has {has}: "
                f"give 1 to {has}."
            )
        found.append(kept_layers(count, has))
    return Kept(*found)


def cut_student(
    teacher: WhisperForConditionalGeneration, kept: Kept
) -> WhisperForConditionalGeneration:
    """A copy of ``teacher`` with the layers ``kept``."""
    student = copy.deepcopy(teacher)
    for stack, layers in kept._asdict().items():
        module = getattr(student.model, stack)
        module.layers = nn.ModuleList(module.layers[i] for i in layers)
        setattr(student.config, f"{stack}_layers", len(layers))
    student.config.num_hidden_layers = len(kept.encoder)
    for index, layer in enumerate(
        student.model.decoder.layers
    ):  # each knows its place in the cache
        for attention in (layer.self_attn, layer.encoder_attn):
            attention.layer_idx = index
    _remap_alignment_heads(student, kept.decoder)
    return student


def _remap_alignment_heads(student: WhisperForConditionalGeneration, kept: list[int]) -> None:
    """Word timestamps name decoder layers: keep the heads whose layer is still there."""
    config: Any = student.generation_config
    heads = getattr(config, "alignment_heads", None)
    if heads:
        place = {layer: index for index, layer in enumerate(kept)}
        config.alignment_heads = [[place[layer], head] for layer, head in heads if layer in place]
