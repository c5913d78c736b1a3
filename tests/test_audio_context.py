"""Dynamic audio context: what a clip's context is, and that both engines, the folder and the
commands agree on it."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_helpers import BF16_SETS, float_products, instruction_set, needs_library, tolerance
from speech_helpers import Noise, clips, one_thread, tiny_model, tiny_processor  # noqa: F401
from test_fast import TIERS, packed, plain
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner
from whisper_helpers import tiny, voices, write_tone

from dqw.cli import app
from dqw.errors import UserError
from dqw.whisper import context
from dqw.whisper.checkpoint import load_whisper, save_processor
from dqw.whisper.context import AudioContext, narrowed
from dqw.whisper.engines import NativeEngine, PlainEngine, open_engine
from dqw.whisper.fast import Session, fast_decoder, fast_encoder
from dqw.whisper.transcribe import iter_transcripts, transcribe
from dqw.whisper.windows import Recording

RATE = 16_000
SMALL = AudioContext(min_seconds=0.2, margin_seconds=0.1, step_seconds=0.1)  # for windows of 1 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed tiny Whisper whose config.json says that it learned SMALL."""
    path = tmp_path_factory.mktemp("dynamic")
    model, processor = tiny(path)
    model.config.audio_context = SMALL.to_dict()
    packed(model).save_pretrained(path)
    save_processor(processor, path)
    return path


# ---- how much is heard ----


def test_a_context_is_the_clip_and_a_margin_in_steps():
    heard = AudioContext(min_seconds=2, margin_seconds=1, step_seconds=2)
    lengths = [0.1, 1.0, 1.01, 3.0, 3.001, 11.0, 11.02, 26.9, 28.0, 30.0]
    assert [heard.positions(s, 1500) / 50 for s in lengths] == [2, 2, 4, 4, 6, 12, 14, 28, 30, 30]
    for seconds in np.linspace(0, 30, 200):
        most, least = heard.positions(seconds, 1500), heard.drawn(seconds, 1500, 0.0)
        drawn = [heard.drawn(seconds, 1500, dice) for dice in (0.0, 0.3, 0.999)]
        assert drawn == sorted(drawn) and least <= most <= max(drawn[-1] + 1, 100)
        assert least >= min(50 * (seconds + 1), 1500) and max(drawn) <= 1500


@pytest.mark.parametrize("stored", [
    "dynamic", {}, {"min_seconds": 2.0}, {**SMALL.to_dict(), "more": 1},
    {**SMALL.to_dict(), "step_seconds": "2"}, {**SMALL.to_dict(), "margin_seconds": -1.0},
])  # fmt: skip
def test_an_entry_that_is_not_known(stored):
    with pytest.raises(UserError, match=r"audio_context is .*install the dqw that wrote it"):
        AudioContext.of({"audio_context": stored})


def test_no_entry_is_the_whole_window(tmp_path):
    assert AudioContext.of({}) is AudioContext.of(SimpleNamespace()) is None
    model, processor = tiny(tmp_path)
    assert PlainEngine(model, processor).context is None
    assert AudioContext.of({"audio_context": SMALL.to_dict()}) == SMALL


# ---- the encoder ----


def by_hand(encoder, features):
    """The encoder's layers one after the other on as many positions as there are."""
    x = torch.nn.functional.gelu(encoder.conv1(features))
    x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


def test_a_narrowed_encoder_hears_the_first_positions():
    model = tiny_model()
    encoder, features = model.model.encoder, torch.randn(2, 80, 100)
    with torch.no_grad():
        whole = encoder(features).last_hidden_state
        for positions in (1, 7, 33, 49, 50):
            cut = features[..., : 2 * positions]
            with narrowed(encoder, positions):
                found = encoder(cut).last_hidden_state
            torch.testing.assert_close(found, by_hand(encoder, cut))
        assert torch.equal(found, whole)
        with pytest.raises(ValueError, match="100"):
            encoder(features[..., :14])  # not outside, and not after an error inside
        with pytest.raises(ValueError, match="14"), narrowed(encoder, 7):
            encoder(features)
        assert torch.equal(encoder(features).last_hidden_state, whole)
    assert encoder.config is model.config and model.config.max_source_positions == 50


