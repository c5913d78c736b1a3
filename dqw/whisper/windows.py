"""How a window of 30 s moves along a long recording: OpenAI's sequential algorithm.

A pair of timestamps ends a stretch of speech; the next window begins at the last pair, so that no
word is cut. Where there is no pair, or nothing is said behind the last timestamp, it moves on by
its whole length. The same stretches as transformers' long-form generate, without its fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqw.whisper.decoding import is_time
from dqw.whisper.transcript import TICK

_FRAME = 0.01  # seconds of a frame of the features


@dataclass(frozen=True)
class Stretch:
    """Tokens between two timestamps, these included; start and end in seconds."""

    start: float
    end: float
    tokens: list[int]


class Recording:
    """features: (mels, frames) of all of it. frames: of a window. first: timestamp 0.00's token.
    padding: what stands behind the end; transformers puts zeros there. quiet: whether each second
    is silent; none: no second is known to be."""

    def __init__(
        self,
        features: Tensor,
        frames: int,
        first: int,
        padding: float = 0.0,
        quiet: Sequence[bool] = (),
    ) -> None:
        self.quiet = quiet
        self.features, self.frames, self.first = features, frames, first
        self.padding = padding
        self.at = 0  # frame where the window begins
        self.stretches: list[Stretch] = []

    @property
    def ended(self) -> bool:
        return self.at >= self.features.shape[1]

    @property
    def left(self) -> int:
        """Frames of the window that the recording has."""
        return min(self.features.shape[1] - self.at, self.frames)

    def skip(self) -> int:
        """Move over windows that are silent throughout, where a model would hear what is often said
        last in films; returns the frames that these are."""
        begin, a_second = self.at, round(1 / _FRAME)
        while not self.ended:
            stop = self.at + self.left
            seconds = self.quiet[self.at // a_second : -(-stop // a_second)]
            if not seconds or not all(seconds):
                break
            self.at = stop
        return self.at - begin

    def window(self) -> Tensor:
        """Features (mels, frames) of the window, padded behind the end."""
        part = self.features[:, self.at : self.at + self.frames]
        return torch.nn.functional.pad(part, (0, self.frames - part.shape[1]), value=self.padding)

    def take(self, tokens: list[int]) -> int:
        """Keep what was heard in the window and move it; returns how many frames were heard."""
        left = self.left
        times = [is_time(token, self.first) for token in tokens]
        cuts = [i for i in range(1, len(tokens)) if times[i - 1] and times[i]]
        moved = left
        if cuts:
            all_heard = not times[-2] and times[-1]
            begin = 0
            for cut in [*cuts, len(tokens)] if all_heard else cuts:
                last = cut == cuts[-1] and not all_heard
                self._keep(tokens[begin], tokens[cut - 1], tokens[begin : cut + last])
                begin = cut
            if not all_heard:
                moved = round((tokens[begin - 1] - self.first) * TICK / _FRAME)
        else:
            end = self.first + left // 2
            later = [t for t, timed in zip(tokens, times, strict=True) if timed and t > self.first]
            self._keep(self.first, later[-1] if later else end, tokens)
        moved = moved or left
        self.at += moved
        return min(moved, left)  # a model may hear times in the padding

    def _keep(self, start: int, end: int, tokens: list[int]) -> None:
        offset = self.at * _FRAME
        ticks = (start - self.first) * TICK, (end - self.first) * TICK
        self.stretches.append(Stretch(offset + ticks[0], offset + ticks[1], tokens))
