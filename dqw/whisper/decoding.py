"""What decoding asks of the scores: suppressed tokens, rules of timestamps, no endless loops.

Each is (ids so far, scores (sequences, vocabulary)) → scores, as transformers' logits processors
are, and serves `generate` as one.

The loop guard stops a decoder that repeats itself ("1.1.1.1…"), and the copies are cut. A tail
counts as a loop when a piece of 1 to 32 tokens stands in it at least 4 times over, and in at least
32 tokens. Nobody speaks like that within 30 seconds (refrains of songs come closest), and a greedy
decoder that did it once goes on to its token limit. Other output is left as it is, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LAST_TIME = 1500  # the last timestamp's number, of 30 s
_LONGEST = 32
_COPIES = 4
_SPAN = 32
_EVERY = 8  # steps between two looks; a look costs a copy from the device


@dataclass(frozen=True)
class Rules:
    """What holds for a window's tokens; the processors below keep to it.

    begin: the prompt's length. longest: tokens that a sequence may have, the prompt included.
    always, first: tokens that are suppressed, and those that are as the first one. latest: the
    highest timestamp that may come first, in 0.02 s (None: any).
    """

    begin: int
    longest: int
    end: int
    first_timestamp: int
    always: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    timestamps: bool = False
    latest: int | None = None

    def processors(self) -> list[Any]:
        """The rules, to be called in this order."""
        suppress = SuppressTokens(self.always, self.first)
        suppress.set_begin_index(self.begin)
        guard = LoopGuard(self.end, self.first_timestamp)
        if not self.timestamps:
            return [suppress, guard]
        times = TimestampRules(self.first_timestamp, self.end, self.latest, self.begin)
        return [suppress, times, guard]  # tokens that can't be taken have no say against times


class SuppressTokens:
    """Makes `always` impossible, and `first` as the first token after the prompt.

    The same scores as transformers' two processors, which look for the ids in the whole vocabulary
    at every step: 1.5 ms for 8 rows of 51,865 scores on 2 Zen 4 cores, against 0.03 ms here.
    """

    def __init__(self, always: Sequence[int], first: Sequence[int]) -> None:
        self.always, self.first = torch.tensor(list(always)), torch.tensor(list(first))
        self.begin = 0

    def set_begin_index(self, begin_index: int) -> None:
        """generate says here where the prompt of each window ends."""
        self.begin = begin_index

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.index_fill(1, self._of(self.always, scores), -torch.inf)
        if input_ids.shape[1] == self.begin:
            scores = scores.index_fill(1, self._of(self.first, scores), -torch.inf)
        return scores

    @staticmethod
    def _of(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Those that the vocabulary has: a list may be older than it."""
        return ids[(ids >= 0) & (ids < scores.shape[1])].to(scores.device, torch.long)


class TimestampRules:
    """Whisper's grammar of timestamps: tokens from `first` on, in pairs, never going back.

    The first token is one, at most `max_initial` (in 0.02 s, None: any). A timestamp behind text
    is followed by another one or the end, a pair by text. Where all timestamps together are
    likelier than the likeliest other token, one of them is taken.
    """

    def __init__(self, first: int, end: int, max_initial: int | None, begin: int = 0) -> None:
        self.first, self.end, self.max_initial, self.begin = first, end, max_initial, begin

    def set_begin_index(self, begin_index: int) -> None:
        """Where the prompt ends."""
        self.begin = begin_index

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, past = self.first, self.first + _LAST_TIME + 1  # tokens that were added, if any
        scores = scores.clone()
        scores[:, first - 1] = -torch.inf  # <|notimestamps|>
        if input_ids.shape[1] == self.begin:
            scores[:, :first] = scores[:, past:] = -torch.inf
            if self.max_initial is not None:
                scores[:, first + self.max_initial + 1 :] = -torch.inf
            return scores
        for row, said in zip(scores, input_ids[:, self.begin :].tolist(), strict=True):
            times = [token for token in said if is_time(token, first)]
            timed = is_time(said[-1], first)
            closes = timed and len(said) > 1 and not is_time(said[-2], first)
            if closes:
                row[: self.end] = row[past:] = -torch.inf
            elif timed:
                row[first:past] = -torch.inf
            last = times[-1] if times else first - 1
            row[first : last + (not closes)] = -torch.inf
        top = scores[:, :first].amax(1, keepdim=True)
        if scores.shape[1] > past:
            top = torch.maximum(top, scores[:, past:].amax(1, keepdim=True))
        likelier = scores[:, first:past].logsumexp(1, keepdim=True) > top
        for text in (scores[:, :first], scores[:, past:]):
            text.masked_fill_(likelier, -torch.inf)
        return scores


class LoopGuard:
    """Ends a sequence (only the end token stays possible) once its tail is a loop.

    Greedy and beam search; `input_ids` is (rows, tokens), `scores` (rows, vocabulary).
    """

    def __init__(self, end: int, first_timestamp: int) -> None:
        self.end, self.first_timestamp = end, first_timestamp

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] % _EVERY:
            return scores
        looping = [is_loop(row, self.first_timestamp) for row in input_ids.tolist()]
        if any(looping):
            rows = torch.tensor(looping, device=scores.device)
            scores = scores.clone()
            scores[rows] = -torch.inf
            scores[rows, self.end] = 0.0
        return scores


def is_loop(tokens: Sequence[int], first_timestamp: int) -> bool:
    """Whether the guard ends a sequence of these tokens; it looks at every eighth length."""
    looked_at = len(tokens) % _EVERY == 0
    return looked_at and bool(loop_period(tokens[-_LONGEST * _COPIES :], first_timestamp))


def loop_period(tokens: Sequence[int], first_timestamp: int) -> int:
    """Length of the piece that the tail of `tokens` repeats, or 0. Timestamps count as equal."""
    tokens = _timeless(tokens, first_timestamp)
    for period in range(1, _LONGEST + 1):
        span = period * max(_COPIES, -(-_SPAN // period))
        if span > len(tokens):
            continue
        tail = tokens[-span:]
        if tail[period:] == tail[:-period]:
            return period
    return 0


def is_time(token: int, first_timestamp: int) -> bool:
    """Behind the times stand tokens that somebody added to the vocabulary."""
    return first_timestamp <= token <= first_timestamp + _LAST_TIME


def _timeless(tokens: Sequence[int], first_timestamp: int) -> list[int]:
    return [first_timestamp if is_time(token, first_timestamp) else token for token in tokens]


def cut_loop(tokens: Sequence[int], first_timestamp: int) -> list[int]:
    """`tokens` with one copy left of the loop at its end; unchanged where there is none."""
    period = loop_period(tokens, first_timestamp)
    if not period:
        return list(tokens)
    same = _timeless(tokens, first_timestamp)
    start = len(tokens) - period
    while start and same[start - 1] == same[start - 1 + period]:
        start -= 1
    return list(tokens[: start + period])
