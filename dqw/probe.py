"""A model's next-token distributions on speech, and how far changed weights are from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqw.catch import given_to

Changed = int | None
"""The first of the encoder's layers that changed (0: that, or what comes before it); None: none."""


def first_changed(names: Iterable[str]) -> Changed:
    """Where the encoder differs if the layers ``names`` do."""
    found = list[int]()
    for name in names:
        if name.startswith("model.encoder."):
            layer = re.match(r"model\.encoder\.layers\.(\d+)\.", name)
            found.append(int(layer[1]) if layer else 0)
    return min(found, default=None)


class Probe:
    """A float model's next-token distributions on ``batches``, to compare changed weights with, or
    other models. A batch's ``teacher_features``, where it has them, are what the float model hears.

    What does not change is not worked out again: encoder outputs are kept, and the states before
    the encoder layer that was asked for last.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model.eval(), batches
        self.heard = self._hear(model, "teacher_features")
        self.target = self._predict(model, self.heard)
        self._before: tuple[int, list[Tensor]] | None = None

    def kl(self, encoder: Changed = 0) -> float:
        """Mean KL(float ‖ now) of the model as it is now, in nats a token."""
        pairs = self.by_batch(encoder=encoder)
        return max(sum(kl for kl, _ in pairs), 0.0) / sum(tokens for _, tokens in pairs)

    def by_batch(self, model: Any = None, encoder: Changed = 0) -> list[tuple[float, int]]:
        """(sum of KL(float ‖ ``model``) over tokens, tokens) of each batch; None: the own model,
        whose encoder is the float one's before layer ``encoder``."""
        if model is not None:
            heard = self.heard if self._hears_alike(model) else self._hear(model.eval())
        elif encoder is None:
            heard = self.heard
        else:
            heard = self._hear_from(encoder)
        pairs = zip(self.target, self._predict(self.model if model is None else model, heard))
        return [_kl(target.to(now.device), now) for target, now in pairs]

    def _hears_alike(self, model: Any) -> bool:
        """Whether ``model`` is another one with the same encoder, and hears the same features."""
        if model is self.model or any("teacher_features" in batch for batch in self.batches):
            return False
        own, other = (m.model.encoder.state_dict() for m in (self.model, model))
        return own.keys() == other.keys() and all(
            own[k].dtype == other[k].dtype
            and own[k].device == other[k].device
            and torch.equal(own[k], other[k])
            for k in own
        )

    @torch.no_grad()
    def _hear(self, model: Any, name: str = "input_features") -> list[Tensor]:
        encoder, device = model.model.encoder, model.device
        features = [b.get(name, b["input_features"]).to(device) for b in self.batches]
        return [encoder(x).last_hidden_state for x in features]

    @torch.no_grad()
    def _hear_from(self, first: int) -> list[Tensor]:
        """What the own model hears, its layers before ``first`` being as they were."""
        if not first:
            return self._hear(self.model)
        encoder = self.model.model.encoder
        if self._before is None or self._before[0] != first:
            # Those layers have not changed, so the states can be had now.
            layer = encoder.layers[first]
            features = [b["input_features"].to(self.model.device) for b in self.batches]
            states = [given_to(layer, partial(encoder, x))[0][0] for x in features]
            self._before = first, states
        found = []
        with _only(encoder, first):
            for batch, state in zip(self.batches, self._before[1], strict=True):

                def resume(_: nn.Module, inputs: tuple[Any, ...], state: Tensor = state) -> Any:
                    return (state, *inputs[1:])

                handle = encoder.layers[0].register_forward_pre_hook(resume)
                try:
                    x = batch["input_features"].to(self.model.device)
                    found.append(encoder(x).last_hidden_state)
                finally:
                    handle.remove()
        return found

    @torch.no_grad()
    def _predict(self, model: Any, heard: list[Tensor]) -> list[Tensor]:
        """Log-probabilities of every batch, (tokens, vocabulary) float32."""
        found = []
        for batch, states in zip(self.batches, heard):
            ids, real = batch["decoder_input_ids"], batch.get("decoder_mask")
            last = model.model.decoder(
                input_ids=ids.to(states.device), encoder_hidden_states=states, use_cache=False
            ).last_hidden_state
            rows = last.flatten(0, 1) if real is None else last[real.to(last.device)]
            with torch.autocast(rows.device.type, enabled=False):
                found.append(model.proj_out(rows.float()).log_softmax(-1))
        return found


def _kl(target: Tensor, now: Tensor) -> tuple[float, int]:
    """Σ KL(target ‖ now) over the rows of log-probabilities, and the rows."""
    return float((target.exp() * (target - now)).sum(-1).double().sum()), len(target)


@contextmanager
def _only(stack: Any, first: int) -> Iterator[None]:
    """``stack`` without its layers before ``first``, within the block."""
    kept = stack.layers
    stack.layers = kept[first:]
    try:
        yield
    finally:
        stack.layers = kept


@contextmanager
def changed(layer: nn.Module, matrix: Tensor) -> Iterator[None]:
    """``layer`` with another weight within the block."""
    weight: Any = layer.weight
    kept = weight.data
    weight.data = matrix.view_as(kept).to(kept.dtype)
    try:
        yield
    finally:
        weight.data = kept
