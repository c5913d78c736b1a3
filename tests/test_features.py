"""Log-mel features against transformers' feature extractor."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from dqw.whisper.features import LogMel, silence


def voice(samples: int) -> np.ndarray:
    random = np.random.default_rng(samples)
    return (0.1 * random.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("chunk", [1, 30])
def test_clips_are_those_of_transformers(mels, chunk):
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=chunk)
    window = 16_000 * chunk
    audios = [voice(n) for n in (1, 159, 400, 15_600, 15_841, window - 1, window) if n <= window]
    audios.append(np.zeros(3_000, dtype=np.float32))
    wanted = extractor(audios, sampling_rate=16_000, return_tensors="pt")["input_features"]
    found = LogMel.of(extractor).clips(audios)
    assert found.shape == wanted.shape and LogMel.of(extractor).frames == wanted.shape[-1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert torch.equal(found, LogMel.of(extractor.to_dict()).clips(audios))
    together = LogMel.of(extractor)._clips(audios)  # as on a GPU: all as far as the longest goes
    torch.testing.assert_close(together, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("samples", [480_001, 481_000, 16_000 * 95 + 77])
def test_long_audio_is_that_of_transformers(samples):
    extractor = WhisperFeatureExtractor()
    audio = voice(samples)
    options = {"truncation": False, "padding": "longest", "return_tensors": "pt"}
    wanted = extractor([audio], sampling_rate=16_000, **options)["input_features"][0]
    found = LogMel.of(extractor).long(audio)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_silence_is_what_clips_are_padded_with():
    log_mel, audio = LogMel(), 100 * voice(20_000)
    audio[8_000:12_000] = 0
    clip = log_mel.clips([audio])[0]
    assert clip[:, -1].tolist() == pytest.approx([silence(clip)] * 80)
    assert silence(log_mel.long(audio)) == pytest.approx(silence(clip))
