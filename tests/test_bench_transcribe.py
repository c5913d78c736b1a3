"""The bench of whole clips: the files it writes for whisper.cpp, and figures from clips."""

import struct

import numpy as np
import pytest
import soundfile
from whisper_helpers import tiny, tone

from bench import ggml, transcribe
from dqw.errors import UserError


def engine(short, long, tokens=(30, 80)):
    found = transcribe.Engine("dqw", "int8", None)
    found.seconds = {11: short, 30: long}
    found.tokens = dict(zip((11, 30), tokens, strict=True))
    return found


def test_figures_of_an_engine():
    found = engine([1.0, 1.1, 5.0], [2.1, 2.0, 2.2])
    assert found.clip(11) == 1.1 and found.clip(30) == 2.1
    assert found.per_token == pytest.approx(0.02)
    assert found.once == pytest.approx(1.1 - 30 * 0.02)
    assert engine([1.0], [1.1], tokens=(30, 34)).per_token is None


def asked(tmp_path, **changes):
    given = dict.fromkeys(("float_model", "model", "audio", "openvino", "peers"))
    return transcribe.Asked(**given | {"threads": 1, "quick": True, "folder": tmp_path} | changes)


def test_peers_that_cannot_run_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "find_spec", lambda name: None)
    skipped = {}
    options = asked(tmp_path, model=tmp_path)
    found = transcribe.candidates(options, tmp_path, skipped, print)
    assert {name for name, _, _ in found} == {"dqw", "dqw-plain", "transformers"}
    assert set(skipped) == {"faster-whisper", "whisper.cpp", "openvino-genai"}
    assert "not installed" in skipped["whisper.cpp"]


def test_clips_are_cut_from_a_file(tmp_path):
    file = tmp_path / "talk.wav"
    soundfile.write(file, tone(31), 16_000)
    clips = transcribe.cut(asked(tmp_path, audio=file), tmp_path, print)
    assert [len(np.load(clip)) / 16_000 for clip in clips.values()] == [11, 30]
    soundfile.write(file, tone(5), 16_000)
    with pytest.raises(UserError, match="shorter than 30 s"):
        transcribe.cut(asked(tmp_path, audio=file), tmp_path, print)


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_a_ggml_file_holds_every_tensor(tmp_path, kind):
    model, processor = tiny(tmp_path / "tiny")
    data = ggml.write(tmp_path / "model.bin", model, processor, kind).read_bytes()
    at = 0

    def read(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    magic, *numbers = read("I11i")
    assert magic == 0x67676D6C and numbers[:3] == [model.config.vocab_size, 50, 64]
    mels, bins = read("2i")
    at += 4 * mels * bins
    (pieces,) = read("i")
    words = []
    for _ in range(pieces):
        (length,) = read("i")
        words.append(data[at : at + length])
        at += length
    assert b"hello" in words and b" w" in words and (mels, bins) == (80, 201)
    found = {}
    while at < len(data):
        dimensions, length, tensor_type = read("3i")
        shape = read(f"{dimensions}i")[::-1]
        name = data[at : at + length].decode()
        at += length
        count = int(np.prod(shape))
        size = {0: 4 * count, 1: 2 * count, 2: count // 32 * 18, 8: count // 32 * 34}[tensor_type]
        found[name] = tensor_type, shape, data[at : at + size]
        at += size
    assert len(found) == len(model.state_dict()) - 1  # the projection is the embedding
    assert found["encoder.conv1.bias"][:2] == (0, (64, 1))
    assert found["encoder.ln_post.weight"][0] == found["decoder.positional_embedding"][0] == 0
    number, shape, raw = found["decoder.blocks.1.cross_attn.query.weight"]
    weight = model.model.decoder.layers[1].encoder_attn.q_proj.weight.detach().numpy()
    assert number == ggml.TYPES[kind][0] and shape == weight.shape
    error = np.abs(decoded(raw, number) - weight.ravel()).max()
    assert error < {"f16": 2e-4, "q8_0": 2e-3, "q4_0": 0.04}[kind]


def decoded(raw, number):
    if number == 1:
        return np.frombuffer(raw, np.float16).astype(np.float32)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 34 if number == 8 else 18)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    if number == 8:
        return (rows[:, 2:].view(np.int8) * scale).ravel()
    codes = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=1)
    return ((codes.astype(np.float32) - 8) * scale).ravel()
