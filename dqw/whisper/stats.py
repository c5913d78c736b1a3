"""Rates with intervals, and which differences are more than chance.

A setting's rate is a sum over clips and seeds: KL nats a token, errors a word or character. It is
drawn 10000 times anew, with clips taken with replacement (bootstrap). Of a few clips, and of seeds,
replacement shows too little, above all in the tails that many comparisons need: there errors of the
mean are drawn from Student's t, in pairs of either sign. All settings are drawn with the same clips
and the same seeds, which stand for the same order of the same speech, so that differences are
paired. A difference whose 95 % interval holds zero is a tie; in a verdict that is the interval of
all pairs together, as the least is chosen by the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dqw.whisper.scoring import metric_of

DRAWS = 10_000
_PARTS = 20  # in which they are multiplied, as float64
_FEW = 100  # clips up to which the mean's error is Student's
Cell = Mapping[str, Any]
Cells = Mapping[str, Sequence[Cell]]  # setting's name → its cells, by seed


@dataclass(frozen=True)
class Rate:
    """total / units with its draws, (10000,)."""

    total: float
    units: int
    clips: int
    draws: np.ndarray

    @property
    def value(self) -> float:
        return self.total / self.units

    @property
    def interval(self) -> tuple[float, float]:
        """95 %; of one clip, which tells nothing, NaN."""
        if self.clips < 2:
            return np.nan, np.nan
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return max(float(low), 0.0), float(high)


@dataclass(frozen=True)
class Difference:
    """first − second, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        return self.low <= 0 <= self.high


def counts(cell: Cell, metric: str, language: str | None = None) -> np.ndarray:
    """(clips, 2) float64 of (KL or errors, tokens or units) of one cell: metric KL, WER or CER."""
    if metric == "KL":
        rows = cell["kl"]
    else:
        rows = [
            (errors, units)
            for code, errors, units in cell["clips"]
            if metric_of(code) == metric and units and language in (None, code)
        ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def rate(cells: Sequence[Cell], metric: str, language: str | None = None) -> Rate | None:
    """The rate over the cells of one setting, which differ in their seed; None: no such clips."""
    tables = [counts(cell, metric, language) for cell in cells]
    if not tables or not len(tables[0]):
        return None
    table = np.stack(tables)  # (seeds, clips, 2)
    seeds, clips, _ = table.shape
    total, units = table.sum((0, 1))
    draws = np.full(DRAWS, total / units)
    every = table.sum(0)
    if clips > _FEW:
        parts = np.split(_times_drawn(clips), _PARTS)
        drawn = np.concatenate([some.astype(np.float64) @ every for some in parts])
        draws = drawn[:, 0] / drawn[:, 1]
    elif clips > 1:
        # To first order: what each clip takes the rate away from itself, times the clips.
        draws += _students(clips, "clips") @ (
            clips * (every[:, 0] - total / units * every[:, 1]) / units
        )
    if seeds > 1:
        own = table.sum(1)
        draws += _students(seeds, "seeds") @ (own[:, 0] / own[:, 1])
    return Rate(float(total), int(units), clips, draws)


@lru_cache(maxsize=16)
def _students(count: int, what: str) -> np.ndarray:
    """(draws, count): what weighs ``count`` values to give their mean's error: Student's t with
    count - 1 degrees of freedom times its standard error. Every draw has one of the other sign.
    what: seeds or clips, which err by chances of their own."""
    dice, free = np.random.default_rng([count, len(what), ord(what[0])]), count - 1
    normal = dice.standard_normal((DRAWS // 2, count))
    normal -= normal.mean(1, keepdims=True)
    spread = np.sqrt(dice.chisquare(free, (DRAWS // 2, 1)) / free)
    weights = normal / spread / np.sqrt(count * free)
    return np.concatenate([weights, -weights])


@lru_cache(maxsize=2)
def _times_drawn(clips: int) -> np.ndarray:
    """(draws, clips), uint8: how often each clip is drawn. 160 MB for 16,000 clips, row by row, as
    the picks of all would take eight times that."""
    dice = np.random.default_rng(0)
    times = np.empty((DRAWS, clips), np.uint8)
    for row in times:
        row[:] = np.bincount(dice.integers(0, clips, size=clips), minlength=clips)
    return times


def difference(first: Rate, second: Rate, among: int = 1) -> Difference:
    """``among``: how many differences shall be within their intervals at once (Bonferroni). Of one
    clip the interval has no ends."""
    if min(first.clips, second.clips) < 2:
        return Difference(first.value - second.value, -np.inf, np.inf)
    tail = 2.5 / among
    low, high = np.percentile(first.draws - second.draws, [tail, 100 - tail])
    return Difference(first.value - second.value, float(low), float(high))


def verdict(rates: Mapping[str, Rate]) -> tuple[str, list[str], list[str]]:
    """The setting of least rate, those that tie with it, and those that are worse: by intervals of
    95 % for the differences of all pairs together."""
    pairs = len(rates) * (len(rates) - 1) // 2
    best = min(rates, key=lambda name: rates[name].value)
    others = [name for name in rates if name != best]
    ties = [name for name in others if difference(rates[name], rates[best], pairs).tie]
    return best, ties, [name for name in others if name not in ties]
