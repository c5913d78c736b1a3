"""Audio files to what Whisper reads: mono float32 at 16 kHz, or one sentence that says why not.

Reads wav, flac, mp3 and ogg (whatever libsndfile opens) at any rate and channel count. A damaged
file is an error, never a shorter transcript: libsndfile itself stays silent about a wav or an ogg
that was cut off, so those two are checked here.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr

from dqw.errors import UserError

SAMPLE_RATE = 16_000
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au")
# Below this peak (4 steps of 16 bits, -78 dBFS) a clip holds dither at most, and no speech.
SILENCE_PEAK = 4 / 32768
_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd")
_STREAMED = (0, 0xFFFFFFFF)  # data sizes that a writer to a pipe leaves in a wav header


class EncodedAudio(Protocol):
    """An audio file that may lie elsewhere than on disk; `Path` is one, too."""

    def read_bytes(self) -> bytes: ...


def load_audio(
    source: str | Path | EncodedAudio | np.ndarray, rate: int | None = None
) -> np.ndarray:
    """Mono float32 samples at 16 kHz, shape (samples,).

    `source`: a path, an object with `read_bytes()`, or an array of shape (samples,) or
    (samples, channels) with its `rate` in Hz. Integer arrays are scaled to [-1, 1).
    Raises UserError naming the file: missing, empty, no samples, unknown type, corrupt, cut off,
    NaN or infinite samples. Silence is not an error.
    """
    if isinstance(source, np.ndarray):
        if rate is None:
            raise UserError("an array of samples needs its sampling rate; pass rate=… in Hz")
        return _prepare(source, rate, "the array")
    if isinstance(source, str | Path):
        path = Path(source)
        _check_file(path)
        return _prepare(*_decode(path.read_bytes(), str(path)), str(path))
    name = str(source)
    return _prepare(*_decode(source.read_bytes(), name), name)


def audio_seconds(path: str | Path) -> float:
    """Length in seconds from the header alone. Raises UserError as `load_audio` does, but does not
    decode: a file cut off in the middle may pass."""
    _check_file(Path(path))
    with open(path, "rb") as file:
        _check_type(file.read(12), str(path))
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _corrupt(str(path), error) from None
    if info.frames == 0:
        raise UserError(_no_samples(str(path)))
    return info.frames / info.samplerate


def is_silent(audio: np.ndarray) -> bool:
    """True where no sample rises above the dither of a 16-bit file."""
    return audio.size == 0 or float(np.abs(audio).max()) < SILENCE_PEAK


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an audio file; name the files in it")
    if not path.is_file():
        raise UserError(f"audio file {path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"audio file {path} is empty (0 bytes); record or copy it again")


def _check_type(head: bytes, name: str) -> None:
    mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if not (head.startswith(_MAGIC) or mpeg):
        known = Path(name).suffix.lower() in SUFFIXES
        fault = "does not hold audio" if known else "is of a type that can't be read"
        raise UserError(
            f"{name} {fault}; give wav, flac, mp3 or ogg (ffmpeg -i INPUT OUTPUT.wav makes one)"
        )


def _corrupt(name: str, error: Exception) -> UserError:
    reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
    return UserError(f"{name} is corrupt or cut off ({reason}); copy or encode it again")


def _no_samples(name: str) -> str:
    return f"{name} holds no samples; record it again or leave it out"


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """(frames, channels) float32 and the rate in Hz."""
    if not data:
        raise UserError(f"audio file {name} is empty (0 bytes); record or copy it again")
    _check_type(data[:12], name)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            expected, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _corrupt(name, error) from None
    missing = _missing_part(data, expected, len(samples))
    if missing:
        raise UserError(f"{name} is cut off: {missing}; copy or encode it again")
    return samples, rate


def _missing_part(data: bytes, expected: int, decoded: int) -> str:
    """What a truncated file lacks, in words, or ""."""
    if data[:4] == b"RIFF":
        return _missing_wav(data)
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        if last + 5 < len(data) and not data[last + 5] & 4:  # no end-of-stream flag
            return "its last page is missing"
    elif data[:3] == b"ID3" or data[0] == 0xFF:
        # Without a Xing/Info frame the length of an mp3 is an estimate, and proves nothing. Two
        # frames of 1152 samples may go to encoder delay and padding.
        tagged = b"Xing" in data[:65536] or b"Info" in data[:65536]
        if not tagged or decoded + 2 * 1152 >= expected:
            return ""
    if decoded < expected:
        return f"its header says {expected} samples, but {decoded} could be read"
    return ""


def _missing_wav(data: bytes) -> str:
    """Compare the data chunk's stated size with what the file holds (libsndfile adjusts it)."""
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"data":
            there = len(data) - at - 8
            if size in _STREAMED or there >= size:
                return ""
            return f"its header says {size} bytes of samples, but {there} are there"
        at += 8 + size + size % 2
    return "it has no samples after its header"


def _prepare(samples: np.ndarray, rate: int, name: str) -> np.ndarray:
    if rate <= 0:
        raise UserError(f"{name} has a sampling rate of {rate} Hz; give the true rate")
    if samples.ndim not in (1, 2):
        raise UserError(
            f"{name} has {samples.ndim} dimensions; give (samples,) or (samples, channels)"
        )
    if samples.size == 0:
        raise UserError(_no_samples(name))
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min or -1)
    audio = np.asarray(samples, dtype=np.float32)
    if audio.ndim == 2:
        audio = audio.mean(axis=1)
    bad = ~np.isfinite(audio)
    if bad.any():
        first = int(bad.argmax()) / rate
        raise UserError(
            f"{name} holds {int(bad.sum())} NaN or infinite samples, the first at {first:.3f} s; "
            "export it again"
        )
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
        if audio.size == 0:
            raise UserError(_no_samples(name))
    return np.ascontiguousarray(audio, dtype=np.float32)
