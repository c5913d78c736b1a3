"""A model's next-token distributions on speech, and how far changed weights are from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dqw.catch import given_to
from dqw.devices import multiplied


class Changed(NamedTuple):
    """The first layers that are not as they were. encoder: 0 also for what comes before its layers,
    None if all of it is as it was; decoder: 0 also for the embedding."""

    encoder: int | None
    decoder: int
    embedding: bool = False  # whether it, and so the output projection, differs


EVERYTHING = Changed(0, 0, True)
KL_ROWS = 16  # of 51865 numbers, 3 MB


def first_changed(names: Iterable[str]) -> Changed:
    """Where the model differs if the layers ``names`` do."""
    found: dict[str, list[int]] = {"encoder": [], "decoder": []}
    embedding = False
    for name in names:
        place = re.match(r"model\.(encoder|decoder)\.layers\.(\d+)\.", name)
        stack = "encoder" if name.startswith("model.encoder.") else "decoder"
        found[stack].append(int(place[2]) if place else 0)
        embedding |= stack == "decoder" and not place
    encoder = min(found["encoder"], default=None)
    decoder = 0 if encoder is not None else min(found["decoder"], default=0)
    return Changed(encoder, decoder, embedding)


class Probe:
    """A float model's next-token distributions on ``batches``, to compare changed weights with, or
    other models. A batch's ``teacher_features``, where it has them, are what the float model hears.

    What does not change is not worked out again: encoder outputs are kept, and the states before
    the layer of each stack that was asked for last.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model.eval(), batches
        self.heard = self._hear(model, "teacher_features")
        self.rows = self._decode(model, self.heard)
        self.target = [_log_probabilities(model, rows) for rows in self.rows]
        self._spread: Tensor | None = None
        self._before: dict[str, tuple[int, list[Tensor]]] = {}

    def kl(self, first: Changed = EVERYTHING) -> float:
        """Mean KL(float ‖ now) of the model as it is now, in nats a token."""
        pairs = self.by_batch(first=first)
        return max(sum(kl for kl, _ in pairs), 0.0) / sum(tokens for _, tokens in pairs)

    def by_batch(self, model: Any = None, first: Changed = EVERYTHING) -> list[tuple[float, int]]:
        """(sum of KL(float ‖ ``model``) over tokens, tokens) of each batch; None: the own model,
        which is the float one before the layers ``first``."""
        if model is not None:
            heard = self.heard if self._hears_alike(model) else self._hear(model.eval())
            rows = self._decode(model, heard)
        else:
            model = self.model
            heard = self.heard if first.encoder is None else self._hear_from(first.encoder)
            begins = first.encoder is None and not first.embedding  # as it did
            rows = self._decode(model, heard, first.decoder if begins else 0)
        if model is self.model and not first.embedding:
            moved = (now - before for now, before in zip(rows, self.rows))
            return [_kl_of_shift(t, self._shift(m)) for t, m in zip(self.target, moved)]
        return [_kl(t, _log_probabilities(model, r)) for t, r in zip(self.target, rows)]

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

    def _hear_from(self, first: int) -> list[Tensor]:
        """What the own model hears, its layers before ``first`` being as they were."""
        if not first:
            return self._hear(self.model)
        encoder = self.model.model.encoder
        features = [b["input_features"].to(self.model.device) for b in self.batches]
        return self._resumed("encoder", first, [partial(encoder, x) for x in features])

    @torch.no_grad()
    def _resumed(self, name: str, first: int, passes: Sequence[Callable[[], Any]]) -> list[Tensor]:
        """The last states of a stack's ``passes``, one a batch, with the states before its layer
        ``first``, 1 or more, from an earlier call: they must be what they were."""
        stack = getattr(self.model.model, name)
        if self._before.get(name, (0, []))[0] != first:
            # Those layers have not changed, so the states can be had now.
            layer = stack.layers[first]
            self._before[name] = first, [given_to(layer, run)[0][0] for run in passes]
        found = []
        with _only(stack, first):
            for run, state in zip(passes, self._before[name][1], strict=True):

                def resume(_: nn.Module, inputs: tuple[Any, ...], state: Tensor = state) -> Any:
                    return (state, *inputs[1:])

                handle = stack.layers[0].register_forward_pre_hook(resume)
                try:
                    found.append(run().last_hidden_state)
                finally:
                    handle.remove()
        return found

    @torch.no_grad()
    def _decode(self, model: Any, heard: list[Tensor], first: int = 0) -> list[Tensor]:
        """The decoder's last states of every batch's tokens, (tokens, width) float32. first: as in
        ``_resumed``, for the own model."""
        device = model.device  # the states of another model may have been made elsewhere
        passes = [
            partial(
                model.model.decoder,
                input_ids=batch["decoder_input_ids"].to(device),
                encoder_hidden_states=multiplied(states.to(device)),  # once, not in every layer
                use_cache=False,
            )
            for batch, states in zip(self.batches, heard)
        ]
        if first:
            found = self._resumed("decoder", first, passes)
        else:
            found = [run().last_hidden_state for run in passes]
        masks = [batch.get("decoder_mask") for batch in self.batches]
        return [
            (last.flatten(0, 1) if real is None else last[real.to(last.device)]).float()
            for last, real in zip(found, masks)
        ]

    @torch.no_grad()
    def _shift(self, moved: Tensor) -> Tensor:
        """By how much logits change, but for what all of a token's have in common, where the last
        states have ``moved``; in what autocast says, as its rounding is small beside the change
        itself, though not beside the logits."""
        if self._spread is None:
            weight = self.model.proj_out.weight.float()
            kind = weight.device.type
            lower = torch.is_autocast_enabled(kind)
            spread = weight - weight.mean(0)
            self._spread = spread.to(torch.get_autocast_dtype(kind)) if lower else spread
        with torch.autocast(moved.device.type, enabled=False):
            return nn.functional.linear(moved.to(self._spread.dtype), self._spread)


@torch.no_grad()
def _log_probabilities(model: Any, rows: Tensor) -> Tensor:
    """(tokens, vocabulary), float32."""
    with torch.autocast(rows.device.type, enabled=False):
        logits: Tensor = model.proj_out(rows)
    return logits.log_softmax(-1)


def _kl(target: Tensor, now: Tensor) -> tuple[float, int]:
    """Σ KL(target ‖ now) over the rows of log-probabilities, and the rows."""
    now = now.to(target.device)
    return float((target.exp() * (target - now)).sum(-1).double().sum()), len(target)


def _kl_of_shift(target: Tensor, shift: Tensor) -> tuple[float, int]:
    """The same for logits that differ by ``shift``: Σ log E[e^(shift - E[shift])], by the target's
    probabilities. Nothing large is subtracted, so a tiny change is as precise as its shift. Some
    rows at a time, which stay in the cache."""
    total = 0.0
    for some, moved in zip(target.split(KL_ROWS), shift.split(KL_ROWS)):
        p, moved = some.exp(), moved.float()
        whole = p.sum(-1, keepdim=True)  # 1 but for rounding
        moved = moved - (p * moved).sum(-1, keepdim=True) / whole
        rows = ((p * moved.expm1()).sum(-1) / whole[:, 0]).log1p()
        if not rows.isfinite().all():  # beyond e^88
            rows = (some + moved).logsumexp(-1) - some.logsumexp(-1)
        total += float(rows.double().sum())
    return total, len(target)


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
