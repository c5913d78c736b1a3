"""``kernels/`` imports as ``dqw_kernels`` and never shadows Hugging Face's package ``kernels``."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
from importlib.util import find_spec
from transformers import WhisperForConditionalGeneration
from transformers.utils import is_kernels_available
spec = find_spec("kernels")
print(is_kernels_available(), spec.origin if spec else None)
"""


def run(*arguments: str, **environment: str) -> str:
    """Python in the repository's root, which is then first on sys.path."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def hugging_face_kernels_is_installed() -> bool:
    try:
        version("kernels")
    except PackageNotFoundError:
        return False
    return True


def test_no_init_file_makes_a_package_of_the_folder() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(hugging_face_kernels_is_installed(), reason="the real package is installed")
def test_transformers_does_not_take_the_folder_for_the_package() -> None:
    assert run("-c", PROBE) == "False None"


def test_the_real_package_wins_over_the_folder(tmp_path: Path) -> None:
    """A stand-in for Hugging Face's package, with its metadata, later on sys.path than ours."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n    return type(name, (), {'__init__': lambda *a, **k: None})\n"
    )
    info = tmp_path / "kernels-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    probe = "import importlib.util as u, transformers; print(u.find_spec('kernels').origin)"
    assert run("-c", probe, PYTHONPATH=str(tmp_path)) == str(package / "__init__.py")
    assert "--op" in run("-m", "bench", "--help", PYTHONPATH=str(tmp_path), COLUMNS="120")


def test_bench_runs_from_the_root(tmp_path: Path) -> None:
    arguments = ["--op", "quant_linear", "--shapes", "1,64,64", "--threads", "1", "--quick"]
    report = tmp_path / "report.json"
    assert "quant_linear" in run("-m", "bench", *arguments, "--json", str(report))
    assert '"rows"' in report.read_text()


def test_the_triton_kernels_import_from_anywhere(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('dqw_kernels.fake_quant') is not None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_sources_build_with_the_oldest_torch() -> None:
    """A macro of 2.13's headers would leave 2.10 to 2.12 without kernels, without a word."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cpp", ".cu"):
            text = file.read_text(encoding="utf-8")
            assert not [name for name in newer if name in text], file


def test_without_a_compiler_the_install_goes_on(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dqw").mkdir()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    old = tmp_path / "dqw" / "_C.so"
    for environment, code in (({}, 0), ({"DQW_BUILD": "0"}, 0), ({"DQW_BUILD": "1"}, 1)):
        if not code:
            old.touch()
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={
                **os.environ,
                "CXX": str(tmp_path / "no-compiler"),
                "DQW_CUDA": "0",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr[-2000:]
        assert code or "the C++ extension was not built" in done.stderr
        assert not old.exists()


def test_other_flags_or_another_compiler_compile_anew(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("dqw", "csrc/cpu"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("one.cpp", "two.cpp", "both.h"):
        (tmp_path / "csrc" / "cpu" / name).touch()
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nwhile [ $# -gt 1 ]; do shift; done\ntouch "$1"\n'
    )
    compiler.chmod(0o755)

    def compiled(**changes: str) -> int:
        log.write_text("")
        environment = {"CXX": str(compiler), "DQW_BUILD": "1", "DQW_CUDA": "0", **changes}
        subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
        )
        return sum(" -c " in line for line in log.read_text().splitlines())

    assert [compiled(), compiled(CXXFLAGS="-g"), compiled(CXXFLAGS="-g")] == [2, 2, 0]


def test_what_a_source_package_holds(tmp_path: Path) -> None:
    """Every kernel's source, and the mark that dqw has types."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "dqw"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        found = {name.split("/", 1)[-1] for name in file.getnames()}
    sources = [path for path in ROOT.glob("csrc/*/*") if path.is_file()]
    assert any(path.suffix == ".cu" for path in sources)
    assert {str(path.relative_to(ROOT)) for path in sources} <= found
    assert {"dqw/py.typed", "dqw/recipes/default.toml", "kernels/quant_linear.py"} <= found


def tier_objects() -> list[Path]:
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    objects = sorted((ROOT / "build" / "objects").glob("*.o"))
    if not objects:
        pytest.skip("the library was not built in this checkout")
    return objects


def test_wide_registers_stay_in_files_that_may_use_them() -> None:
    """Code that every machine runs holds no AVX, and AVX2's files no AVX-512."""
    for path in tier_objects():
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not re.search("_(avx512|amx)", path.stem):
            assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b", code), path.name
        if not re.search("_(avx2|avx512|amx)", path.stem):
            assert "%ymm" not in code, path.name


def test_tiers_share_no_inline_function() -> None:
    """The linker keeps one copy of a weak symbol: it must not be one with AVX-512 in it."""
    for path in tier_objects():
        if path.stem.endswith(("_amx", "_avx512_bf16", "_avx512", "_avx2", "_scalar")):
            symbols = subprocess.run(
                ["nm", "-C", path], capture_output=True, text=True, check=True
            ).stdout
            weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
            assert not weak, (path.name, weak)
