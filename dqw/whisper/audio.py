"""Audio files to what Whisper reads: mono float32 at 16 kHz, or one sentence that says why not.

Reads wav, flac, mp3 and ogg (whatever libsndfile opens) at any rate and channel count, and by
`media` what FFmpeg does. A damaged file is an error, never a shorter transcript. libsndfile itself
stays silent about files that were cut off or that hold more than it reads: `mp3`, `ogg`, `flac`
and `chunks` see to those.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile

from dqw.errors import UserError
from dqw.whisper import chunks, flac, media, mp3, ogg
from dqw.whisper.mono import SAMPLE_RATE, Mono, scaled

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au")
# Below this peak (4 steps of 16 bits, -78 dBFS) a clip holds dither at most, and no speech.
SILENCE_PEAK = 4 / 32768
_REACH = 2  # tenths of a second around a stretch that resampling it takes in
_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd")


class EncodedAudio(Protocol):
    """An audio file that may lie elsewhere than on disk; `Path` is one, too."""

    def read_bytes(self) -> bytes: ...


def load_audio(
    source: str | Path | EncodedAudio | np.ndarray, rate: int | None = None
) -> np.ndarray:
    """Mono float32 samples at 16 kHz, shape (samples,).

    `source`: a path, an object with `read_bytes()`, or an array of shape (samples,) or
    (samples, channels) with its `rate` in Hz. Integer arrays are scaled to [-1, 1), unsigned ones
    around their middle.
    Raises UserError naming the file: missing, empty, no samples, unknown type, corrupt, cut off,
    NaN or infinite samples. Silence is not an error.
    """
    if isinstance(source, np.ndarray):
        if rate is None:
            raise UserError("an array of samples needs its sampling rate; pass rate=… in Hz")
        return _from_array(source, rate)
    with _opened(source) as file:
        return _decode(file, str(source))


def load_stretch(source: str | Path | EncodedAudio, start: int, stop: int) -> np.ndarray:
    """Samples ``start`` to ``stop`` of what ``load_audio`` gives, without decoding the rest.

    At 16 kHz they are the same, after resampling to about 1e-6: what lies up to 0.2 s around is
    resampled with them, as the filter reaches that far. Raises UserError as ``load_audio`` does,
    for damage within the stretch.
    """
    with _opened(source) as file:
        return _stretch(file, str(source), start, stop)


def audio_seconds(source: str | Path | EncodedAudio) -> float:
    """Length in seconds from the headers. Raises UserError as `load_audio` does, but does not
    decode: samples that are damaged, or a flac that was cut off, pass, and of flacs that were
    joined the first one's is told."""
    with _opened(source) as file:
        return _stated_seconds(file, str(source))


def _stated_seconds(file: BinaryIO, name: str) -> float:
    if _is_media(file, name):
        seconds = media.seconds(file, name)
    else:
        try:
            infos = [soundfile.info(stream.file) for stream in _streams(file, name)]
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise _corrupt(name, error) from None
        seconds = sum(info.frames / info.samplerate for info in infos)
    if seconds == 0:
        raise UserError(_no_samples(name))
    return seconds


def readable_suffixes() -> tuple[str, ...]:
    """Names of audio files end so; lower case."""
    return SUFFIXES + (media.SUFFIXES if media.installed() else ())


def is_silent(audio: np.ndarray) -> bool:
    """True where no sample rises above the dither of a 16-bit file."""
    return audio.size == 0 or max(float(audio.max()), -float(audio.min())) < SILENCE_PEAK


