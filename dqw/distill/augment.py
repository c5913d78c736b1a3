"""Waveform augmentation for small data: joined clips, noise, speed; functions of their dice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np

from dqw.distill.config import AugmentConfig


def concatenate_clips(
    wave: np.ndarray,
    text: str,
    others: Iterable[tuple[Callable[[], np.ndarray], str]],
    *,
    pause: int,
    limit: int,
    joint: str,
    fits: Callable[[str], bool],
) -> tuple[np.ndarray, str]:
    """Append clips, `pause` samples of silence before each, while all fit into `limit` samples.

    Stops at the first clip that does not fit, by samples or by `fits(text)`. Returns the waveform
    and the texts joined by `joint`.
    """
    parts, length = [wave], len(wave)
    for load, other_text in others:
        other = load()
        joined = text + joint + other_text.strip()
        if length + pause + len(other) > limit or not fits(joined):
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
