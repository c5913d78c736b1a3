"""Whatever is wrong with the input: one sentence on stderr, exit code 1, nothing written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner
from whisper_helpers import save_ct2, save_tiny, tone, write_tone

from dqw.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bad") / "model")


def run(folder: Path, *arguments) -> str:
    """Run in vain; returns the sentence. Nothing may appear in `folder` or on stdout."""
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and sorted(folder.rglob("*")) == before
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def bad_audio(path: Path, kind: str) -> None:
    if kind == "empty":
        path.touch()
    elif kind == "no samples":
        soundfile.write(path, np.zeros((0, 2)), 48_000)
    elif kind == "NaN":
        wave = tone()
        wave[3] = np.nan
        soundfile.write(path, wave, 16_000, subtype="FLOAT")
    elif kind == "corrupt":
        data = bytearray(write_tone(path.with_suffix(".flac"), 2.0).read_bytes())
        data[2000:2600] = bytes(600)
        path.with_suffix(".flac").unlink()
        path.write_bytes(data)
    elif kind == "cut off":
        write_tone(path, 2.0)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "type":
        path.write_text("no audio here, only words")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty (0 bytes)"),
        ("no samples", "holds no samples"),
        ("NaN", "NaN or infinite samples"),
        ("corrupt", "is corrupt or cut off"),
        ("cut off", "is cut off"),
        ("type", "does not hold audio"),
    ],
)
def test_bad_audio(model, tmp_path, kind, words):
    path = tmp_path / "bad.wav"
    bad_audio(path, kind)
    out = tmp_path / "out"
    sentence = run(tmp_path, "transcribe", path, "--model", model, "--output-dir", out)
    assert words in sentence and str(path) in sentence


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (48_000, 2)])
def test_odd_but_good_audio(model, tmp_path, rate, channels):
    path = write_tone(tmp_path / "good.wav", 0.5, rate, channels)
    assert CliRunner().invoke(app, ["transcribe", str(path), "--model", str(model)]).exit_code == 0


def test_silent_audio_is_an_empty_line(model, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    arguments = ["transcribe", str(tmp_path / "silent.wav"), "--model", str(model)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout == "\n"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"audio": "none.wav", "text": "x"}, "none.wav does not exist"),
        ({"file": "a.wav", "text": "x"}, "lacks the key 'audio'"),
        ({"audio": "a.wav", "text": ""}, "the text is empty"),
        ({"audio": "bad.wav", "text": "x"}, "bad.wav is empty"),
    ],
)
def test_bad_manifest_rows(model, tmp_path, row, words):
    write_tone(tmp_path / "a.wav")
    (tmp_path / "bad.wav").touch()
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "x"}) + "\n" + json.dumps(row) + "\n")
    figures = tmp_path / "figures.json"
    sentence = run(tmp_path, "eval", "--model", model, "--data", manifest, "--json", figures)
    assert words in sentence and f"{manifest} row 2" in sentence


def test_bad_data_options(model, tmp_path):
    write_tone(tmp_path / "a.wav")
    data = ("--model", model, "--data", tmp_path)
    assert "scoring needs transcripts" in run(tmp_path, "eval", *data)
    assert "language option is 'xx'" in run(tmp_path, "eval", *data, "--language", "xx")
    assert "limit is 0" in run(tmp_path, "eval", *data, "--limit", 0)


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
@pytest.mark.parametrize("command", ["transcribe", "info"])
def test_damaged_models(tmp_path, damage, command):
    folder = save_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        (folder / "config.json").write_text("{}")
    audio = write_tone(tmp_path / "a.wav")
    arguments = ("info", folder) if command == "info" else ("transcribe", audio, "--model", folder)
    assert str(folder) in run(tmp_path, *arguments)


def test_a_folder_without_its_processor(tmp_path):
    """What ``model.save_pretrained`` leaves."""
    audio = write_tone(tmp_path / "a.wav")
    for part, names in (
        ("tokenizer", ("tokenizer.json", "vocab.json")),
        ("feature extractor", ("preprocessor_config.json", "processor_config.json")),
    ):
        folder = save_tiny(tmp_path / part)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        sentence = run(tmp_path, "transcribe", audio, "--model", folder)
        assert f"lacks its {part}" in sentence and "save the processor there, too" in sentence


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_device_is_no_audio_file(model, tmp_path):
    sentence = run(tmp_path, "transcribe", os.devnull, "--model", model)
    assert "is a pipe or a device; write the audio to a file first" in sentence


def test_a_damaged_faster_whisper_model(tmp_path):
    save_ct2(tmp_path / "model")
    path = tmp_path / "model" / "model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    assert "model.bin is cut off" in run(tmp_path, "info", tmp_path / "model")


def test_bad_options(model, tmp_path):
    first, second = write_tone(tmp_path / "a.wav"), write_tone(tmp_path / "b" / "a.wav")
    start = ("transcribe", first, "--model", model)
    assert "format is 'pdf'" in run(tmp_path, *start, "--format", "pdf")
    assert "give --output-dir" in run(tmp_path, *start, "--format", "all")
    assert "give --output-dir" in run(tmp_path, *start, second, "--format", "srt")
    assert "same output file" in run(tmp_path, *start, second, "--output-dir", tmp_path / "out")
    assert "task is 'sing'" in run(tmp_path, *start, "--task", "sing")
    assert "beam size is 0" in run(tmp_path, *start, "--beam-size", 0)
    nowhere = ("transcribe", first, "--model", tmp_path / "none")
    assert "does not exist; check the path" in run(tmp_path, *nowhere)
