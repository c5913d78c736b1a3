"""The demo's own decisions: which clips are held out, what the summary holds, what is reused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from whisper_helpers import save_tiny, write_tone

from dqw import demo as module
from dqw.demo import Demo, run_demo, show, split, write_manifest
from dqw.whisper.data import Item, load_items


def speech(folder: Path) -> Path:
    items = [
        Item(f"{code}-{kind}", write_tone(folder / f"{code}-{kind}.wav", 0.3), "hello", code)
        for code in ("en", "ja")
        for kind in ("hola", "conteo", "pangrama")
    ]
    write_manifest(folder / "manifest.jsonl", items)
    return folder / "manifest.jsonl"


def test_the_pangrams_are_held_out(tmp_path: Path) -> None:
    train, test = split(load_items(speech(tmp_path)))
    assert [item.id for item in test] == ["en-pangrama", "ja-pangrama"]
    assert len(train) == 4 and not {i.id for i in train} & {i.id for i in test}


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    demo = Demo(tmp_path, console)
    demo.say("wrote runs/[v2]/out[/v2]")
    row = {"size_mib": 1.0, "wer": 0.0, "cer": 0.0, "errors": 0, "words": 1,
           "character_errors": 0, "characters": 1, "texts": ["[/music] hello"]}  # fmt: skip
    show(demo, {"student": row}, [Item("a", tmp_path / "a.wav", "[bold] hello", "en")])
    printed = console.export_text()
    for words in ("wrote runs/[v2]/out[/v2]", "[/music] hello", "[bold] hello"):
        assert words in printed


def test_demo_writes_its_summary_and_a_second_run_reuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dqw.recipe import Recipe
    from dqw.whisper import samples

    out = tmp_path / "demo"
    monkeypatch.setattr(samples, "fetch_base_model", lambda folder, say: save_tiny(folder))
    monkeypatch.setattr(samples, "fetch_speech_samples", lambda folder, say: speech(folder))
    short = Recipe.from_dict({"train": {"steps": 2, "batch_size": 2}})
    monkeypatch.setattr(module.Recipe, "from_toml", classmethod(lambda cls, path: short))
    console = Console(record=True, width=120)
    summary = run_demo(out, console)
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in ("teacher", "ptq", "student"):
        assert {"size_mib", "wer", "cer", "errors", "words"} <= set(summary[name])
    assert summary["student"]["times_smaller_than_small_fp16"] > 1
    assert (out / "student" / "model.safetensors").exists()
    printed = console.export_text()
    assert "trained" in printed and "heard" in printed
    stamp = (out / "student" / "model.safetensors").stat().st_mtime_ns
    assert run_demo(out, Console(quiet=True)) == summary
    assert (out / "student" / "model.safetensors").stat().st_mtime_ns == stamp
