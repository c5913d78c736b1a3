"""dqw compress from the command line: what it refuses, at once and without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from whisper_helpers import refused, run_dqw

from dqw.whisper.checkpoint import load_whisper


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("choose 2 to 8", ["--bits", "1", "--ptq-only"]),
        ("choose 2 to 8", ["--bits", "9", "--ptq-only"]),
        ("apot, pot, uniform", ["--grid", "log", "--ptq-only"]),
        ("choose 16, 32, 64, 128", ["--group-size", "48", "--ptq-only"]),
        ("--data is missing", []),
        ("--budget measures layers on speech: give --data", ["--ptq-only", "--budget", "1MiB"]),
        ("give a size, like 32MiB", ["--data", "DATA", "--budget", "0.5"]),
        (
            "leaves layers unquantized, which no budget counts",
            ["--student", "BASE", "--data", "DATA", "--recipe", "paper-base", "--budget", "9MiB"],
        ),
        ("--ptq-only trains nothing", ["--ptq-only", "--data", "DATA", "--epochs", "2"]),
        ("like 4,4", ["--student-layers", "4", "--ptq-only"]),
        ("the teacher has 2", ["--student-layers", "4,1", "--ptq-only"]),
        ("is not known", ["--recipe", "best", "--ptq-only"]),
        ("and what stays float takes", ["--data", "DATA", "--budget", "4kB"]),
        ("give a size, like 32MiB", ["--data", "DATA", "--budget", "33"]),
        ("exclude each other", ["--student", "BASE", "--student-layers", "1,1", "--ptq-only"]),
        ("the lloyd grid has 2 to 5 bits", ["--grid", "lloyd", "--bits", "6", "--ptq-only"]),
        ("train.seed = -1", ["--data", "DATA", "--steps", "1", "--seed", "-1"]),
        ("--budget is ''", ["--data", "DATA", "--budget", ""]),
        ("--student-layers is ''", ["--data", "DATA", "--student-layers", ""]),
        ("for calibration alone", ["--data", "DATA", "--ptq-only", "--calibration-clips", "0"]),
    ],
)
def test_options_that_make_no_sense(
    words: str, options: list[str], base: Path, data: Path, tmp_path: Path
) -> None:
    options = [str({"DATA": data, "BASE": base}.get(o, o)) for o in options]
    refused(words, "--teacher", base, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "tables"),
    [
        (
            "needs distilled hidden states",
            '[distill]\nhidden = 0.0\n[guidance]\nmode = "quant_guided"',
        ),
        ("is for a GPU", '[train]\nsteps = 1\nprecision = "fp16"'),
        (
            "needs states that do not change",
            '[train]\nsteps = 1\ncache_states = "always"\n[distill]\nhidden = 0.0\n'
            "[distill.augment]\nnoise = 0.1\nredraw = true",
        ),
        (
            "allocate = 'steps' replaces both",
            '[quant]\nallocate = "steps"\n[[quant.override]]\nmatch = "*fc1"\ngrid = "apot"',
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_at_once(
    words: str, tables: str, base: Path, data: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and "fp16" in tables:
        pytest.skip("a GPU trains in float16")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tables + "\n")
    options = ("--teacher", base, "--data", data, "--recipe", recipe, "--out", tmp_path / "out")
    code, output = run_dqw("compress", *options)
    assert code == 1 and words in output, output
    assert "reading the headers" not in output
    assert not (tmp_path / "out.run").exists() and not (tmp_path / "out.work").exists()


def test_a_resumed_run_with_other_settings_is_refused_at_once(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dqw.distill.run as run_module

    options = ("--teacher", base, "--data", data, "--out", tmp_path / "out", "--steps", "2")

    def interrupted(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "round_student", interrupted)
        code, output = run_dqw("compress", *options)
    lines = "".join(output.split("\n"))  # which a terminal's width has broken
    assert code == 130 and "out.run: --resume goes on from it" in lines
    code, output = run_dqw("compress", *options, "--resume", "--bits", "3")
    assert code == 1 and "started with other settings" in output and "plan" not in output, output
    assert run_dqw("compress", *options, "--resume")[0] == 0


def test_what_will_do_nothing_or_be_slow_is_said(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--teacher", base, "--ptq-only", "--embedding-bits", "0", "--seed", "3")
    code, output = run_dqw("compress", *options, "--language", "ja", "--out", out)
    output = " ".join(output.split())
    assert code == 0 and "--seed and --language will do nothing" in output, output
    assert "its decoder will be slow, plain: its vocabulary is not packed" in output
    assert "its encoder" not in output


def test_an_existing_folder_is_not_touched(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refused("exists already", "--teacher", base, "--ptq-only", "--out", out)
    assert (out / "thesis.txt").read_text() == "precious" and len(list(out.iterdir())) == 1


def test_other_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    from conftest import make_tiny_whisper

    other = tmp_path / "other"
    make_tiny_whisper().save_pretrained(other)
    _, processor = load_whisper(base)
    processor.save_pretrained(other)
    options = ("--student", other, "--ptq-only", "--out", tmp_path / "out")
    refused("choose two checkpoints of one vocabulary", "--teacher", base, *options)
