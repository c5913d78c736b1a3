"""Audio within other containers: m4a, mp4, webm and their like, by PyAV, and without it."""

from pathlib import Path

import numpy as np
import pytest
from whisper_helpers import tone

from dqw.errors import UserError
from dqw.whisper import media
from dqw.whisper.audio import SAMPLE_RATE, audio_seconds, load_audio, load_stretch
from dqw.whisper.data import load_items

av = pytest.importorskip("av")

KINDS = {  # coder, its rate, channels
    "m4a": ("aac", 44_100, 2),
    "mp4": ("aac", 16_000, 1),
    "mov": ("pcm_s16le", 22_050, 2),
    "webm": ("libopus", 48_000, 1),
    "mkv": ("pcm_u8", 8_000, 2),
    "aac": ("aac", 32_000, 1),
    "caf": ("pcm_s32le", 48_000, 2),
}


BLACK = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")


def black(container):
    """A stream of pictures."""
    pictures = container.add_stream("mpeg4", rate=10)
    pictures.width = pictures.height = 16
    pictures.pix_fmt = "yuv420p"
    return pictures


def write_media(path: Path, seconds: float = 2.0, video: bool = False, fast: bool = False) -> Path:
    """A tone; with ``video`` a black picture too. fast: mp4's index comes first."""
    codec, rate, channels = KINDS[path.suffix[1:]]
    layout = "mono" if channels == 1 else "stereo"
    options = {"movflags": "faststart"} if fast else {}
    with av.open(str(path), "w", options=options) as container:
        pictures = black(container) if video else None
        track = container.add_stream(codec, rate=rate, layout=layout)
        if pictures:
            for _ in range(round(10 * seconds) + 5):  # longer than the sound
                container.mux(pictures.encode(BLACK))
            container.mux(pictures.encode(None))
        wave = np.ascontiguousarray(tone(seconds, rate, 2).T)[:channels]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(track.format, layout, rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(track.encode(piece))
        container.mux(track.encode(None))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_sound(tmp_path, kind):
    path = write_media(tmp_path / f"a.{kind}")
    audio = load_audio(path)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert len(audio) == pytest.approx(2 * SAMPLE_RATE, abs=0.15 * SAMPLE_RATE)
    spectrum = np.abs(np.fft.rfft(audio[8000:24_000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert np.std(audio[4000:-6000]) == pytest.approx(0.3 / 2**0.5, rel=0.05)
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.15)
    assert np.array_equal(load_audio(Elsewhere(path)), audio)


class Elsewhere:
    """Bytes from elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_bytes(self) -> bytes:
        return self.path.read_bytes()


@pytest.mark.parametrize("kind", ["m4a", "mkv", "mp4"])
def test_a_stretch_is_that_of_the_whole(tmp_path, kind):
    path = write_media(tmp_path / f"a.{kind}", 5.0)
    whole = load_audio(path)
    for start, stop in ((0, 100), (1, 40_000), (33_333, 66_667), (60_001, len(whole)), (5, 5)):
        part = load_stretch(path, start, stop)
        assert len(part) == stop - start
        assert np.abs(part - whole[start:stop]).max(initial=0) < 2e-6
    with pytest.raises(UserError, match=r"a.* is cut off: it ends 1.00 s early"):
        load_stretch(path, 0, len(whole) + SAMPLE_RATE)


def test_the_sound_of_a_film(tmp_path):
    path = write_media(tmp_path / "a.mp4", video=True)
    assert len(load_audio(path)) == pytest.approx(2 * SAMPLE_RATE, abs=2000)
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.1)
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        pictures = black(container)
        container.mux([*pictures.encode(BLACK), *pictures.encode(None)])
    for read in (load_audio, audio_seconds):
        with pytest.raises(UserError, match=r"mute\.mp4 has no audio track"):
            read(tmp_path / "mute.mp4")


@pytest.mark.parametrize("kind", ["m4a", "mp4", "webm", "mkv"])
@pytest.mark.parametrize("kept", [0.5, 0.75])
def test_what_lost_its_end_is_an_error(tmp_path, kind, kept):
    path = write_media(tmp_path / f"a.{kind}", 5.0, fast=True)
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * kept)])
    with pytest.raises(UserError, match=r"a\.\w+ is .*cut off.* after \d\.\d"):
        load_audio(path)


def test_what_is_no_audio_is_one_sentence(tmp_path):
    path = tmp_path / "a.m4a"
    data = write_media(path).read_bytes()  # whose index comes last
    for content, words in (
        (data[: len(data) // 2], "holds no audio that can be read"),
        (b"\0\0\0\x1cftypM4A " + bytes(300), "holds no audio that can be read"),
        (b"hello " * 50, "does not hold audio"),
    ):
        path.write_bytes(content)
        for read in (load_audio, audio_seconds):
            with pytest.raises(UserError, match=r"a\.m4a " + words) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_without_pyav_the_cure_is_named(tmp_path, monkeypatch):
    write_media(tmp_path / "a.m4a")
    (tmp_path / "b.doc").write_bytes(b"hello " * 50)
    (tmp_path / "c.wav").write_bytes(b"hello " * 50)
    said: list[str] = []
    assert [item.id for item in load_items(tmp_path, limit=1)] == ["a.m4a"]
    monkeypatch.setattr(media, "installed", lambda: False)
    for name, words in (
        ("a.m4a", r"pip install 'dqw\[media\]' \(or ffmpeg"),
        ("b.doc", "of a type that can't be read; give wav, flac, mp3 or ogg"),
        ("c.wav", "does not hold audio; give wav"),
    ):
        with pytest.raises(UserError, match=words):
            load_audio(tmp_path / name)
    (tmp_path / "c.wav").unlink()
    with pytest.raises(UserError, match=r"no audio; 1 files such as a\.m4a.*PyAV"):
        load_items(tmp_path, say=said.append)
