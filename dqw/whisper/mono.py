"""Blocks of decoded audio, of any rate and channels, to one mono array at 16 kHz."""

from __future__ import annotations

import numpy as np
import soxr

from dqw.errors import UserError

SAMPLE_RATE = 16_000


class Mono:
    """Blocks of (frames, channels) float32 in, one mono float32 array at 16 kHz out."""

    def __init__(self, rate: int, name: str, start: int = 0) -> None:
        """start: the frame of the file that comes first."""
        self.rate, self.name, self.frames, self.start = rate, name, 0, start
        self.parts: list[np.ndarray] = []
        self.resampler = None
        if rate != SAMPLE_RATE:
            self.resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def add(self, block: np.ndarray) -> None:
        """Raises UserError for NaN or infinite samples."""
        mono = np.ascontiguousarray(block.mean(axis=1))
        bad = ~np.isfinite(mono)
        if bad.any():
            first = (self.start + self.frames + int(bad.argmax())) / self.rate
            raise UserError(
                f"{self.name} holds NaN or infinite samples, the first at {first:.3f} s; "
                "export it again"
            )
        self.frames += len(mono)
        self.parts.append(self.resampler.resample_chunk(mono) if self.resampler else mono)

    def finish(self) -> np.ndarray:
        if self.resampler and self.frames:
            rest = self.resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
            self.parts.append(rest)
        return np.concatenate(self.parts) if self.parts else np.zeros(0, dtype=np.float32)


def scaled(samples: np.ndarray) -> np.ndarray:
    """float32 of the same shape: integers to [-1, 1), unsigned ones around their middle."""
    if np.issubdtype(samples.dtype, np.integer):
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        centre = half if np.issubdtype(samples.dtype, np.unsignedinteger) else 0
        samples = (samples - centre) / half
    return samples.astype(np.float32, copy=False)
