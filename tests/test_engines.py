"""A packed folder read without transformers says what transformers' model says."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_helpers import needs_library
from speech_helpers import one_thread  # noqa: F401
from test_fast import packed, save_packed
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration
from transformers.generation import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.modeling_whisper import sinusoids as their_sinusoids
from typer.testing import CliRunner
from whisper_helpers import save_tiny, tiny, voices, write_tone

import dqw
from dqw.cli import app
from dqw.errors import UserError
from dqw.recipe import Override, QuantConfig, Recipe
from dqw.whisper.checkpoint import load_whisper, quiet_transformers, save_processor
from dqw.whisper.decoding import LoopGuard, SuppressTokens, TimestampRules
from dqw.whisper.engines import NativeEngine, PlainEngine, open_engine
from dqw.whisper.listener import Listener
from dqw.whisper.native import sinusoids
from dqw.whisper.tokenizer import Pieces
from dqw.whisper.transcribe import iter_transcripts, transcribe
from dqw.whisper.windows import Recording

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed tiny Whisper."""
    return save_packed(tmp_path_factory.mktemp("packed"))


@needs_library
@pytest.mark.parametrize("options", [{}, {"timestamps": True}, {"language": "de"},
                                     {"task": "translate", "batch_size": 2},
                                     {"prompt": "hello we", "timestamps": True}])  # fmt: skip
def test_the_native_engine_says_the_same(folder, options):
    audios = voices(0.4, 0.9, 2.5, 0.2, 3.7, 1.0)
    engine = open_engine(folder)
    assert isinstance(engine, NativeEngine)
    wanted = transcribe(*load_whisper(folder), audios, **options)
    assert dict(iter_transcripts(engine, audios, **options)) == dict(enumerate(wanted))
    assert len({t.text for t in wanted}) > 2 and wanted[2].segments


