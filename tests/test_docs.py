"""The code in the documents runs as it stands, on a tiny model of the same names; the options that
they name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import WhisperForConditionalGeneration
from whisper_helpers import save_speech, save_tiny

import bench.__main__ as bench
import dqw
from dqw.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(document: str) -> list[str]:
    text = (DOCS / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_training_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("small", "base"):
        save_tiny(tmp_path / "openai" / f"whisper-{name}")
    save_speech(tmp_path / "train", ("hello", "hello wow", "wow", "hello hello"))
    found = blocks("training.md")
    assert len(found) == 3
    names: dict[str, Any] = {}
    for block in found:
        exec(compile(block, "training.md", "exec"), names)
    assert names["result"].steps == 1
    for folder in ("base-4bit", "base-own", "base-rounded"):
        model = WhisperForConditionalGeneration.from_pretrained(folder)
        assert dqw.quant_modules(model)


def commands(text: str) -> list[str]:
    """Lines of code blocks, and code within lines; a command that goes on in the next is one."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"```.*?```", text, re.DOTALL)
    within = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for block in fenced for line in block.splitlines()] + within


def options(command: Any) -> set[str]:
    return {"--help"} | {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize(
    "file", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda file: file.name
)
def test_options_exist(file: Path) -> None:
    known = {f"dqw {c.name} ": options(c) for c in typer.main.get_command(app).commands.values()}
    known["python -m bench "] = options(typer.main.get_command(bench.app))
    for line in commands(file.read_text(encoding="utf-8")):
        for start, names in known.items():
            _, found, given = line.partition(start)
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", given)) - names
            assert not found or not unknown, line
