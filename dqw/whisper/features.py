"""Audio to what Whisper's encoder reads: the log-mel spectrogram, as transformers makes it.

Window of 25 ms every 10 ms, mel bins on Slaney's scale, log10, the loudest 8 decades kept. A clip
is padded with zeros to the model's window; only frames that hear the clip are computed, since
silence has a known value. Longer audio is not padded and is taken half a minute at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SILENCE = 1e-10  # energies below count as this
_CHUNK = 500  # frames computed at once: 30 s at once take 10 MB more, three hours 2 GB


@dataclass(frozen=True)
class LogMel:
    """mels: bins. samples: of the model's window. n_fft, hop: samples; rate: Hz. device: where."""

    mels: int = 80
    samples: int = 480_000
    n_fft: int = 400
    hop: int = 160
    rate: int = 16_000
    device: str = "cpu"

    @classmethod
    def of(cls, extractor: Any, device: str = "cpu") -> LogMel:
        """The same as a WhisperFeatureExtractor, or as its settings in JSON."""
        known = extractor if isinstance(extractor, dict) else vars(extractor)
        rate = known["sampling_rate"]
        samples, hop = known["chunk_length"] * rate, known["hop_length"]
        return cls(known["feature_size"], samples, known["n_fft"], hop, rate, device)

    @property
    def frames(self) -> int:
        """Of the model's window."""
        return self.samples // self.hop

    def clips(self, audios: list[np.ndarray]) -> Tensor:
        """Features (clips, mels, frames) float32 of mono clips no longer than the window."""
        if self.device != "cpu":
            return self._clips(audios)
        return torch.cat([self._clips([audio]) for audio in audios])  # each only as far as it goes

    def _clips(self, audios: list[np.ndarray]) -> Tensor:
        heard = min(max(map(len, audios)) + self.n_fft, self.samples)
        padded = torch.zeros(len(audios), heard)
        for row, audio in zip(padded, audios, strict=True):
            row[: len(audio)] = torch.from_numpy(audio)
        log = self._log_mel(padded)
        shape = (len(audios), self.mels, self.frames - log.shape[-1])
        return _normalized(torch.cat([log, log.new_full(shape, np.log10(_SILENCE))], dim=-1))

    def long(self, audio: np.ndarray) -> Tensor:
        """Features (mels, frames) of audio of any length, as many frames as it has."""
        # Hours of it stay where there is more memory; windows are moved as they are heard.
        return _normalized(self._log_mel(torch.from_numpy(audio)[None]))[0].cpu()

    def _log_mel(self, audio: Tensor) -> Tensor:
        """(clips, samples) → (clips, mels, frames)."""
        half = self.n_fft // 2
        audio = audio.to(self.device)
        frames = audio.shape[1] // self.hop
        padded = torch.nn.functional.pad(audio[:, None], (half, half), "reflect")[:, 0]
        window = torch.hann_window(self.n_fft, device=self.device)
        filters = _filters(self.mels, self.n_fft, self.rate).to(self.device)
        parts = []
        for begin in range(0, frames, _CHUNK):
            count = min(_CHUNK, frames - begin)
            at = begin * self.hop
            heard = padded[:, at : at + (count - 1) * self.hop + self.n_fft]
            spectrum = torch.stft(
                heard, self.n_fft, self.hop, window=window, center=False, return_complex=True
            )
            parts.append((filters @ (spectrum.abs() ** 2)).clamp_(min=_SILENCE).log10_())
        return torch.cat(parts, dim=-1)


def silence(features: Tensor) -> float:
    """What silence is in features of this loudness: the quietest that is kept."""
    return float(features.max()) - 2.0


def _normalized(log: Tensor) -> Tensor:
    loudest = log.amax((-2, -1), keepdim=True)  # of each clip
    return torch.maximum(log, loudest - 8.0, out=log).add_(4.0).div_(4.0)


@lru_cache
def _filters(mels: int, n_fft: int, rate: int) -> Tensor:
    """Triangles (mels, n_fft / 2 + 1) float32 over the frequencies up to 8 kHz, of equal area."""
    edges = _hertz(np.linspace(0.0, _mel(8000.0), mels + 2))
    frequencies = np.linspace(0, rate // 2, n_fft // 2 + 1)
    slopes = edges[:, None] - frequencies
    widths = np.diff(edges)[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    areas = 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy((triangles * areas[:, None]).astype(np.float32))


# Slaney's scale: 200 / 3 Hz a mel up to 1 kHz, then 27 mels for a factor of 6.4.
_LINEAR, _KNEE, _STEP = 200 / 3, 1000.0, np.log(6.4) / 27


def _mel(hertz: float) -> float:
    if hertz < _KNEE:
        return hertz / _LINEAR
    return float(_KNEE / _LINEAR + np.log(hertz / _KNEE) / _STEP)


def _hertz(mel: np.ndarray) -> np.ndarray:
    above = _KNEE * np.exp(_STEP * (mel - _KNEE / _LINEAR))
    return np.where(mel < _KNEE / _LINEAR, mel * _LINEAR, above)