@needs_library
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_native_states_at_any_length(tier, activations):
    model = packed(tiny_model(), activations=activations)
    encoder, features = model.model.encoder, torch.randn(2, 80, 100)
    for positions in (1, 2, 15, 31, 32, 33, 47, 50):
        cut = features[..., : 2 * positions]
        with instruction_set(tier), torch.inference_mode():
            found, wanted = fast_encoder(encoder)(cut), by_hand(encoder, cut)
            with narrowed(encoder, positions):
                assert torch.equal(encoder(cut).last_hidden_state, found)
            alone = fast_encoder(encoder)(cut[1:])
            # int8: which way a tie of the activations' rounding falls is chance.
            share = 2e-5 if activations == "float" else 2e-2
            run = partial(by_hand, encoder, cut)
            limits = [tolerance(encoder, run, wanted, share, bf16) for bf16 in (False, True)]
            lowered = fast_encoder(encoder)(cut, bf16=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=limits[0])
        torch.testing.assert_close(lowered, wanted, rtol=0, atol=limits[1])
        assert tier in BF16_SETS or torch.equal(lowered, found)
        assert torch.equal(alone[0], found[1])


@needs_library
def test_an_encoder_takes_no_more_than_its_positions():
    network = fast_encoder(packed(tiny_model()).model.encoder)
    with pytest.raises(RuntimeError, match="longer than the 50 positions"):
        network(torch.randn(1, 80, 102))
    with pytest.raises(RuntimeError, match="even number of frames"):
        network(torch.randn(1, 80, 33))
    assert network(torch.randn(1, 80, 0)).shape == (1, 0, 64)


def last_logits(model, features, ids):
    states = by_hand(model.model.encoder, features)
    return model(decoder_input_ids=ids, encoder_outputs=(states,)).logits[:, -1]


@needs_library
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_decoder_after_a_short_context(tier, bf16):
    """Encoder and decoder together against transformers' modules."""
    model = packed(tiny_model())
    ids = torch.randint(3, 250, (2, 6))
    for positions in (1, 13, 29, 50):
        cut = torch.randn(2, 80, 2 * positions)
        with instruction_set(tier), torch.inference_mode():
            states = fast_encoder(model.model.encoder)(cut, bf16)
            session = Session(fast_decoder(model), states, 16, cross_type="float32", bf16=bf16)
            found = session.step(ids)
            run = partial(last_logits, plain(model), cut, ids)
            wanted = run()
            limit = tolerance(model, run, wanted, 4e-5, bf16)
        torch.testing.assert_close(found, wanted, rtol=0, atol=limit)


# ---- transcribing ----


