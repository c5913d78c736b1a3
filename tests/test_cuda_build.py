"""setup.py's CUDA part: DQW_CUDA and DQW_CUDA_ARCHS on a machine without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext --inplace` of a copy, without the CPU's library (no compiler for it)."""
    if not (folder / "setup.py").exists():
        shutil.copy(ROOT / "setup.py", folder)
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "dqw").mkdir()
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CXX": str(folder / "no-compiler"), **environment},
        capture_output=True,
        text=True,
    )


def test_without_nvcc_the_install_goes_on(tmp_path: Path) -> None:
    missing = {"NVCC": str(tmp_path / "no-nvcc"), "CUDA_HOME": str(tmp_path)}
    stale = tmp_path / "dqw" / "_C_cuda.so"
    for choice, code in (("auto", 0), ("0", 0), ("1", 1), ("2", 1)):
        done = build(tmp_path, DQW_CUDA=choice, **missing)
        assert (done.returncode != 0) == bool(code), done.stderr[-2000:]
        assert code or "the CUDA C++ library was not built" in done.stdout
        assert not stale.exists()
        if choice == "auto":
            stale.touch()  # an older build must not survive
    assert "set auto, 0 or 1" in done.stderr


def test_other_generations_are_built_anew(tmp_path: Path) -> None:
    """By a stand-in for nvcc, which writes down what it was asked."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\n'
        '[ -e "$0.fails" ] && exit 1\n'
        'while [ "$1" != -o ]; do shift; done; echo library > "$2"\n'
    )
    nvcc.chmod(0o755)
    target, log = tmp_path / "dqw" / "_C_cuda.so", tmp_path / "nvcc.log"
    asked = {"DQW_CUDA": "1", "NVCC": str(nvcc)}
    for archs, builds in (("75", 1), ("75", 1), ("90", 2), ("90", 2)):
        done = build(tmp_path, DQW_CUDA_ARCHS=archs, **asked)
        assert done.returncode == 0 and target.read_text() == "library\n", done.stderr
        assert len(log.read_text().splitlines()) == builds
    (tmp_path / "nvcc.fails").touch()
    assert build(tmp_path, DQW_CUDA_ARCHS="80", **asked).returncode != 0
    assert [p.name for p in target.parent.iterdir()] == ["_C_cuda.so"], "of the build before"


def test_nvcc_builds_the_library(tmp_path: Path) -> None:
    """The bindings too compile: a minute, for one GPU generation."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: csrc/cuda is not compiled here")
    done = build(tmp_path, DQW_CUDA="1", DQW_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stderr[-3000:]
    library = (tmp_path / "dqw" / "_C_cuda.so").read_bytes()
    assert b"dqw_cuda" in library and b"fake_quant_clip" in library and b"sm_90a" in library
