"""Engines of other packages, with stand-ins for the packages: what they are asked, what is read."""

import json
import struct
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner
from whisper_helpers import save_tiny, tiny, tone, write_tone

import dqw
from bench import ggml
from dqw.cli import app
from dqw.errors import UserError
from dqw.whisper import rivals
from dqw.whisper.checkpoint import load_whisper, save_processor
from dqw.whisper.rivals import RIVALS, open_rival, rival_bytes
from dqw.whisper.transcribe import transcribe

SAID = "Good morning, colour"


class Pipe:
    """openvino_genai.WhisperPipeline"""

    def __init__(self, folder, device, **options):
        self.asked = [options]

    def generate(self, audio, **options):
        assert isinstance(audio, np.ndarray)
        self.asked.append(options)
        return SimpleNamespace(texts=[f" {SAID}"], languages=["de"])


class CppModel:
    """pywhispercpp.model.Model"""

    _ctx = 7

    def __init__(self, model, params_sampling_strategy=0, **options):
        self.asked = [{"strategy": params_sampling_strategy, **options}]

    def transcribe(self, audio, **options):
        if len(audio) == 0:
            raise RuntimeError("no samples\nat line 3")
        self.asked.append(options)
        return [SimpleNamespace(text=part) for part in SAID.split(" ")]


class FasterModel:
    """faster_whisper.WhisperModel"""

    def __init__(self, folder, **options):
        if "bad" in folder:
            raise ValueError("unsupported model")
        self.asked = [options]

    def transcribe(self, audio, **options):
        self.asked.append(options)
        parts = [SimpleNamespace(text=f" {word}") for word in SAID.split(" ")]
        return iter(parts), SimpleNamespace(language=options["language"] or "de")


class Batched:
    """faster_whisper.BatchedInferencePipeline: the second part says nothing."""

    def __init__(self, model):
        self.model = model

    def transcribe(self, audio, clip_timestamps, **options):
        self.model.asked.append(options)
        assert clip_timestamps[-1]["end"] == pytest.approx(len(audio) / 16_000)
        found = [
            SimpleNamespace(start=part["start"], end=part["end"], text=f" part {i}")
            for i, part in enumerate(clip_timestamps)
            if i != 1
        ]
        return iter(found), None


def module(name, **members):
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


@pytest.fixture
def packages(monkeypatch):
    native = module("_pywhispercpp", whisper_full_lang_id=lambda context: context - 5,
                    whisper_lang_str=["en", "zh", "de"].__getitem__)  # fmt: skip
    for made in (
        module("openvino_genai", WhisperPipeline=Pipe),
        module("faster_whisper", WhisperModel=FasterModel, BatchedInferencePipeline=Batched),
        module("pywhispercpp", __path__=[]), module("pywhispercpp.model", Model=CppModel),
        native,
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, made.__name__, made)