def _opened(source: str | Path | EncodedAudio) -> BinaryIO:
    if isinstance(source, str | Path):
        _check_file(Path(source))
        return open(source, "rb")
    data = source.read_bytes()
    if not data:
        raise UserError(_empty(str(source)))
    return io.BytesIO(data)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an audio file; name the files in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a pipe or a device; write the audio to a file first")
    if not path.is_file():
        raise UserError(f"audio file {path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise UserError(_empty(str(path)))


def _is_media(file: BinaryIO, name: str) -> bool:
    """Whether FFmpeg has to read it. Raises UserError for what nobody reads here."""
    head = file.read(12)
    file.seek(0)
    if media.recognizes(head):
        if media.installed():
            return True
        raise UserError(
            f"{name} is of a type that PyAV reads: pip install 'dqw[media]' "
            "(or ffmpeg -i INPUT OUTPUT.wav)"
        )
    mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if not (mpeg or head.startswith(_MAGIC)):
        known = Path(name).suffix.lower() in (*SUFFIXES, *media.SUFFIXES)
        fault = "does not hold audio" if known else "is of a type that can't be read"
        raise UserError(
            f"{name} {fault}; give wav, flac, mp3 or ogg (ffmpeg -i INPUT OUTPUT.wav makes one)"
        )
    return False


def _corrupt(name: str, error: Exception) -> UserError:
    reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
    if "does not exist" in reason:  # libsndfile says so of any file it makes nothing of
        reason = "its content is no audio"
    return UserError(f"{name} is corrupt or cut off ({reason}); copy or encode it again")


def _empty(name: str) -> str:
    return f"audio file {name} is empty (0 bytes); record or copy it again"


def _no_samples(name: str) -> str:
    return f"{name} holds no samples; record it again or leave it out"


def _with_samples(audio: np.ndarray, name: str) -> np.ndarray:
    if audio.size == 0:
        raise UserError(_no_samples(name))
    return audio


def _decode(file: BinaryIO, name: str) -> np.ndarray:
    if _is_media(file, name):
        return _with_samples(media.load(file, name), name)
    audio = [_decode_stream(stream, name) for stream in _streams(file, name, whole=True)]
    return _with_samples(audio[0] if len(audio) == 1 else np.concatenate(audio), name)


@dataclass(frozen=True)
class _Stream:
    """What libsndfile reads to its end. `slack`: so many samples fewer than its header says are
    no damage; None: what the header says proves nothing."""

    file: BinaryIO
    slack: int | None = 0


def _streams(file: BinaryIO, name: str, whole: bool = False) -> list[_Stream]:
    """The streams of a file that stand one after another; nearly always one. UserError where they
    are seen to be cut off without decoding. whole: flacs are read to their end for others."""
    head = file.read(12)
    file.seek(0)
    if head.startswith(b"OggS"):
        data = file.read()
        _refuse_cut(name, ogg.missing(data))
        return [_Stream(io.BytesIO(link)) for link in ogg.links(data)]
    if head.startswith(b"ID3") or head[0] == 0xFF:
        data = file.read()
        parts = mp3.parts(data)
        for part in parts:
            if part.is_cut:
                fault = f"its header says {part.stated} frames, but {part.frames} are there"
                _refuse_cut(name, fault)
        # Two frames of 1152 samples may go to encoder delay and padding.
        found = [_Stream(io.BytesIO(part.encoded()), 2 * 1152) for part in parts]
        return found or [_Stream(io.BytesIO(data), None)]  # layer II, or no mp3 behind the ID3
    _refuse_cut(name, chunks.missing(file))
    file.seek(0)
    if head.startswith(b"fLaC"):
        flacs = flac.parts(file) if whole else [file]
        return [_flac_stream(one, name) for one in flacs]
    return [_Stream(file, None if head.startswith((b"RIF", b"RF64")) else 0)]


def _flac_stream(file: BinaryIO, name: str) -> _Stream:
    stated = flac.states_length(file.read(26))
    file.seek(0)
    if stated:
        return _Stream(file)
    whole = flac.with_length(file.read())
    _refuse_cut(name, "" if whole else "its last frame is not whole")
    return _Stream(io.BytesIO(whole or b""))


def _ends_early(samples: int) -> str:
    return f"it ends {samples / SAMPLE_RATE:.2f} s early"


def _refuse_cut(name: str, fault: str) -> None:
    if fault:
        raise UserError(f"{name} is cut off: {fault}; copy or encode it again")


def _decode_stream(stream: _Stream, name: str) -> np.ndarray:
    """Decode, mix and resample half a minute at a time: a long stereo file never lies in memory
    whole (three hours at 44.1 kHz would be 3.8 GB)."""
    try:
        with soundfile.SoundFile(stream.file) as sound:
            expected = sound.frames
            mono = Mono(sound.samplerate, name)
            while len(block := sound.read(30 * sound.samplerate, "float32", always_2d=True)):
                mono.add(block)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _corrupt(name, error) from None
    if stream.slack is not None and mono.frames + stream.slack < expected:
        fault = f"its header says {expected} samples, but {mono.frames} could be read"
        _refuse_cut(name, fault)
    return mono.finish()


def _stretch(file: BinaryIO, name: str, start: int, stop: int, whole: bool = False) -> np.ndarray:
    if _is_media(file, name):
        found = media.load(file, name, stop)[start:]
        if len(found) < stop - start:
            _refuse_cut(name, _ends_early(stop - start - len(found)))
        return found
    streams = _streams(file, name, whole)
    if len(streams) > 1:  # one after another, perhaps at several rates
        parts = [_decode_stream(stream, name) for stream in streams]
        return np.concatenate(parts)[start:stop]
    try:
        with soundfile.SoundFile(streams[0].file) as sound:
            common = gcd(sound.samplerate, SAMPLE_RATE)
            # Every ``up`` samples at 16 kHz one of them and one of the file's fall together.
            up, down = SAMPLE_RATE // common, sound.samplerate // common
            around = -(-_REACH * SAMPLE_RATE // (10 * up)) if up != down else 0
            first = max(start // up - around, 0)
            last = -(-stop // up) + around
            sound.seek(min(first * down, sound.frames))
            block = sound.read((last - first) * down, "float32", always_2d=True)
            mono = Mono(sound.samplerate, name, first * down)
            mono.add(block)
            found = mono.finish()[start - first * up : stop - first * up]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _corrupt(name, error) from None
    if len(found) < stop - start:
        file.seek(0)
        if not whole and len(_streams(file, name, whole=True)) > 1:
            file.seek(0)
            return _stretch(file, name, start, stop, whole=True)
        _refuse_cut(name, _ends_early(stop - start - len(found)))
    return found


def _from_array(samples: np.ndarray, rate: int) -> np.ndarray:
    if rate <= 0:
        raise UserError(f"the array has a sampling rate of {rate} Hz; give the true rate")
    if samples.ndim not in (1, 2):
        raise UserError(
            f"the array has {samples.ndim} dimensions; give (samples,) or (samples, channels)"
        )
    if samples.ndim == 2 and 0 < samples.shape[0] < samples.shape[1]:
        raise UserError(
            f"the array has the shape {samples.shape}; give (samples, channels), so transpose it"
        )
    mono = Mono(rate, "the array")
    mono.add(scaled(samples.reshape(len(samples), -1)))
    return _with_samples(mono.finish(), "the array")
