"""A stack's layers run one by one on some speech: what each is called with, kept from call to call.

What walks through a model layer by layer stands on it: ``dqw.calibrate``, ``dqw.heal``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dqw.catch import given_to

ROWS = 4096  # at most this many rows of one input are taken, evenly spaced


@dataclass
class Call:
    """What a transformer layer is called with; hidden: its first argument, (batch, length, width).

    real: which positions are no padding, (batch, length) bool. attended: attention modules of the
    layer with what their out_proj is given, known already and not worked out again.
    """

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    real: Tensor | None = None
    attended: list[tuple[Any, Tensor]] = field(default_factory=list)

    def run(self, layer: nn.Module) -> Tensor:
        for attention, x in self.attended:
            attention.forward = lambda *_, last=attention.out_proj, x=x, **__: (last(x), None)
        try:
            output = layer(self.hidden, *self.rest, **self.named)
        finally:
            for attention, _ in self.attended:
                del attention.forward
        return output[0] if isinstance(output, tuple) else output

    def rows(self, x: Tensor, cols: int) -> Tensor:
        """Rows (n, cols) of a matrix's input that are no padding, evenly spaced."""
        if self.real is not None and x.shape[:-1] == self.real.shape:
            x = x[self.real]
        x = x.reshape(-1, cols)
        return x[:: max(-(-len(x) // ROWS), 1)]


def first_call(stack: Any, inputs: dict[str, Any], real: Tensor | None = None) -> Call:
    """How ``stack`` calls its first layer for ``inputs``."""
    given, named = given_to(stack.layers[0], lambda: stack(**inputs))
    return Call(given[0], given[1:], named, real)


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
    ids = batch["decoder_input_ids"]
    return {"input_ids": ids, "encoder_hidden_states": states, "use_cache": False}
