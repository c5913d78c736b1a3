"""Speech for the bench of whole clips: stretches of given lengths, and many files.

From a recording, a folder or manifest of clips, or the packaged samples (most likely synthetic
voices) where nothing is named.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dqw.errors import UserError

RATE = 16_000
PIECES = (4, 11, 7, 15, 9)  # seconds of the files that one recording is cut into
LONGEST = 30


def speech(
    source: Path | None, language: str, folder: Path, report: Callable[[str], None]
) -> list[np.ndarray]:
    """Mono clips at 16 kHz: of ``source``, else of the samples, which are kept in ``folder``."""
    from dqw.whisper.audio import SUFFIXES, load_audio

    if source is not None and source.suffix.lower() in SUFFIXES:
        return [load_audio(source)]
    if source is not None:
        from dqw.whisper.data import load_items

        return [item.load() for item in load_items(source, language)]
    from dqw.whisper.samples import fetch_speech_samples

    manifest = fetch_speech_samples(folder / "speech", report)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    names = [row["audio"] for row in rows if row["language"] == language]
    if not names:
        raise UserError(f"the samples have no clip in '{language}': name speech with --audio.")
    return [load_audio(manifest.parent / name) for name in names]


def stretches(clips: list[np.ndarray], lengths: tuple[int, ...], again: bool) -> list[np.ndarray]:
    """The beginning of the joined clips, ``lengths`` seconds each; ``again``: repeat them."""
    whole = np.concatenate(clips)
    longest = max(lengths, default=0) * RATE
    if again:
        whole = np.tile(whole, max(1, -(-longest // len(whole))))
    if len(whole) < longest:
        raise UserError(
            f"--audio holds {len(whole) / RATE:.0f} s: name {longest // RATE} s of speech or more, "
            "or shorter --lengths."
        )
    return [whole[: length * RATE] for length in lengths]


def files(clips: list[np.ndarray], count: int) -> list[np.ndarray]:
    """``count`` clips of at most 30 s: those given, again from the first, or pieces of the one."""
    if len(clips) == 1:
        pieces, at = [], 0
        for seconds in itertools.cycle(PIECES):
            if at >= len(clips[0]) or len(pieces) == count:
                break
            pieces.append(clips[0][at : at + seconds * RATE])
            at += seconds * RATE
        clips = [piece for piece in pieces if len(piece) >= RATE // 10] or clips
    short = [clip for clip in clips if len(clip) <= LONGEST * RATE]
    if not short:
        raise UserError(f"--audio has no clip of at most {LONGEST} s for --files.")
    return list(itertools.islice(itertools.cycle(short), count))