def heard_by(engine, monkeypatch):
    """(clips, positions) of each call of the engine's encoder."""
    seen: list[tuple[int, int]] = []
    encode = engine.encode

    def spy(features):
        seen.append((len(features), features.shape[-1] // 2))
        return encode(features)

    monkeypatch.setattr(engine, "encode", spy)
    return seen


def engine_of(folder, native):
    return open_engine(folder) if native else PlainEngine(*load_whisper(folder))


@needs_library
@pytest.mark.parametrize("native", [True, False])
def test_a_text_does_not_depend_on_its_batch(folder, native, monkeypatch):
    engine = engine_of(folder, native)
    assert isinstance(engine, NativeEngine) == native and engine.context == SMALL
    audios = voices(0.31, 0.52, 0.33, 0.95, 0.05, 0.38, 0.2)
    seen = heard_by(engine, monkeypatch)
    together = dict(iter_transcripts(engine, audios, "en"))
    assert sorted(seen) == [(1, 10), (1, 15), (1, 35), (1, 50), (3, 25)]
    seen.clear()
    alone = {i: next(iter_transcripts(engine, [a], "en"))[1] for i, a in enumerate(audios)}
    assert alone == together and [n for _, n in seen] == [25, 35, 25, 50, 10, 25, 15]
    seen.clear()
    full = dict(iter_transcripts(engine, audios, "en", audio_context="full"))
    assert seen == [(7, 50)] and full != together


@needs_library
@pytest.mark.parametrize("options", [{}, {"timestamps": True}, {"language": None, "batch_size": 2}])
def test_both_engines_say_the_same(folder, options, monkeypatch):
    monkeypatch.setattr(
        "dqw.devices.fast_precision", lambda *_: "float32"
    )  # of transformers' encoder
    audios = voices(0.31, 0.52, 0.33, 0.05, 1.4, 2.25, 2.7)
    options = {"language": "en", **options}
    with float_products():
        found = dict(iter_transcripts(open_engine(folder), audios, **options))
        model, processor = load_whisper(folder)
        assert found == dict(enumerate(transcribe(model, processor, audios, **options)))
        plainly = load_whisper(folder)[0]
        plainly.__class__ = WhisperForConditionalGeneration
        plainly.model.encoder.__class__ = type(tiny_model().model.encoder)
        assert found == dict(enumerate(transcribe(plainly, processor, audios, **options)))


def test_beams_and_float_models_hear_short_contexts(tmp_path, monkeypatch):
    model, processor = tiny(tmp_path)
    model.config.audio_context = SMALL.to_dict()
    engine = PlainEngine(model, processor)
    seen = heard_by(engine, monkeypatch)
    audios = voices(0.31, 0.52)
    beams = dict(iter_transcripts(engine, audios, "en", beam_size=3))
    assert sorted(n for _, n in seen) == [25, 35] and beams[0].text
    with torch.inference_mode():
        cut = engine.log_mel.clips(audios[:1])[..., :50]
        states = by_hand(model.model.encoder, cut)
    ids = engine.generate(states, ["en"], num_beams=3, do_sample=False, task="transcribe")
    assert engine.text(ids[0].tolist()).strip() == beams[0].text


@needs_library
def test_only_the_last_window_of_a_recording_is_short(folder, monkeypatch):
    engine = open_engine(folder)
    seen = heard_by(engine, monkeypatch)
    padding = []
    window = Recording.window
    monkeypatch.setattr(Recording, "window", lambda r: padding.append(r.padding) or window(r))
    audios = voices(2.25, 1.4, 3.1)
    found = dict(iter_transcripts(engine, audios, "en"))
    lengths = [n for count, n in seen for _ in range(count)]
    assert lengths.count(50) > len(audios) and min(lengths) < 50
    assert all(n in range(10, 51, 5) for n in lengths)
    assert -2 < max(padding) < 0  # silence, as behind the clips of the training
    for index, audio in enumerate(audios):
        assert next(iter_transcripts(engine, [audio], "en"))[1] == found[index]


def test_the_context_is_one_of_two(folder):
    with pytest.raises(UserError, match="audio context is 'short'; choose auto or full"):
        next(iter_transcripts(open_engine(folder), voices(0.3), audio_context="short"))


# ---- the folder and the commands ----


@needs_library
def test_generate_takes_whole_windows_as_ever(folder, tmp_path):
    """transformers' own way is not changed by the entry, which a saved folder keeps."""
    model, processor = load_whisper(folder)
    batch = processor.feature_extractor(
        voices(0.31, 0.52), sampling_rate=RATE, return_tensors="pt"
    )["input_features"]
    ids = model.generate(batch, language="en")
    del model.config.audio_context
    assert torch.equal(model.generate(batch, language="en"), ids)
    model, _ = load_whisper(folder)
    model.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert AudioContext.of(again.config) == SMALL
    assert json.loads((tmp_path / "config.json").read_text())["audio_context"] == SMALL.to_dict()


@needs_library
def test_the_commands(folder, tmp_path):
    write_tone(tmp_path / "a.wav", 0.4)
    row = {"audio": "a.wav", "text": "hello", "language": "en"}
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps(row) + "\n")

    def said(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    options = ("--model", folder, "--audio-context")
    heard = {c: said("transcribe", tmp_path / "a.wav", *options, c) for c in context.CHOICES}
    assert heard["auto"] != heard["full"]
    figures = {}
    for choice in context.CHOICES:
        path = tmp_path / f"{choice}.json"
        said("eval", "--data", manifest, *options, choice, "--json", path)
        figures[choice] = json.loads(path.read_text())
        assert figures[choice]["audio_context"] == choice
    for command in ("transcribe", tmp_path / "a.wav"), ("eval", "--data", manifest):
        result = CliRunner().invoke(app, [*map(str, command), *map(str, options), "short"])
        assert result.exit_code == 1 and "choose auto or full" in result.output
    assert "audio context: dynamic (the clip and 0.1 s, at least 0.2 s" in said("info", folder)
    assert json.loads(said("info", folder, "--json"))["audio_context"] == SMALL.to_dict()


def test_a_compressed_student_carries_the_entry(tmp_path):
    from whisper_helpers import save_tiny

    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    rows = []
    for i in range(3):
        write_tone(tmp_path / f"{i}.wav", 0.4 + 0.1 * i)
        rows.append({"audio": f"{i}.wav", "text": "hello", "language": "en"})
    data: Path = tmp_path / "manifest.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[distill]\naudio_context = "dynamic"\n[train]\nsteps = 2\nbatch_size = 2\n')
    options = ["--teacher", base, "--data", data, "--recipe", recipe, "--out", out]
    result = CliRunner().invoke(app, ["compress", *map(str, options)])
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["audio_context"] == AudioContext().to_dict()
    assert open_engine(out).context == AudioContext()
    assert "audio_context" not in json.loads((base / "config.json").read_text())
