"""Long recordings as windows that the models hear at once, cut at quiet places.

Where to cut is found in the samples, so the recording is decoded whole, once: cut points are kept
as JSON Lines, one recording a line, and a later start reads them and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dqw.distill.data import SpeechItem
from dqw.rows import append_rows, read_rows
from dqw.whisper.audio import SAMPLE_RATE


@dataclass(frozen=True)
class Window:
    """A stretch of a long clip, samples `start` to `stop`; an item of its own, without text."""

    source: SpeechItem
    start: int
    stop: int
    text: str | None = None
    samples: np.ndarray | None = None  # float16: to read them, the source is decoded whole

    @property
    def id(self) -> str:
        return f"{self.source.id}@{self.start}"

    @property
    def language(self) -> str | None:
        return self.source.language

    @property
    def seconds(self) -> float:
        return (self.stop - self.start) / SAMPLE_RATE

    def load(self) -> np.ndarray:
        if self.samples is not None:
            return self.samples.astype(np.float32)
        load_part = getattr(self.source, "load_part", None)  # another's items may have none
        if load_part is not None:
            part: np.ndarray = load_part(self.start, self.stop)
            return part
        return self.source.load()[self.start : self.stop]

    def held(self, wave: np.ndarray) -> Window:
        """The same with its samples in memory; ``wave``: all of its source's."""
        return replace(self, samples=wave[self.start : self.stop].astype(np.float16))


def windows(
    item: SpeechItem, seconds: float = 30.0, wave: np.ndarray | None = None
) -> list[Window]:
    """Cut a long clip into windows of at most `seconds`, at quiet places. wave: its samples, where
    they are at hand."""
    wave = item.load() if wave is None else wave
    longest = int(seconds * SAMPLE_RATE)
    made: list[Window] = []
    start = 0
    while len(wave) - start > longest:
        stop = start + quiet_place(wave[start : start + longest], int(seconds / 6 * SAMPLE_RATE))
        made.append(Window(item, start, stop))
        start = stop
    made.append(Window(item, start, len(wave)))
    return made


def quiet_place(wave: np.ndarray, search: int) -> int:
    """The middle of the quietest 0.2 s within the last `search` samples of `wave`."""
    size = SAMPLE_RATE // 5
    first = max(len(wave) - max(search, size), 0)
    power = np.square(wave[first:], dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(power)])
    energy = sums[size:] - sums[:-size]
    return first + int(energy.argmin()) + size // 2


class Cuts:
    """`windows` of recordings, from ``path`` where they were cut before.

    A line: {"id", "seconds" (the recording's), "window" (at most that many seconds), "cuts"
    (samples, the first 0, the last the end)}. A recording of another length is cut anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, float, float], list[int]] = {}
        what = "a recording's cut points: delete the file, and they are found again."
        for row in read_rows(path, ("id", "seconds", "window", "cuts"), what):
            self._known[row["id"], row["seconds"], row["window"]] = row["cuts"]

    def windows(self, item: SpeechItem, length: float, seconds: float) -> list[Window]:
        """`windows` of ``item``, which is ``length`` seconds long. Raises UserError where it has to
        be decoded and cannot be."""
        key = item.id, round(length, 3), seconds
        cuts = self._known.get(key)
        if cuts is None:
            made = windows(item, seconds)
            cuts = self._known[key] = [0, *(window.stop for window in made)]
            row = dict(zip(("id", "seconds", "window"), key, strict=True)) | {"cuts": cuts}
            append_rows(self.path, [row])
        return [Window(item, start, stop) for start, stop in pairwise(cuts)]
