"""Audio files to what Whisper reads: mono float32 at 16 kHz, or one sentence that says why not.

Reads wav, flac, mp3 and ogg (whatever libsndfile opens) at any rate and channel count. A damaged
file is an error, never a shorter transcript: libsndfile itself stays silent about a wav or an ogg
that was cut off, so those two are checked here.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO, Protocol

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
        return _from_array(source, rate)
    if isinstance(source, str | Path):
        _check_file(Path(source))
        with open(source, "rb") as file:
            return _decode(file, str(source))
    data, name = source.read_bytes(), str(source)
    if not data:
        raise UserError(_empty(name))
    return _decode(io.BytesIO(data), name)


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
        raise UserError(_empty(str(path)))


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
    if "does not exist" in reason:  # libsndfile says so of any file it makes nothing of
        reason = "its content is no audio"
    return UserError(f"{name} is corrupt or cut off ({reason}); copy or encode it again")


def _empty(name: str) -> str:
    return f"audio file {name} is empty (0 bytes); record or copy it again"


def _no_samples(name: str) -> str:
    return f"{name} holds no samples; record it again or leave it out"


def _decode(file: BinaryIO, name: str) -> np.ndarray:
    """Decode, mix and resample half a minute at a time: a long stereo file never lies in memory
    whole (three hours at 44.1 kHz would be 3.8 GB)."""
    _check_type(file.read(12), name)
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            expected = sound.frames
            mono = _Mono(sound.samplerate, name)
            while len(block := sound.read(30 * sound.samplerate, "float32", always_2d=True)):
                mono.add(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _corrupt(name, error) from None
    missing = _missing_part(file, expected, mono.frames)
    if missing:
        raise UserError(f"{name} is cut off: {missing}; copy or encode it again")
    return mono.finish()


def _missing_part(file: BinaryIO, expected: int, decoded: int) -> str:
    """What a truncated file lacks, in words, or ""."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(65536)
    if head[:4] == b"RIFF":
        return _missing_wav(file, size)
    if head[:4] == b"OggS":
        file.seek(max(0, size - 131072))  # a page has at most 65,307 bytes
        tail = file.read()
        last = tail.rfind(b"OggS")
        if last >= 0 and last + 5 < len(tail) and not tail[last + 5] & 4:  # no end-of-stream flag
            return "its last page is missing"
    # Without a Xing/Info frame the length of an mp3 is an estimate, and proves nothing. Two frames
    # of 1152 samples may go to encoder delay and padding.
    mp3 = head[:3] == b"ID3" or head[0] == 0xFF
    if mp3 and (not (b"Xing" in head or b"Info" in head) or decoded + 2 * 1152 >= expected):
        return ""
    if decoded < expected:
        return f"its header says {expected} samples, but {decoded} could be read"
    return ""


def _missing_wav(file: BinaryIO, size: int) -> str:
    """Compare the data chunk's stated size with what the file holds (libsndfile adjusts it)."""
    at = 12
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            there = size - at - 8
            if length in _STREAMED or there >= length:
                return ""
            return f"its header says {length} bytes of samples, but {there} are there"
        at += 8 + length + length % 2
    return "it has no samples after its header"


def _from_array(samples: np.ndarray, rate: int) -> np.ndarray:
    if rate <= 0:
        raise UserError(f"the array has a sampling rate of {rate} Hz; give the true rate")
    if samples.ndim not in (1, 2):
        raise UserError(
            f"the array has {samples.ndim} dimensions; give (samples,) or (samples, channels)"
        )
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / (float(np.iinfo(samples.dtype).max) + 1)
    mono = _Mono(rate, "the array")
    mono.add(samples.reshape(len(samples), -1).astype(np.float32, copy=False))
    return mono.finish()


class _Mono:
    """Blocks of (frames, channels) float32 in, one mono array at 16 kHz out."""

    def __init__(self, rate: int, name: str) -> None:
        self.rate, self.name, self.frames = rate, name, 0
        self.parts: list[np.ndarray] = []
        self.resampler = None
        if rate != SAMPLE_RATE:
            self.resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def add(self, block: np.ndarray) -> None:
        mono = np.ascontiguousarray(block.mean(axis=1))
        bad = ~np.isfinite(mono)
        if bad.any():
            first = (self.frames + int(bad.argmax())) / self.rate
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
        audio = np.concatenate(self.parts) if self.parts else np.zeros(0, dtype=np.float32)
        if audio.size == 0:
            raise UserError(_no_samples(self.name))
        return audio
