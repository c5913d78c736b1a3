"""`torchrun -m dqw compress`: two processes (gloo, on CPUs) make one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from whisper_helpers import run_dqw, save_speech, save_tiny

from dqw.whisper.checkpoint import load_whisper

RECIPE = '[quant]\nallocate = "bits"\n[train]\nsteps = 2\nlr = 1e-3\nlog_steps = 1\nbatch_size = '


AGREE = """
import os, sys
from dqw.processes import agreed, leave
value = agreed(os.environ["RANK"])
left = "leave" in sys.argv and leave()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
os.write(1, f"{value} {sum('gloo' in name for name in names)} threads\\n".encode())
os._exit(0)
"""


def torchrun(*args: str | Path) -> subprocess.CompletedProcess[str]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)]
    # One GPU would be given to both processes, which NCCL refuses.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *run], capture_output=True, text=True, env=env, timeout=200
    )


def options(folder: Path, out: Path, batch: int) -> list[str]:
    recipe = folder / f"{batch}.toml"
    recipe.write_text(f"{RECIPE}{batch}\n")
    given = ["--teacher", folder / "base", "--student-layers", "1,2", "--recipe", recipe]
    given += ["--data", folder / "clips" / "manifest.jsonl", "--out", out]
    return ["compress", *map(str, given)]


def log(out: Path) -> list[Any]:
    lines = (out.with_name(out.name + ".run") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    save_speech(tmp_path / "clips", ("hello", "hello wow", "wow", "hello hello") * 2, step=0.05)
    return tmp_path


def test_two_processes_learn_what_one_does_of_twice_the_batch(folder: Path) -> None:
    found = torchrun("-m", "dqw", *options(folder, folder / "two", 2))
    assert found.returncode == 0, found.stderr
    for words in ("healed 3 layers", "plan: ", "quantized ", "step 2/2", "wrote "):
        assert found.stderr.count(words) == 1, (words, found.stderr)
    load_whisper(folder / "two")
    code, printed = run_dqw(*options(folder, folder / "one", 4))
    assert code == 0, printed
    two, one = log(folder / "two"), log(folder / "one")
    assert [row["step"] for row in two] == [1, 2]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.01)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=0.1)


def test_without_training_one_process_does_it_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, printed = run_dqw(*options(folder, folder / "out", 2), "--ptq-only")
    assert code == 0 and not (folder / "out").exists(), printed


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_leaving_ends_the_threads_of_the_group(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    staying, left = (torchrun(script, *how) for how in ((), ("leave",)))
    assert len(staying.stdout.splitlines()) == 2 and " 0 threads" not in staying.stdout
    assert left.stdout.splitlines() == ["0 0 threads"] * 2, left.stderr
