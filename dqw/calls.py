"""A stack's layers run one by one on some speech: what each is called with, kept from call to call.

What walks through a model layer by layer stands on it: ``dqw.calibrate``, ``dqw.heal``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqw.catch import given_to
from dqw.devices import multiplied

# At most this many rows of one input are taken, evenly spaced: of four windows every second. base,
# 160 windows, KL on the dev speech at 27 and 33 MiB: 0.0284 and 0.0099; with half of them for fc2,
# 6 % of the time, 0.0293 and 0.0102, other languages 5 % worse and English none (one run each).
ROWS = 4096
# Of the encoder's positions that hear only padding, one in so many is taken: they are alike, and a
# third of windows that whole clips fill. base at 27 MiB, KL on 64 held-out clips, one run each:
# 0.0640 with all, 0.0581 with every 4th, 0.0623 with every 16th; 0.0602 with every 4th also of what
# cross-attention hears (a one-off program).
PADDING = 4
REACH = 8  # positions behind a clip that count as heard


@dataclass
class Call:
    """What a transformer layer is called with; hidden: its first argument, (batch, length, width).

    real: which positions are no padding, (batch, length) bool; padding: which hear nothing else.
    Both None: all count. known: modules of the layer with what they return, not worked out again.
    """

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    real: Tensor | None = None
    padding: Tensor | None = None
    known: list[tuple[Any, Any]] = field(default_factory=list)
    _taken: Tensor | None = field(default=None, init=False)

    def run(self, layer: nn.Module) -> Tensor:
        for module, output in self.known:
            module.forward = lambda *_, output=output, **__: output
        try:
            result = layer(self.hidden, *self.rest, **self.named)
        finally:
            for module, _ in self.known:
                del module.forward
        return result[0] if isinstance(result, tuple) else result

    def rows(self, x: Tensor, cols: int) -> Tensor:
        """Rows (n, cols) of a matrix's input, evenly spaced, with little or no padding."""
        counts = self.real if self.real is not None else self.padding
        flat = x.reshape(-1, cols)
        if counts is None or x.shape[:-1] != counts.shape:
            return flat[:: max(-(-len(flat) // ROWS), 1)]
        if self._taken is None:
            self._taken = self._take()
        return flat.index_select(0, self._taken)

    def _take(self) -> Tensor:
        """Which rows ``rows`` takes of all positions, in their order."""
        if self.real is not None:
            found = self.real.flatten().nonzero().squeeze(1)
            return found[:: max(-(-len(found) // ROWS), 1)]
        assert self.padding is not None
        pads = self.padding.flatten()
        heard, rest = ((~pads).nonzero(), pads.nonzero()[::PADDING])
        return torch.cat([heard, rest]).squeeze(1)[:: max(-(-len(pads) // ROWS), 1)]


def first_call(
    stack: Any,
    inputs: dict[str, Any],
    real: Tensor | None = None,
    padding: Tensor | None = None,
) -> Call:
    """How ``stack`` calls its first layer for ``inputs``."""
    given, named = given_to(stack.layers[0], lambda: stack(**inputs))
    return Call(given[0], given[1:], named, real, padding)


def padding_of(features: Tensor) -> Tensor:
    """Which of the encoder's positions hear only what pads a clip to 30 s: where ``features``
    (batch, mels, frames) are those of the last frame to the end. (batch, frames / 2) bool."""
    heard = (features != features[..., -1:]).any(1)
    frames = torch.arange(1, heard.shape[1] + 1, device=features.device)
    count = (heard * frames).amax(1, keepdim=True)  # up to the last one heard
    positions = torch.arange((len(frames) + 1) // 2, device=features.device)
    return positions >= (count + 1) // 2 + REACH


def hearing(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The encoder's inputs."""
    return {"input_features": batch["input_features"]}


def decoder_call(model: Any, batch: dict[str, Tensor], heard: Call) -> Call:
    """How the decoder of ``model``, a WhisperModel, calls its first layer for ``batch``; heard: the
    encoder's call behind its last layer."""
    inputs = decoding(batch, model.encoder.layer_norm(heard.hidden))
    return first_call(model.decoder, inputs, batch.get("decoder_mask"))


def decoding(batch: dict[str, Tensor], states: Tensor) -> dict[str, Any]:
    """The decoder's inputs; states: the encoder's last, normalized."""
    ids, heard = batch["decoder_input_ids"], multiplied(states)  # once, not in every layer
    return {"input_ids": ids, "encoder_hidden_states": heard, "use_cache": False}
