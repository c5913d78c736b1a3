"""Waveform augmentation for small data: joined clips, noise, speed; functions of their dice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable

import numpy as np

from dqw.distill.config import AugmentConfig
from dqw.errors import UserError
from dqw.whisper.audio import SAMPLE_RATE

# An mp3 may be shorter than its headers say by 2 × 1152 samples, 0.29 s at 8 kHz.
STATED_SLACK = 0.3


def warn_unread(error: UserError) -> None:
    """Say, once a clip, that others stand in for it."""
    warnings.warn(f"{error}. Other clips stand in for it.", RuntimeWarning, stacklevel=3)


def concatenate_clips(
    wave: np.ndarray,
    text: str,
    others: Iterable[tuple[Callable[[], np.ndarray], str, float]],
    *,
    pause: int,
    limit: int,
    joint: str,
    fits: Callable[[str], bool],
) -> tuple[np.ndarray, str]:
    """Append clips, `pause` samples of silence before each, while all fit into `limit` samples.

    others: (what loads it, its text, its length as headers state it, in seconds). Stops at the
    first clip that does not fit, by samples or by `fits(text)`; one that cannot be read is passed
    over. Returns the waveform and the texts joined by `joint`.
    """
    parts, length = [wave], len(wave)
    for load, other_text, seconds in others:
        joined = text + joint + other_text.strip()
        least = int((seconds - STATED_SLACK) * SAMPLE_RATE)  # most that do not fit are not loaded
        if length + pause + least > limit or not fits(joined):
            break
        try:
            other = load()
        except UserError as error:
            warn_unread(error)
            continue
        if length + pause + len(other) > limit:
            break
        parts += [np.zeros(pause, dtype=np.float32), other]
        length += pause + len(other)
        text = joined
    return np.concatenate(parts), text


def perturb(wave: np.ndarray, config: AugmentConfig, dice: random.Random, limit: int) -> np.ndarray:
    """Change speed (and pitch with it) and add white noise, as `config` says.

    A change of speed that would make the clip longer than `limit` samples is left out.
    """
    if config.speed > 0:
        rate = 1 + dice.uniform(-config.speed, config.speed)
        samples = int(len(wave) / rate)
        if 1 < samples <= limit:
            places = np.linspace(0, len(wave) - 1, samples)
            wave = np.interp(places, np.arange(len(wave)), wave).astype(np.float32)
    if dice.random() < config.noise:
        decibels = dice.uniform(*config.noise_snr)
        power = float(np.mean(np.square(wave, dtype=np.float64)))
        noise = np.random.default_rng(dice.getrandbits(64)).standard_normal(len(wave))
        wave = (wave + noise * (power * 10 ** (-decibels / 10)) ** 0.5).astype(np.float32)
    return wave