@needs_library
def test_rules_of_a_checkpoint_hold_for_every_engine(folder, tmp_path):
    """What native decoders do not know is decoded by transformers."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "generation_config.json"
    plain, audios = json.loads(path.read_text()), voices(0.4, 0.9)
    before = dict(iter_transcripts(open_engine(copy), audios, "en"))
    for rule, value, odd in (
        ("no_repeat_ngram_size", 1, True), ("repetition_penalty", 5.0, True),
        ("repetition_penalty", 1.0, False), ("max_new_tokens", 2, True),
    ):  # fmt: skip
        path.write_text(json.dumps(plain | {rule: value}))
        engine = open_engine(copy)
        assert isinstance(engine, NativeEngine) != odd, rule
        found = dict(iter_transcripts(engine, audios, "en"))
        assert (found != before) == odd, rule


@needs_library
def test_detecting_the_language_and_decoding_share_their_keys(folder, monkeypatch):
    made, cross = [], torch.ops.dqw_cpu.decoder_cross

    def counted(*arguments):
        made.append(arguments)
        return cross(*arguments)

    monkeypatch.setattr(torch.ops.dqw_cpu, "decoder_cross", counted)
    assert len(dict(iter_transcripts(open_engine(folder), voices(0.4, 0.5)))) == 2
    assert len(made) == 1


@needs_library
def test_activations_are_chosen_at_the_command_line(folder, tmp_path):
    """For packed models, in every engine that reads them; others are refused in a sentence."""
    write_tone(tmp_path / "a.wav", 0.4)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "hello", "language": "en"}) + "\n")
    for kind, expected in (("auto", "float"), ("float", "float"), ("int8", "int8")):
        for engine in (open_engine(folder, 1, kind), open_engine(folder, 2, kind)):
            layer = engine.model.model.decoder.layers[0].fc1
            assert layer.spec.activations == expected
    commands = ("transcribe", str(tmp_path / "a.wav")), ("eval", "--data", str(manifest))
    plain = save_tiny(tmp_path / "float")

    def said(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    for command in commands:
        assert said(*command, "--model", folder, "--activations", "int8").exit_code == 0
        found = said(*command, "--model", folder, "--activations", "int4")
        assert found.exit_code == 1 and "choose 'float' or 'int8'" in found.output
        found = said(*command, "--model", plain, "--activations", "int8")
        assert found.exit_code == 1 and "leave --activations out" in found.output
    found = said(*commands[1], "--model", "x", "--engine", "openvino", "--activations", "int8")
    assert found.exit_code == 1 and "which openvino does not read" in found.output


@needs_library
def test_levels_beyond_8_bits_need_int8_activations(tmp_path):
    model, processor = tiny(tmp_path)
    rule = Override(match="*conv*", bits=4)
    packed(model, bits=7, activations="int8", override=[rule]).save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    assert isinstance(open_engine(tmp_path), NativeEngine)
    engine = open_engine(tmp_path, activations="float")
    assert isinstance(engine, PlainEngine)
    assert len(dict(iter_transcripts(engine, voices(0.4)))) == 1


@pytest.mark.parametrize("seconds", [1.003, 2.5, 6.2])
def test_long_audio_is_that_of_transformers(tmp_path, seconds):
    """Stretch for stretch what its own long-form generate gives."""
    model, processor = tiny(tmp_path)
    settings = model.generation_config
    first, end = settings.no_timestamps_token_id + 1, settings.eos_token_id
    for audio in voices(seconds, seconds - 0.001):
        inputs = processor.feature_extractor(
            [audio], sampling_rate=RATE, truncation=False, padding="longest",
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        guards = [SuppressTokens((), ()), LoopGuard(end, first)]
        said = model.generate(**inputs, language="en", return_timestamps=True,
                              return_segments=True, logits_processor=guards)  # fmt: skip
        wanted = []
        for part in said["segments"][0]:
            words = [t for t in part["tokens"].tolist() if t < first]
            if processor.tokenizer.decode(words, skip_special_tokens=True).strip():
                # what is heard behind the end stands in its last 0.02 s
                start = min(float(part["start"]), len(audio) / RATE - 0.02)
                stop = min(max(float(part["end"]), start + 0.02), len(audio) / RATE)
                wanted.append((round(start, 2), round(stop, 2)))
        found = transcribe(model, processor, [audio], "en")[0]
        assert [(s.start, s.end) for s in found.segments] == wanted
        tokens = [t for part in said["segments"][0] for t in part["tokens"].tolist() if t < first]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert found.text == text and len(wanted) >= int(seconds)


def test_windows_move_as_those_of_transformers():
    """Random tokens, text and timestamps in any order that the rules allow."""
    first, random = 100, np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        tokens = []
        for time in sorted(random.choice(1500, random.integers(0, 5), replace=False).tolist()):
            tokens += [first + 1 + time] * random.integers(1, 3)
            tokens += random.integers(3, first, random.integers(0, 3)).tolist()
        frames, at = int(random.integers(1, 9000)), int(random.integers(0, 3000))
        at = min(at, frames - 1)
        left = torch.tensor([min(frames - at, 3000)])
        segments, moved = WhisperForConditionalGeneration._retrieve_segment(
            torch.tensor(tokens, dtype=torch.long), [None], torch.tensor([at * 0.01]).double(),
            first, left, 0.02, 0.01, 2, 0, 0, False, torch.zeros(1, 4),
        )  # fmt: skip
        recording = Recording(torch.zeros(80, frames), 3000, first)
        recording.at = at
        assert recording.take(tokens) == min(int(moved), int(left))
        assert recording.at - at == int(moved)
        assert [s.tokens for s in recording.stretches] == [s["tokens"].tolist() for s in segments]
        # Their float32 falls one tick short of the end of 86 of the 3000 lengths.
        for ours, theirs in zip(recording.stretches, segments, strict=True):
            assert ours.start == pytest.approx(float(theirs["start"]), abs=1e-6)
            assert (
                -1e-6
                < ours.end - float(theirs["end"])
                < (0.0201 if ours.tokens == tokens else 1e-6)
            )
        kinds.add((len(segments) > 1, int(moved) == int(left)))
    assert len(kinds) > 2


def test_timestamp_rules_are_those_of_transformers(tmp_path):
    settings = tiny(tmp_path)[0].generation_config
    first, end = settings.no_timestamps_token_id + 1, settings.eos_token_id
    size, begin = first + 51, 3
    random = torch.Generator().manual_seed(0)
    for latest in (None, 10):
        settings.max_initial_timestamp_index = latest
        theirs = WhisperTimeStampLogitsProcessor(settings, begin)
        ours = TimestampRules(first, end, latest, begin)
        for length in range(0, 7):
            text = torch.randint(3, end, (64, begin + length), generator=random)
            times = torch.randint(first, size, text.shape, generator=random).sort(1).values
            chosen = torch.rand(text.shape, generator=random) < 0.5
            ids = torch.where(chosen, times, text)
            scores = 3 * torch.randn(64, size, generator=random)
            given = scores.clone()
            assert torch.equal(ours(ids, scores), theirs(ids, scores))
            assert torch.equal(scores, given)


def test_pieces_are_those_of_the_tokenizer(folder):
    """Any tokens: halves of letters, specials, none."""
    path = folder / "tokenizer.json"
    ours, theirs = Pieces(path), Tokenizer.from_file(str(path))
    random = np.random.default_rng(0)
    words = theirs.encode("hello wörld, 世界 🎉").ids
    for tokens in ([], words, words[:-2], *random.integers(0, theirs.get_vocab_size(), (200, 12))):
        assert ours.text(tokens) == theirs.decode(list(tokens), skip_special_tokens=True)


@needs_library
@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.9])
def test_a_damaged_vocabulary_is_named(folder, tmp_path, kept):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    whole = (other / "tokenizer.json").read_bytes()
    size = kept if isinstance(kept, int) else round(kept * whole.index(b'"merges"'))
    (other / "tokenizer.json").write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"tokenizer.json is damaged .*copy it again"):
        open_engine(other)


@needs_library
@pytest.mark.parametrize("name", ["generation_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]"])
def test_damaged_settings_are_named(folder, tmp_path, name, text):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} (is not JSON|holds no JSON object)"):
        open_engine(other)


def test_positions_are_those_of_transformers():
    for shape in ((1500, 512), (50, 64)):
        assert torch.equal(sinusoids(*shape), their_sinusoids(*shape))


def test_what_is_not_covered_goes_to_transformers(folder, tmp_path):
    assert isinstance(open_engine(save_tiny(tmp_path / "float")), PlainEngine)
    assert isinstance(open_engine(folder, beam_size=2), PlainEngine)
    for name in ("generation_config.json", "processor_config.json"):
        other = tmp_path / name
        shutil.copytree(folder, other)
        settings = json.loads((other / name).read_text())
        part = settings.get("feature_extractor", settings)
        part["dither"] = 0.1
        del settings["lang_to_id" if "lang_to_id" in settings else "processor_class"]
        (other / name).write_text(json.dumps(settings))
        assert isinstance(open_engine(other), PlainEngine)


@pytest.mark.parametrize("quantizes", [True, False])
def test_float_layers_of_a_packed_model_multiply_in_bfloat16(quantizes, monkeypatch, tmp_path):
    """An encoder that stays float, as in the paper. A float model stays exact."""
    model, processor = tiny(tmp_path)
    if quantizes:
        dqw.freeze(dqw.quantize(model, Recipe(QuantConfig(skip=["model.encoder.*"]))))
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    engine, rounds = PlainEngine(model.eval(), processor), []
    model.model.encoder.register_forward_pre_hook(
        lambda *_: rounds.append(torch.is_autocast_enabled("cpu"))
    )
    features = engine.log_mel.clips(voices(0.5))
    with torch.inference_mode():
        states, exact = engine.encode(features), model.get_encoder()(features)[0]
    assert rounds == [quantizes, False]
    assert torch.equal(states, exact) == (not quantizes)
    torch.testing.assert_close(states, exact, rtol=0.05, atol=0.05)


@needs_library
def test_a_folder_that_does_not_fit_its_plan(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"].pop("weights_sha256", None)
    config["decoder_layers"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not hold the weights"):
        open_engine(other)
    config["decoder_layers"] -= 2
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not have"):
        open_engine(other)
    config["quantization_config"]["format_version"] = 99
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="packed format 99"):
        open_engine(other)


@needs_library
def test_the_command_imports_no_transformers(folder, tmp_path):
    code = (
        "import sys; from dqw.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "slow = {'transformers', 'torch._dynamo', 'sympy', 'scipy', 'datasets', 'jiwer'}\n"
        "print(sorted(slow & sys.modules.keys()), file=sys.stderr)"
    )
    audio = write_tone(tmp_path / "a.wav"), write_tone(tmp_path / "b.wav", 2.5)
    arguments = ["transcribe", *map(str, audio), "--model", str(folder), "--language", "en"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    assert str(audio[1]) in done.stdout


@needs_library
def test_what_was_heard_adds_up(folder):
    heard: list[float] = []
    audios = [*voices(0.4, 2.5, 0.2, 3.7), np.zeros(RATE // 2, dtype=np.float32)]
    found = dict(iter_transcripts(open_engine(folder), audios, heard=heard.append))
    assert len(found) == 5 and len(heard) > 5
    assert sum(heard) == pytest.approx(7.3, abs=0.02)


def test_tokens_that_were_added_are_text(folder, tmp_path):
    """Behind the times, too; what is not ASCII stands there as it is, not as letters for bytes."""
    shutil.copytree(folder, tmp_path / "added")
    path = tmp_path / "added" / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    last = max(token["id"] for token in stored["added_tokens"])
    for i, text in enumerate(("dqw", "漢字é")):
        more = {"id": last + 1 + i, "content": text, "special": False}
        stored["added_tokens"].append({**stored["added_tokens"][0], **more})
    path.write_text(json.dumps(stored), encoding="utf-8")
    engine = SimpleNamespace(text=Pieces(path).text)
    listener = Listener.__new__(Listener)
    listener.engine, listener.first_timestamp = engine, last - 1500
    assert listener.text([last - 1500, last + 1, last, last + 2]) == "dqw漢字é"


def test_blocks_of_quiet_may_overlap():
    from transformers.utils import logging

    before = logging.get_verbosity()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # of another thread
    assert logging.get_verbosity() == logging.ERROR
    second.__exit__(None, None, None)
    assert logging.get_verbosity() == before
