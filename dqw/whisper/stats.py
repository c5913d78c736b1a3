"""Rates with intervals, and which differences are more than chance.

A setting's rate is a sum over clips and seeds: KL nats a token, errors a word or character. It is
drawn 1000 times anew with clips, and seeds where there are several, taken with replacement
(percentile bootstrap). All settings are drawn with the same clips, so that differences are paired;
a difference whose 95 % interval holds zero is a tie.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqw.whisper.scoring import metric_of

DRAWS = 1000
Cell = Mapping[str, Any]
Cells = Mapping[str, Sequence[Cell]]  # setting's name → its cells, by seed


@dataclass(frozen=True)
class Rate:
    """total / units with its draws, (1000,)."""

    total: float
    units: int
    draws: np.ndarray

    @property
    def value(self) -> float:
        return self.total / self.units

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return float(low), float(high)


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
    dice = np.random.default_rng(0)
    picks = dice.integers(0, clips, size=(DRAWS, clips))
    weight = np.stack([np.bincount(row, minlength=clips) for row in picks]).astype(np.float64)
    drawn = weight @ table  # (seeds, draws, 2)
    if seeds > 1:  # each setting's seeds are drawn by themselves
        dice = np.random.default_rng(zlib.crc32(str(cells[0]["setting"]).encode()))
        chosen = dice.integers(0, seeds, size=(DRAWS, seeds))
        drawn = drawn[chosen, np.arange(DRAWS)[:, None]].sum(1)[None]
    total, units = table.sum((0, 1))
    return Rate(float(total), int(units), drawn[0, :, 0] / drawn[0, :, 1])


def difference(first: Rate, second: Rate) -> Difference:
    low, high = np.percentile(first.draws - second.draws, [2.5, 97.5])
    return Difference(first.value - second.value, float(low), float(high))


def verdict(rates: Mapping[str, Rate]) -> tuple[str, list[str], list[str]]:
    """The setting of least rate, those that tie with it, and those that are worse."""
    best = min(rates, key=lambda name: rates[name].value)
    others = [name for name in rates if name != best]
    ties = [name for name in others if difference(rates[name], rates[best]).tie]
    return best, ties, [name for name in others if name not in ties]
