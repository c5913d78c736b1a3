"""mp3s that libsndfile alone reads in part: joined, changing half way, without a true header."""

import io

import numpy as np
import pytest
import soundfile
from whisper_helpers import tone

from dqw.errors import UserError
from dqw.whisper import mp3
from dqw.whisper.audio import SAMPLE_RATE, audio_seconds, load_audio

COUNT = slice(21, 25)  # of the frames, in the Xing header of a mono MPEG 2 frame


def encoded(wave, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="MP3", bitrate_mode="VARIABLE")
    return file.getvalue()


def without_header(data):
    """The same frames, but for the one that holds the Xing header."""
    second = data.index(data[:2], 4)
    return data[second:]


def with_count(data, frames):
    return data[: COUNT.start] + frames.to_bytes(4, "big") + data[COUNT.stop :]


def seconds(tmp_path, data):
    """What is decoded, and that the length was known before."""
    path = tmp_path / "a.mp3"
    path.write_bytes(data)
    found = len(load_audio(path)) / SAMPLE_RATE
    assert audio_seconds(path) == pytest.approx(found, abs=0.001)
    return found


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_joined_files_are_read_to_the_end(tmp_path, rate, channels):
    one = encoded(tone(2.0, rate, channels), rate)
    assert len(mp3.parts(one)) == 1 and mp3.parts(one)[0].encoded() == one
    assert seconds(tmp_path, one) == 2
    assert seconds(tmp_path, one * 3) == 6


def test_joined_files_of_other_rates_and_channels(tmp_path):
    kinds = ((16_000, 1), (44_100, 2), (16_000, 2))
    data = b"".join(encoded(tone(1.0, rate, channels), rate) for rate, channels in kinds)
    assert seconds(tmp_path, data) == 3
    audio = load_audio(tmp_path / "a.mp3")
    for second in range(3):
        part = audio[second * SAMPLE_RATE :][:SAMPLE_RATE]
        assert np.std(part) == pytest.approx(0.3 / 2**0.5, rel=0.05)
        assert np.abs(np.fft.rfft(part)).argmax() == 440


def test_a_variable_bit_rate_without_a_true_header(tmp_path):
    dice = np.random.default_rng(0)
    loud, quiet = 0.3 * dice.standard_normal(32_000), tone(10.0) * 0.03
    whole = encoded(np.concatenate([loud.clip(-1, 1), quiet]))
    assert seconds(tmp_path, whole) == 12
    bare = without_header(whole)
    assert soundfile.info(io.BytesIO(bare)).frames < 0.6 * 12 * SAMPLE_RATE  # libsndfile's guess
    for data in (bare, with_count(whole, 5), with_count(whole, 0)):
        assert seconds(tmp_path, data) == pytest.approx(12.05, abs=0.05)
        assert np.abs(load_audio(tmp_path / "a.mp3")[-8_000:-4_000]).max() > 0.005
    assert seconds(tmp_path, bare + bare) == pytest.approx(24.1, abs=0.1)


def test_tags_and_rubbish_between_frames_are_passed_over(tmp_path):
    bare = without_header(encoded(tone(2.0)))
    picture = b"ID3\4\0\0" + bytes([0, 0, 4, 0]) + bare[:512]  # frames in a tag are none
    rubbish = np.random.default_rng(0).bytes(5_000)
    alone = seconds(tmp_path, bare)
    for between in (picture, rubbish):
        assert seconds(tmp_path, bare + between + bare) == pytest.approx(2 * alone, abs=0.05)
    assert seconds(tmp_path, picture + bare + b"TAG".ljust(128)) == alone


def test_a_cut_file_behind_a_large_picture(tmp_path):
    whole = encoded(tone(2.0))
    picture = b"ID3\4\0\0" + bytes([0, 8, 0, 0]) + bytes(8 << 14)
    assert seconds(tmp_path, picture + whole) == 2
    for before in (picture, whole):
        (tmp_path / "a.mp3").write_bytes(before + whole[: len(whole) // 2])
        for read in (load_audio, audio_seconds):
            with pytest.raises(UserError, match=r"a\.mp3 is cut off: its header says \d+ frames"):
                read(tmp_path / "a.mp3")


def test_what_is_no_mp3_has_no_parts():
    assert mp3.parts(b"") == mp3.parts(b"\xff\xfb" * 10_000) == []
    assert mp3.parts(b"ID3" + np.random.default_rng(0).bytes(100_000)) == []
