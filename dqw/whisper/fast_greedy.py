"""Greedy decoding on the native decoder: the loop, and when a sequence ends.

The greedy half of transformers' ``GenerationMixin._sample``, and the same tokens: around a step of
one or two milliseconds its bookkeeping would cost as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqw.whisper.fast import FastDecoder

if TYPE_CHECKING:
    from dqw.whisper.gpu import Graphs

Processor = Callable[[Tensor, Tensor], Tensor]
"""(ids so far, scores (sequences, vocabulary)) → scores."""


@dataclass(frozen=True)
class Stop:
    """When a sequence ends: at ``length`` tokens, at one of ``ends``, or where ``rest`` (other
    stopping criteria of transformers) says so."""

    length: int | None
    ends: tuple[int, ...]
    rest: tuple[Any, ...] = ()

    @classmethod
    def of(cls, criteria: Any) -> Stop:
        """transformers' StoppingCriteriaList."""
        from transformers.generation import EosTokenCriteria, MaxLengthCriteria

        ends = [c.eos_token_id.flatten() for c in criteria if type(c) is EosTokenCriteria]
        ids = tuple(torch.cat(ends).tolist()) if ends else ()
        known = (EosTokenCriteria, MaxLengthCriteria)
        return cls(criteria.max_length, ids, tuple(c for c in criteria if type(c) not in known))

    def __call__(self, ids: Tensor, scores: list[Tensor]) -> Tensor:
        """Which of the sequences ``ids`` have ended, (sequences,) bool."""
        if self.length is not None and ids.shape[1] >= self.length:
            return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for end in self.ends:
            done |= ids[:, -1] == end
        for criterion in self.rest:
            done |= criterion(ids, tuple(scores) or None)
        return done


@dataclass
class Decoded:
    """ids (sequences, tokens), prompt and padding included; scores and logits of each step, if they
    were asked for (zeros for sequences that had ended)."""

    ids: Tensor
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def greedy(
    decoder: FastDecoder | Graphs,
    states: Tensor,
    prompt: Tensor,
    processors: Sequence[Processor],
    stop: Stop,
    pad: int,
    scores: bool = False,
    logits: bool = False,
    streamer: Any = None,
    bf16: bool = False,
) -> Decoded:
    """Decode ``prompt`` (sequences, tokens), one sequence for each of the encoder's ``states``.

    Sequences that ended leave the batch: the rest is decoded without them. bf16: as in ``Session``.
    """
    count, length = prompt.shape
    longest = stop.length or decoder.positions + 1
    here = prompt.device
    ids = torch.full((count, max(longest, length + 1)), pad, dtype=torch.long, device=here)
    ids[:, :length] = prompt
    found = Decoded(ids)
    session = decoder.session(states, longest, bf16=bf16)
    running = torch.arange(count, device=here)
    new = prompt
    while True:
        step = _for_all(session.step(new), running, count)
        if logits:
            found.logits.append(step.clone())
        for processor in processors:
            step = processor(ids[:, :length], step)
        if scores:
            found.scores.append(step)
        ids[running, length] = _argmax(step)[running]
        if streamer is not None:
            streamer.put(ids[:, length].cpu())
        length += 1
        ended = stop(ids[:, :length], found.scores)[running]
        if bool(ended.all()):
            break
        if bool(ended.any()):
            going = (~ended).nonzero().squeeze(1)
            running = running[going]
            session.keep(going)
        new = ids[running, length - 1 : length]
    if streamer is not None:
        streamer.end()
    found.ids = ids[:, :length].clone()
    return found


def _argmax(scores: Tensor) -> Tensor:
    if scores.is_cuda:
        return scores.argmax(-1)
    # numpy's takes 4 microseconds a row, torch's 77.
    return torch.from_numpy(scores.numpy().argmax(-1))


def _for_all(step: Tensor, running: Tensor, count: int) -> Tensor:
    """Processors know no batch that shrinks: rows for all sequences, zeros for those that ended."""
    if len(running) == count:
        return step
    whole = step.new_zeros(count, step.shape[1])
    whole[running] = step
    return whole
