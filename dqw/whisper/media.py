"""Audio within m4a, mp4, webm, mkv, wma and whatever else FFmpeg's libraries read.

They come with PyAV (`pip install 'dqw[media]'`), which dqw does without where it is not installed.
FFmpeg says nothing of a file that was cut off, so what was read is held against the length that mp4
and Matroska state: there a cut is an error, never a shorter transcript. Of the others (caf, avi,
ac3, wma) it states what it found, and their text is that of what is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from dqw.errors import UserError
from dqw.whisper.mono import SAMPLE_RATE, Mono, scaled

SUFFIXES = (
    *(".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".mka"),
    *(".aac", ".ac3", ".wma", ".amr", ".caf", ".avi"),
)
_BEGIN = (
    b"\x1aE\xdf\xa3", b"0&\xb2u", b"caff", b"#!AMR",  # Matroska, wma
    b"\xff\xf1", b"\xff\xf9", b"\x0bw",  # aac, ac3
)  # fmt: skip
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # mp4, from its fourth byte on
_STATES_LENGTH = {"mov", "matroska"}  # by names of FFmpeg's readers; others may have guessed it
_MISSING = 0.5  # seconds: coders pad, and a last picture may state no length
_REACH = 0.2  # seconds that resampling a stretch takes in behind it


def installed() -> bool:
    return importlib.util.find_spec("av") is not None


def recognizes(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of one of these containers. FFmpeg itself
    takes noise for mp3."""
    return head.startswith(_BEGIN) or head[4:8] in _BOXES or head[8:] == b"AVI "


def load(file: BinaryIO, name: str, stop: int | None = None) -> np.ndarray:
    """Mono float32 samples at 16 kHz of the first audio track, `stop` of them at most; None: all.

    Raises UserError naming the file: no audio track, corrupt, cut off.
    """
    parts, rate, found = list[np.ndarray](), 0, 0.0
    mono: Mono | None = None
    for block, block_rate in _blocks(file, name, whole=stop is None):
        if mono is None or block_rate != rate:  # HE-AAC may tell its rate late
            parts += [mono.finish()] if mono else []
            mono, rate = Mono(block_rate, name), block_rate
        mono.add(block)
        found += len(block) / rate
        if stop is not None and found > stop / SAMPLE_RATE + _REACH:
            break
    parts += [mono.finish()] if mono else []
    return np.concatenate(parts)[:stop] if parts else np.zeros(0, np.float32)


def _opened(file: BinaryIO) -> Any:
    import av

    return av.open(file)


def seconds(file: BinaryIO, name: str) -> float:
    """Length of the first audio track, without decoding where the file states it."""
    import av

    try:
        with _opened(file) as container:
            track = _track(container, name)
            if _states_length(container):
                if track.duration:
                    return float(track.duration * track.time_base)
                if len(container.streams) == 1:
                    return container.duration / 1e6
            ends = [_end(packet) for packet in container.demux(track)]
            return max(ends, default=0.0)
    except av.FFmpegError:
        raise _fault(name) from None


def _blocks(file: BinaryIO, name: str, whole: bool) -> Iterator[tuple[np.ndarray, int]]:
    """(frames, channels) float32 and the rate of each. whole: an early end is an error."""
    import av

    end = 0.0
    try:
        with _opened(file) as container:
            track = _track(container, name)
            for packet in container.demux():  # all tracks: pictures may last longer than sound
                if packet.stream is track:
                    for frame in packet.decode():
                        yield _samples(frame), frame.sample_rate
                end = max(end, _end(packet))
            stated = (container.duration or 0) / 1e6 if _states_length(container) else 0.0
    except av.FFmpegError:
        raise _fault(name, end) from None
    if whole and end + _MISSING < stated:
        raise UserError(
            f"{name} is cut off: it states {stated:.1f} s, but ends after {end:.1f}; copy or "
            "encode it again"
        )


def _track(container: Any, name: str) -> Any:
    if not container.streams.audio:
        raise UserError(f"{name} has no audio track; give one that has, or leave it out")
    return container.streams.audio[0]


def _states_length(container: Any) -> bool:
    known = _STATES_LENGTH & set(container.format.name.split(","))
    return bool(known) and bool(container.duration)


def _end(packet: Any) -> float:
    if packet.pts is None:  # the last one, which empties the decoder
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _samples(frame: Any) -> np.ndarray:
    samples = scaled(frame.to_ndarray())
    if frame.format.is_planar:
        return samples.T
    return samples.reshape(-1, frame.layout.nb_channels)


def _fault(name: str, after: float = 0.0) -> UserError:
    """For what FFmpeg said, whose words name no file; ``after``: seconds that it had read."""
    fault = f"is corrupt or cut off after {after:.1f} s"
    if not after:
        fault = "holds no audio that can be read, or is corrupt or cut off"
    return UserError(f"{name} {fault}; copy or encode it again")
