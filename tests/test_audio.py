"""Audio in: every format, rate and channel count; every damaged file one sentence."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from whisper_helpers import tone, write_tone

from dqw.errors import UserError
from dqw.whisper.audio import SAMPLE_RATE, audio_seconds, is_silent, load_audio, load_stretch


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 1), (44_100, 2), (48_000, 2)])
def test_every_format_gives_the_same_sound(tmp_path, suffix, rate, channels):
    path = write_tone(tmp_path / f"a.{suffix}", 1.0, rate, channels)
    audio = load_audio(path)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert abs(len(audio) - SAMPLE_RATE) < 0.01 * SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(audio[:SAMPLE_RATE], SAMPLE_RATE))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert np.std(audio[4000:-4000]) == pytest.approx(0.3 / 2**0.5, rel=0.05)
    assert audio_seconds(path) == pytest.approx(1.0, abs=0.1)


def test_a_wav_at_16_khz_comes_through_exactly(tmp_path):
    wave = tone(0.25)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    assert np.array_equal(load_audio(str(tmp_path / "a.wav")), wave)


def test_channels_are_averaged():
    stereo = np.stack([np.full(800, 0.5), np.full(800, -0.1)], axis=1)
    assert np.allclose(load_audio(stereo, 16_000), 0.2)


def test_arrays_of_any_type_and_rate():
    assert np.allclose(load_audio(np.full(100, -(2**14), dtype=np.int16), 16_000), -0.5)
    assert len(load_audio(tone(1.0, 8_000), 8_000)) == SAMPLE_RATE
    eight_bits = np.array([0, 128, 255], dtype=np.uint8)
    assert load_audio(eight_bits, 16_000).tolist() == [-1.0, 0.0, 127 / 128]
    with pytest.raises(UserError, match=r"the shape \(2, 800\).*transpose"):
        load_audio(np.zeros((2, 800)), 16_000)
    with pytest.raises(UserError, match="rate=… in Hz"):
        load_audio(tone())
    with pytest.raises(UserError, match="0 Hz"):
        load_audio(tone(), 0)
    with pytest.raises(UserError, match="3 dimensions"):
        load_audio(np.zeros((1, 1, 1)), 16_000)


def test_blocks_join_without_a_seam(tmp_path):
    import soxr

    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 70 * 8_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 8_000, subtype="FLOAT")
    whole = soxr.resample(wave, 8_000, SAMPLE_RATE)
    audio = load_audio(tmp_path / "a.wav")
    assert len(audio) == len(whole) and np.abs(audio - whole).max() < 1e-6


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000])
def test_a_stretch_is_that_of_the_whole(tmp_path, suffix, rate):
    if suffix == "opus" and rate == 44_100:
        pytest.skip("opus has no such rate")
    draw, path = np.random.default_rng(0), tmp_path / f"a.{suffix}"
    wave = draw.uniform(-0.5, 0.5, (7 * rate, 2)).astype(np.float32)
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    with soundfile.SoundFile(path, "w", rate, 2, **kind) as file:
        for start in range(0, len(wave), rate):  # a long ogg at once crashes libsndfile
            file.write(wave[start : start + rate])
    whole = load_audio(path)
    for start, stop in ((0, 100), (1, 40_000), (33_333, 66_667), (90_001, len(whole)), (5, 5)):
        part = load_stretch(path, start, stop)
        assert part.dtype == np.float32 and len(part) == stop - start
        error = np.abs(part - whole[start:stop]).max(initial=0)
        assert error <= (0 if rate == 16_000 and suffix != "mp3" else 2e-6)
    with pytest.raises(UserError, match=r"a.* is cut off: it ends 1.00 s early"):
        load_stretch(path, len(whole) - 8_000, len(whole) + 8_000 + 8_000)


def test_silence_is_no_error(tmp_path):
    soundfile.write(tmp_path / "silent.flac", np.zeros(16_000), 16_000)
    assert is_silent(load_audio(tmp_path / "silent.flac"))
    assert not is_silent(tone() * 0.01)


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind.split()[-1]}"
    if kind == "missing x.wav":
        return path
    if kind == "folder x":
        path.mkdir()
    elif kind == "empty x.wav":
        path.touch()
    elif kind == "no-samples x.wav":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "text x.txt":
        path.write_text("hello there, this is no audio at all")
    elif kind.startswith("garbage"):
        path.write_bytes(np.random.default_rng(0).bytes(9000))
    elif kind.startswith("cut"):
        write_tone(path, 2.0, 22_050)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    elif kind.startswith("nan"):
        wave = tone()
        wave[800] = np.nan if kind.startswith("nan") else np.inf
        soundfile.write(path, wave, 16_000, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing x.wav", "does not exist"),
        ("folder x", "is a folder"),
        ("empty x.wav", "is empty"),
        ("no-samples x.wav", "no samples"),
        ("text x.txt", "of a type that can't be read"),
        ("garbage x.wav", "does not hold audio"),
        ("garbage x.flac", "does not hold audio"),
        ("garbage x.mp3", "does not hold audio"),
        ("garbage x.ogg", "does not hold audio"),
        ("cut x.wav", "cut off"),
        ("cut x.flac", "cut off"),
        ("cut x.mp3", "cut off"),
        ("cut x.ogg", "cut off|no samples"),
        ("nan x.wav", "NaN or infinite samples, the first at 0.050 s"),
    ],
)
def test_damaged_files_get_one_sentence_with_their_name(tmp_path, kind, words):
    path = damaged(tmp_path, kind)
    with pytest.raises(UserError, match=words) as caught:
        load_audio(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_ogg_that_lost_its_end(tmp_path):
    path = tmp_path / "a.ogg"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 160_000), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"OggS")])  # whole pages: nothing looks amiss to libsndfile
    with pytest.raises(UserError, match="cut off: its last page is missing"):
        load_audio(path)


def test_an_ogg_whose_last_page_is_cut(tmp_path):
    path = write_tone(tmp_path / "a.ogg", 2.0)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut off: its last page is not whole"):
        load_audio(path)


def test_a_chain_of_oggs_is_read_to_its_end(tmp_path):
    first = write_tone(tmp_path / "a.ogg", 1.0).read_bytes()
    other = write_tone(tmp_path / "b.ogg", 2.0, 44_100, 2).read_bytes()
    (tmp_path / "chain.ogg").write_bytes(first + other + first)
    audio = load_audio(tmp_path / "chain.ogg")
    assert len(audio) == 4 * SAMPLE_RATE and audio_seconds(tmp_path / "chain.ogg") == 4
    assert np.std(audio[-8_000:]) == pytest.approx(0.3 / 2**0.5, rel=0.05)
    (tmp_path / "chain.ogg").write_bytes(first + other[: len(other) // 2])
    with pytest.raises(UserError, match="last page"):
        load_audio(tmp_path / "chain.ogg")


@pytest.mark.parametrize(
    ("form", "endian"),
    [("AIFF", None), ("AIFF", "LITTLE"), ("AU", None), ("RF64", None), ("WAV", "BIG")],
)
def test_what_is_cut_is_seen_before_decoding(tmp_path, form, endian):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 16_000, format=form, endian=endian)
    assert len(load_audio(path)) == SAMPLE_RATE
    path.write_bytes(path.read_bytes()[:20_000])
    for read in (load_audio, audio_seconds):
        with pytest.raises(UserError, match=r"cut off: its header says 320\d\d bytes of samples"):
            read(path)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_flac_from_a_pipe_states_no_length(tmp_path, rate, channels):
    path = tmp_path / "a.flac"
    dice = np.random.default_rng(rate)
    for seconds in (0.001, 0.3, 2.1):
        samples = round(seconds * rate)
        wave = dice.uniform(-0.5, 0.5, (samples, channels)) * dice.uniform(0, 1, (samples, 1))
        soundfile.write(path, wave, rate)
        whole, length = load_audio(path), audio_seconds(path)
        data = bytearray(path.read_bytes())
        data[21] &= 0xF0  # samples, then the sum of all
        data[22:42] = bytes(20)
        path.write_bytes(data)
        assert audio_seconds(path) == length == samples / rate
        assert np.array_equal(load_audio(path), whole)
        path.write_bytes(data[:-1] + b"\xff\xf8\xc9")  # a last word that looks like a frame's first
        for read in (load_audio, audio_seconds):
            with pytest.raises(UserError, match="cut off: its last frame is not whole"):
                read(path)


@pytest.mark.parametrize("stated", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000])
def test_a_streamed_wav_states_no_length_and_is_whole(tmp_path, stated):
    path = write_tone(tmp_path / "a.wav", 0.5)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = stated.to_bytes(4, "little")
    path.write_bytes(data)
    assert len(load_audio(path)) == 8_000


def test_a_wav_whose_length_was_never_written(tmp_path):
    path = write_tone(tmp_path / "a.wav", 0.5)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(UserError, match="says 0 bytes of samples, but 16000 are there"):
        audio_seconds(path)


def test_a_name_that_is_not_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.flac")
    path.write_bytes(write_tone(tmp_path / "a.flac", 0.5).read_bytes())
    assert audio_seconds(path) == 0.5 and len(load_audio(path)) == 8_000


def test_bytes_from_anywhere(tmp_path):
    class Remote:
        def read_bytes(self) -> bytes:
            return write_tone(tmp_path / "a.flac", 0.5).read_bytes()

        def __str__(self) -> str:
            return "row 7 of a dataset"

    assert len(load_audio(Remote())) == 8_000
    Remote.read_bytes = lambda self: b""  # type: ignore[method-assign]
    with pytest.raises(UserError, match="row 7 of a dataset is empty"):
        load_audio(Remote())


@pytest.mark.parametrize("stated", [None, 0])
def test_joined_flacs_are_read_to_their_end(tmp_path, stated, monkeypatch):
    """As `cat a.flac b.flac` makes them, of a pipe or not; at any place."""
    one, two = (write_tone(tmp_path / f"{n}.flac", n, 16_000 // n) for n in (1, 2))
    data = [one.read_bytes(), two.read_bytes()]
    if stated is not None:
        data = [d[:21] + bytes([d[21] & 0xF0]) + bytes(4) + d[26:] for d in data]
    both = tmp_path / "both.flac"
    both.write_bytes(b"".join(data))
    for step in (1 << 24, 1000, len(data[0]) + 3):
        monkeypatch.setattr("dqw.whisper.flac._STEP", step)
        assert audio_seconds(both) == 1.0 and len(load_audio(both)) == 48_000
    alone = np.concatenate([load_audio(one), load_audio(two)])
    np.testing.assert_allclose(load_audio(both), alone, atol=1e-6)
    for start, stop in ((0, 9_000), (12_000, 20_000), (30_000, 48_000)):
        np.testing.assert_allclose(load_stretch(both, start, stop), alone[start:stop], atol=1e-6)
    with pytest.raises(UserError, match="cut off: it ends"):
        load_stretch(one, 12_000, 20_000)


def test_a_wav_that_holds_more_than_its_header_says(tmp_path):
    path = write_tone(tmp_path / "a.wav", 6.0)
    data = path.read_bytes()
    at = data.index(b"data") + 4

    def written(length, more=b""):
        path.write_bytes(data[:at] + struct.pack("<I", length) + data[at + 4 :] + more)
        return path

    whole = len(data) - at - 4
    for load in (load_audio, audio_seconds):
        with pytest.raises(UserError, match=r"a\.wav is cut off: its header says 64000 bytes"):
            load(written(64_000))
        assert load(written(whole)) is not None
        for more in (b"LIST" + struct.pack("<I", 100_000) + bytes(100_000), b"TAG" + bytes(125)):
            load(written(whole, more))
            assert audio_seconds(path) == 6.0
        assert audio_seconds(written(0xFFFFFFFF)) == 6.0
