"""Which layers a cut student keeps, measured: those that its teacher can least do without.

Layers leave one at a time, each time the one without which the teacher's own next-token
distributions on some speech change least, given those that have left. Spaced evenly, as most do it,
is a guess: whisper-base without two of its six encoder layers has a KL of 5.3 spaced evenly and 2.5
chosen, without two of its six decoder layers 8.8 and 3.7 (12 clips of English).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqw.probe import Probe
from dqw.whisper.student import Kept

WINDOWS = 16  # of speech, 30 s each


def passes(teacher: Any, count: tuple[int, int]) -> int:
    """How many passes ``choose_layers`` will make."""
    config = teacher.config
    depths = (config.encoder_layers, config.decoder_layers)
    return sum(sum(range(to + 1, depth + 1)) for to, depth in zip(count, depths, strict=True))


@torch.no_grad()
def choose_layers(
    teacher: Any,
    batches: Sequence[Mapping[str, Tensor]],
    count: tuple[int, int],
    progress: Callable[[], object] | None = None,
) -> Kept:
    """The ``count`` encoder and decoder layers to keep; the teacher is as before afterwards.

    batches: input_features (batch, mel, frames), decoder_input_ids and decoder_mask (batch,
    length). Ties leave from the front. The stacks are judged each by itself, the other being whole.
    """
    probe = Probe(teacher, batches)

    def choose(stack: Any, to: int, encoder: int | None) -> list[int]:
        layers, kept = stack.layers, list(range(len(stack.layers)))
        try:
            while len(kept) > to:
                costs = {}
                for leaver in kept:
                    stack.layers = nn.ModuleList(layers[i] for i in kept if i != leaver)
                    costs[leaver] = probe.kl(encoder)
                    if progress is not None:
                        progress()
                kept.remove(min(costs, key=costs.__getitem__))
        finally:
            stack.layers = layers
        return kept

    model = teacher.model
    return Kept(choose(model.encoder, count[0], 0), choose(model.decoder, count[1], None))