@pytest.fixture
def models(tmp_path):
    """A file or folder that each engine takes for its own."""
    head = struct.pack("<I11i", 0x67676D6C, *range(1, 12)) + struct.pack("<2i2f", 1, 2, 0.5, 0.5)
    pieces = struct.pack("<i", 2) + struct.pack("<i", 3) + b"abc" + struct.pack("<i", 0)
    (tmp_path / "ggml.bin").write_bytes(head + pieces + b"weights")
    for folder, name in (("ct2", "model.bin"), ("ov", "openvino_encoder_model.xml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"weights")
    return {
        "whisper.cpp": tmp_path / "ggml.bin",
        "faster-whisper": tmp_path / "ct2",
        "openvino": tmp_path / "ov",
    }


STUBBED = ("whisper.cpp", "faster-whisper", "openvino")


def asked(rival):
    return (rival.pipe if hasattr(rival, "pipe") else rival.model).asked


@pytest.mark.parametrize("name", STUBBED)
def test_a_clip_is_heard_without_timestamps(packages, models, name):
    rival = open_rival(name, models[name], threads=2)
    assert rival.hear(tone(1.0), "en") == (SAID, "en")
    last = asked(rival)[-1]
    assert last["language"] == ("<|en|>" if name == "openvino" else "en")
    without = {"whisper.cpp": ("no_timestamps", True), "openvino": ("return_timestamps", False),
               "faster-whisper": ("without_timestamps", True)}[name]  # fmt: skip
    assert last[without[0]] is without[1]
    rival.hear(tone(31.0), "en")
    assert asked(rival)[-1][without[0]] is not without[1]
    assert 2 in asked(rival)[0].values()  # threads


@pytest.mark.parametrize("name", STUBBED)
def test_the_language_is_found_where_none_is_given(packages, models, name):
    rival = open_rival(name, models[name], threads=1)
    assert rival.hear(tone(1.0), None) == (SAID, "de")
    assert asked(rival)[-1].get("language") in (None, "auto")


def test_beams_are_asked_for(packages, models):
    found = {name: open_rival(name, models[name], 1, beam_size=5) for name in STUBBED}
    for rival in found.values():
        rival.hear(tone(1.0), "en")
    assert asked(found["openvino"])[-1]["num_beams"] == 5
    assert asked(found["faster-whisper"])[-1]["beam_size"] == 5
    assert asked(found["whisper.cpp"])[0]["strategy"] == 1
    assert asked(found["whisper.cpp"])[-1]["beam_search"]["beam_size"] == 5


def test_faster_whisper_batches_clips_as_parts_of_one_recording(packages, models):
    rival = open_rival("faster-whisper", models["faster-whisper"], threads=1)
    audios = [tone(seconds) for seconds in (1.0, 0.5, 2.0, 0.3)]
    assert rival.hear_all(audios, "en", 8) == ["part 0", "", "part 2", "part 3"]
    assert asked(rival)[-1]["batch_size"] == 8
    assert rival.hear_all(audios[:1], "en", 8) == rival.hear_all(audios, "en", 1)[:1] == [SAID]
    assert rival.hear_all([], "en", 8) == []
    assert [name for name, rival in RIVALS.items() if rival.batches] == ["faster-whisper"]


def test_what_is_not_installed_is_named_with_the_cure(monkeypatch, models):
    for name, package in (("whisper.cpp", "pywhispercpp"), ("faster-whisper", "faster-whisper"),
                          ("openvino", "openvino-genai")):  # fmt: skip
        monkeypatch.setitem(sys.modules, RIVALS[name].module.split(".")[0], None)
        monkeypatch.delitem(sys.modules, "pywhispercpp.model", raising=False)
        with pytest.raises(UserError, match=f"needs {package}; pip install {package}$"):
            open_rival(name, models[name], threads=1)


def test_a_package_that_lacks_another_is_not_called_missing(monkeypatch, models):
    def broken(name):
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr(rivals.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"does not work here .*'av'.*upgrade faster-whisper"):
        open_rival("faster-whisper", models["faster-whisper"], threads=1)


def test_models_that_do_not_fit(packages, models, tmp_path):
    with pytest.raises(UserError, match=r"choose dqw, whisper\.cpp, faster-whisper, openvino"):
        open_rival("whisper", models["openvino"], threads=1)
    for name in STUBBED:
        with pytest.raises(UserError, match="does not exist"):
            open_rival(name, tmp_path / "nowhere", threads=1)
        with pytest.raises(UserError, match=f"no model for {name}, which reads"):
            open_rival(name, tmp_path, threads=1)
        with pytest.raises(UserError, match="beam size is 0"):
            open_rival(name, models[name], threads=1, beam_size=0)
    bad = models["faster-whisper"].rename(tmp_path / "bad")
    with pytest.raises(UserError, match=r"could not load .*unsupported model"):
        open_rival("faster-whisper", bad, threads=1)


def test_sizes_leave_the_tokenizer_out(models, tmp_path):
    whole = models["whisper.cpp"].read_bytes()
    assert rival_bytes(models["whisper.cpp"]) == len(whole) - 4 - 4 - 3 - 4
    assert rivals.ggml_vocabulary_bytes(tmp_path) is None
    for data in (b"", b"RIFF" + whole[4:], whole[:70]):
        (tmp_path / "other.bin").write_bytes(data)
        assert rivals.ggml_vocabulary_bytes(tmp_path / "other.bin") is None
    for name in ("tokenizer.json", "vocabulary.json", "openvino_detokenizer.bin"):
        (models["openvino"] / name).write_bytes(b"words" * 100)
    assert rival_bytes(models["openvino"]) == len(b"weights")


def test_the_vocabulary_of_a_written_file_is_counted(tmp_path):
    model, processor = tiny(tmp_path / "tiny")
    file = ggml.write(tmp_path / "model.bin", model, processor, "q4_0")
    pieces = len(json.loads((tmp_path / "tiny" / "tokenizer.json").read_text())["model"]["vocab"])
    found = rivals.ggml_vocabulary_bytes(file)
    assert found is not None and 4 + 5 * pieces < found < 4 + 6 * pieces


@pytest.mark.parametrize("kind", ["", "int8", "float"])
def test_transformers_says_what_the_plain_path_says(tmp_path, kind):
    model, processor = tiny(tmp_path / "tiny")
    folder = tmp_path / "model"
    (dqw.freeze(dqw.quantize(model)) if kind else model).save_pretrained(folder)
    save_processor(processor, folder)
    rival = open_rival("transformers", folder, threads=1, kind=kind)
    assert type(rival.model).__module__.startswith("transformers.models.whisper.modeling_whisper")
    audio = tone(0.7)
    loaded, processor = load_whisper(folder)
    if kind:
        from dqw.convert import set_activations

        set_activations(loaded, kind)
        assert type(loaded) is not type(rival.model)
    wanted = transcribe(loaded, processor, [audio, audio], [None, "en"])
    for found, language in zip(wanted, (None, "en"), strict=True):
        text, heard = rival.hear(audio, language)
        assert heard == found.language and text.startswith(found.text) and found.text


# ---- dqw eval --engine ----


@pytest.fixture
def manifest(tmp_path):
    write_tone(tmp_path / "a.wav", 0.5)
    rows = [{"id": "a", "audio": "a.wav", "text": "good morning color", "language": "en"},
            {"id": "b", "audio": "a.wav", "text": "guten Morgen"}]  # fmt: skip
    file = tmp_path / "manifest.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluated(name, *arguments):
    return CliRunner().invoke(app, ["eval", "--engine", name, *map(str, arguments)])


@pytest.mark.parametrize("name", STUBBED)
def test_eval_scores_a_rival_like_a_model(packages, models, manifest, tmp_path, name, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"{package} 1")
    spelling = tmp_path / "normalizer.json"
    spelling.write_text(json.dumps({"colour": "color"}))
    figures, saved = tmp_path / "figures.json", tmp_path / "saved.jsonl"
    result = evaluated(name, "--model", models[name], "--data", manifest, "--json", figures,
                       "--normalizer", spelling, "--save-transcripts", saved)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "95 % interval" in result.stdout and "MiB without its tokenizer" in result.stdout
    stored = json.loads(figures.read_text())
    assert stored["engine"] == name and stored["english_spelling_map"] is True
    assert stored["languages"]["en"]["errors"] == 0 and stored["languages"]["en"]["units"] == 3
    assert stored["languages"]["de"]["units"] == 2  # detected
    assert stored["model_bytes"] == rival_bytes(models[name]) and stored["batch_size"] == 1
    assert stored["versions"][RIVALS[name].package] == f"{RIVALS[name].package} 1"
    assert [json.loads(line)["language"] for line in saved.read_text().splitlines()] == ["en", "de"]


def test_without_a_spelling_map_the_table_says_so(packages, models, manifest):
    result = evaluated("openvino", "--model", models["openvino"], "--data", manifest)
    assert "British spellings count as errors" in result.stdout
    (models["openvino"] / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    result = evaluated("openvino", "--model", models["openvino"], "--data", manifest)
    assert result.exit_code == 0 and "British" not in result.stdout


def test_what_goes_wrong_is_one_sentence(packages, models, manifest, tmp_path, monkeypatch):
    def fails(self, audio, **options):
        raise RuntimeError("out of luck\nat line 3")

    monkeypatch.setattr(CppModel, "transcribe", fails)
    wrong = tmp_path / "spelling.json"
    wrong.write_text("[1]")
    for engine, model, more, words in (
        ("whisper.cpp", models["whisper.cpp"], (), "failed on a (out of luck)"),
        ("openvino", models["faster-whisper"], (), "no model for openvino"),
        ("moonshine", models["openvino"], (), "the engine is 'moonshine'"),
        ("openvino", models["openvino"], ("--normalizer", wrong), "holds no spellings"),
        ("openvino", models["openvino"], ("--normalizer", tmp_path / "no"), "does not exist"),
    ):
        result = evaluated(engine, "--model", model, "--data", manifest, *more)
        assert result.exit_code == 1 and result.stderr.count("Error") == 1
        assert words in " ".join(result.stderr.split()), result.stderr


def test_eval_of_a_float_folder_takes_a_spelling_map(manifest, tmp_path):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    figures = tmp_path / "figures.json"
    for engine in ("dqw", "transformers"):
        result = evaluated(engine, "--model", folder, "--data", manifest, "--json", figures,
                           "--normalizer", tmp_path)  # fmt: skip
        assert result.exit_code == 0, result.output
        stored = json.loads(figures.read_text())
        assert stored["english_spelling_map"] is True and stored["engine"] == engine
        assert stored["model_bytes"] == rival_bytes(folder)
