"""`--device`: what it says where there is no GPU, and that its path in float16 hears the same.

The second takes the CPU for a GPU, as far as that goes without one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from whisper_helpers import run_dqw, save_speech, save_tiny

from dqw.devices import lacks_for_triton
from dqw.whisper.engines import NativeEngine, PlainEngine, open_engine
from dqw.whisper.fast import FastDecoder
from dqw.whisper.gpu import Graphs


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    out = tmp_path / "packed"
    assert run_dqw("compress", "--teacher", tmp_path / "base", "--ptq-only", "--out", out)[0] == 0
    save_speech(tmp_path, ("hello",))
    return out


def test_without_a_gpu_it_says_so(packed: Path) -> None:
    heard = ("transcribe", packed.parent / "0.wav", "--model", packed)
    scored = ("eval", "--data", packed.parent / "manifest.jsonl", "--model", packed)
    for command in (heard, scored):
        for device, words in (
            ("cuda", "no CUDA GPU: leave"),
            ("gpu", "choose one of cpu, cud"),
        ):
            if device == "cuda" and torch.cuda.is_available():
                continue
            code, output = run_dqw(*command, "--device", device)
            assert code == 1 and words in output and "Traceback" not in output, output
    code, output = run_dqw(*scored, "--device", "cuda", "--engine", "transformers")
    assert code == 1 and "dqw's own engine" in output, output


def test_a_gpu_hears_in_float16(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = packed.parent / "0.wav"
    code, want = run_dqw("transcribe", audio, "--model", packed, "--language", "en")
    assert code == 0, want
    monkeypatch.setattr("dqw.devices.has_gpu", lambda: True)
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "float32")  # a GPU's is not asked
    monkeypatch.setattr("dqw.devices.best_device", lambda: torch.device("cpu"))
    engine = open_engine(packed, device="cuda")
    assert isinstance(engine, NativeEngine) and isinstance(engine.native(), Graphs)
    assert engine.model.model.decoder.layer_norm.weight.dtype == torch.float16
    assert engine.model.model.decoder.layers[0].fc1.spec.activations == "float"
    assert isinstance(open_engine(packed).native(), FastDecoder)
    plain = open_engine(packed, beam_size=2, device="cuda")
    assert isinstance(plain, PlainEngine) and plain.model.dtype == torch.float16
    code, found = run_dqw(
        "transcribe", audio, "--model", packed, "--language", "en", "--device", "cuda"
    )
    assert code == 0 and found == want
    data = packed.parent / "manifest.jsonl"
    options = ("--teacher", packed.parent / "base", "--device", "cuda")
    code, output = run_dqw("eval", "--data", data, "--model", packed, *options)
    assert code == 0 and "KL" in output, output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(packed: Path) -> None:
    """Compressed with the GPU's help, and heard there: the same words as on the CPU."""
    folder = packed.parent
    base, data, out = folder / "base", folder / "manifest.jsonl", folder / "out"
    options = ("--student-layers", "1,2", "--budget", "1MiB", "--ptq-only", "--data", data)
    code, output = run_dqw("compress", "--teacher", base, *options, "--out", out)
    assert code == 0 and "healed" in output and "plan: " in output, output
    words = [
        run_dqw("transcribe", folder / "0.wav", "--model", out, "--language", "en", *where)
        for where in ((), ("--device", "cuda"))
    ]
    assert words[0] == words[1] and words[0][0] == 0, words


def test_what_triton_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert lacks_for_triton() in ("", "Python.h")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert lacks_for_triton() == "Python.h"
    monkeypatch.setenv("CC", "icc")
    assert lacks_for_triton() == "a C compiler"
