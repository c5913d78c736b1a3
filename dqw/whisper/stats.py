"""Rates with intervals, and which differences are more than chance.

A setting's rate is a sum over clips and seeds: KL nats a token, errors a word or character. It is
drawn 10000 times anew with clips, and seeds where there are several, taken with replacement
(percentile bootstrap). All settings are drawn with the same clips, and the same seeds, which stand
for the same order of the same speech, so that differences are paired; a difference whose 95 %
interval holds zero is a tie; where several are compared with the least, that is the interval of
all of them together. Of three seeds replacement shows too little: what they add is widened
to the interval that Student's t gives them.
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
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %
Cell = Mapping[str, Any]
Cells = Mapping[str, Sequence[Cell]]  # setting's name → its cells, by seed


@dataclass(frozen=True)
class Rate:
    """total / units with its draws, (10000,)."""

    total: float
    units: int
    draws: np.ndarray

    @property
    def value(self) -> float:
        return self.total / self.units

    @property
    def interval(self) -> tuple[float, float]:
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
    drawn = np.concatenate(
        [some.astype(np.float64) @ table for some in np.split(_times_drawn(clips), _PARTS)], axis=1
    )  # (seeds, draws, 2)
    every = drawn.sum(0)
    draws = every[:, 0] / every[:, 1]
    if seeds > 1:
        chosen = np.random.default_rng(seeds).integers(0, seeds, size=(DRAWS, seeds))
        some = drawn[chosen, np.arange(DRAWS)[:, None]].sum(1)
        draws = draws + widening(seeds) * (some[:, 0] / some[:, 1] - draws)
    total, units = table.sum((0, 1))
    return Rate(float(total), int(units), draws)


@lru_cache(maxsize=2)
def _times_drawn(clips: int) -> np.ndarray:
    """(draws, clips), uint8: how often each clip is drawn. 160 MB for 16,000 clips, row by row, as
    the picks of all would take eight times that."""
    dice = np.random.default_rng(0)
    times = np.empty((DRAWS, clips), np.uint8)
    for row in times:
        row[:] = np.bincount(dice.integers(0, clips, size=clips), minlength=clips)
    return times


def widening(seeds: int) -> float:
    """How much wider Student's interval of the mean of ``seeds`` values is than that of drawing
    them with replacement, whose deviation is √((n-1)/n) of theirs and is taken for normal."""
    free = seeds - 1
    student = _STUDENT[free - 1] if free <= len(_STUDENT) else 1.96 + 2.5 / free
    return student / 1.96 * float(np.sqrt(seeds / free))


def difference(first: Rate, second: Rate, among: int = 1) -> Difference:
    """``among``: how many differences shall be within their intervals at once (Bonferroni)."""
    tail = 2.5 / among
    low, high = np.percentile(first.draws - second.draws, [tail, 100 - tail])
    return Difference(first.value - second.value, float(low), float(high))


def verdict(rates: Mapping[str, Rate]) -> tuple[str, list[str], list[str]]:
    """The setting of least rate, those that tie with it, and those that are worse: by intervals of
    95 % for all of these differences together."""
    best = min(rates, key=lambda name: rates[name].value)
    others = [name for name in rates if name != best]
    ties = [name for name in others if difference(rates[name], rates[best], len(others)).tie]
    return best, ties, [name for name in others if name not in ties]
