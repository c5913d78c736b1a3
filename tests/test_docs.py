"""The code in the documents runs as it stands, on a tiny model of the same names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperForConditionalGeneration
from whisper_helpers import save_speech, save_tiny

import dqw

DOCS = Path(__file__).parents[1] / "docs"


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
