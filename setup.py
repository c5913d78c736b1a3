"""Install dqw, and build its C++ extension where a compiler is found.

`csrc/cpu/*.cpp` become one shared library, `dqw/_C*.so`, which `dqw/ops.py` loads with
`torch.ops.load_library`. It uses PyTorch's stable ABI, so one build serves every torch from
2.10 on, and it has no Python symbol, so it serves every Python.

Each file gets its own flags by its name: `*_amx.cpp`, `*_avx512_bf16.cpp`, `*_avx512.cpp` and
`*_avx2.cpp` may use those instructions, the rest may not; which of them runs is decided by the
processor at run time. There is no global -march: code that every machine runs must not contain what
some machines lack.

`csrc/cuda/*.cu` become dqw/_C_cuda*.so by nvcc, where there is one and torch was built for CUDA.

Environment: DQW_CUDA=auto|0|1: 0 skips the CUDA library, 1 makes a failed build of it fail the
install (otherwise Triton serves in its place); DQW_CUDA_ARCHS such as "80;90" (its default is
75;80;90;100 as far as nvcc knows them, and PTX of the last for newer GPUs); NVCC;
DQW_BUILD=0 skips both extensions, DQW_BUILD=1 makes a failed build fail the install
(without it the plain PyTorch reference serves); CXX and CXXFLAGS as everywhere.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
CUDA_FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.h"))
X86 = platform.machine().lower() in ("x86_64", "amd64")

COMMON = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    # A multiply and an add must not become one fused operation unless the source says so: the
    # kernels agree with the reference bit for bit.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vnni")]
# Nothing throws there; with exceptions, what releases the tiles would need a weak symbol.
AMX = ["-mamx-tile", "-mamx-bf16", "-mamx-int8", "-fno-exceptions"]
# GCC 12 warns about its own intrinsics (_mm512_undefined_*).
GCC_12 = ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
BY_SUFFIX = {
    "_avx512.cpp": [*AVX2, *AVX512, *GCC_12],
    "_avx512_bf16.cpp": [*AVX2, *AVX512, "-mavx512bf16", *GCC_12],
    "_amx.cpp": [*AVX2, *AVX512, "-mavx512bf16", *AMX, *GCC_12],
    "_avx2.cpp": AVX2,
    "_scalar.cpp": ["-O2"],
}


def flags(source: str) -> list[str] | None:
    """The extra flags of one source file; None if this processor family has no use for it."""
    for suffix, extra in BY_SUFFIX.items():
        if source.endswith(suffix):
            return extra if X86 or suffix == "_scalar.cpp" else None
    return []


class BuildExtension(build_ext):
    """Compile each file with its own flags, two at a time, and link them into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI tag: the library has no Python in it.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        if os.environ.get("DQW_BUILD") == "0":
            self.announce_fallback("DQW_BUILD=0")
            for name in ("dqw._C", "dqw._C_cuda"):  # older builds are not this source
                Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
            return
        self.in_checkout = bool(self.inplace)  # setuptools builds elsewhere first, and copies
        super().run()
        self.build_cuda()

    def build_cuda(self) -> None:
        """Compile csrc/cuda; without it, or without nvcc, dqw works on Triton."""
        wanted = os.environ.get("DQW_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"DQW_CUDA is {wanted!r}: set auto, 0 or 1.")
        target = Path(self.get_ext_fullpath("dqw._C_cuda"))
        why = "DQW_CUDA=0"
        if wanted != "0":
            try:
                why = compile_cuda(target, wanted == "1", bool(self.force))
            except (OSError, ImportError) as error:  # the latter: no torch to build against
                if wanted == "1":
                    raise
                why = str(error).splitlines()[0]
        if why:
            target.unlink(missing_ok=True)  # an older build is not this source
            print(f"dqw: the CUDA C++ library was not built ({why}); Triton serves GPUs.")

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_and_link(ext)
        except (OSError, ImportError) as error:
            if os.environ.get("DQW_BUILD") == "1":
                raise
            self.announce_fallback(str(error).splitlines()[0])
            # An older build is not this source: the reference, with its warning, is.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if self.in_checkout:
                (ROOT / "dqw" / "_C.so").unlink(missing_ok=True)

    def announce_fallback(self, why: str) -> None:
        print(
            f"dqw: the C++ extension was not built ({why}). dqw works without it, on the slower "
            "plain PyTorch reference; install a C++20 compiler (g++ 11 or newer) and run `pip "
            "install 'setuptools>=77' && pip install --no-build-isolation -e .` again to have the "
            "fast kernels.",
            file=sys.stderr,
        )

    def compile_and_link(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = shlex.split(os.environ.get("CXX", "")) or [
            shutil.which("g++") or shutil.which("c++") or shutil.which("clang++") or "g++"
        ]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = [f"-I{path}" for path in include_paths()]
        newest_header = max(os.path.getmtime(ROOT / header) for header in [*HEADERS, "setup.py"])

        # Kept in the checkout, not in pip's temporary folder: the next build compiles what changed.
        objects_folder = ROOT / "build" / "objects"
        made_by, asked = objects_folder / "made_by", shlex.join([*compiler, *extra])
        anew = self.force or not made_by.is_file() or made_by.read_text() != asked

        def compile_one(source: str) -> str | None:
            special = flags(source)
            if special is None:
                return None
            target = objects_folder / Path(source).with_suffix(".o").name
            changed = max(os.path.getmtime(source), newest_header)
            if anew or not target.exists() or target.stat().st_mtime < changed:
                command = [*compiler, *COMMON, *includes, *special, *extra]
                run([*command, "-c", source, "-o", str(target)], source)
            return str(target)

        objects_folder.mkdir(parents=True, exist_ok=True)
        if anew:  # all of them, or the next build starts over
            made_by.unlink(missing_ok=True)
        with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
            objects = [name for name in pool.map(compile_one, ext.sources) if name]
        made_by.write_text(asked)
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in library_paths()]
        link = [*compiler, "-shared", *objects, *libraries, "-ltorch", "-ltorch_cpu"]
        run([*link, "-o", output], "linking")


def compile_cuda(target: Path, demanded: bool, force: bool) -> str:
    """Build ``target``; → why it was left out, empty if it was not. OSError if nvcc fails."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    if not CUDA_FILES or (torch.version.cuda is None and not demanded):
        return "this torch is built without CUDA"
    beside = str(Path(CUDA_HOME) / "bin" / "nvcc") if CUDA_HOME else "nvcc"
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named) if named else shutil.which("nvcc") or shutil.which(beside)
    if nvcc is None:
        if demanded:
            raise OSError("nvcc is not found: install the CUDA toolkit, or set NVCC to its nvcc")
        return "nvcc is not found"
    archs = os.environ.get("DQW_CUDA_ARCHS", "").replace(",", ";").split(";")
    if archs == [""]:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        archs = [arch for arch in ("75", "80", "90", "100") if f"compute_{arch}\n" in known]
        if not archs:
            raise OSError(f"{nvcc} knows none of sm_75 to sm_100: set DQW_CUDA_ARCHS")
    command = [nvcc, "-shared", "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--threads", "2"]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command += ["-ltorch", "-ltorch_cpu"] + ["-ltorch_cuda"] * (torch.version.cuda is not None)
    sources = [str(ROOT / file) for file in CUDA_FILES if file.endswith(".cu")]
    newest = max(os.path.getmtime(ROOT / file) for file in [*CUDA_FILES, "setup.py"])
    made_by, asked = ROOT / "build" / "made_by_cuda", shlex.join(command)
    same = made_by.is_file() and made_by.read_text() == asked
    if same and not force and target.exists() and target.stat().st_mtime > newest:
        return ""
    target.parent.mkdir(parents=True, exist_ok=True)
    made_by.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        run([*command, *sources, "-o", str(partial)], "csrc/cuda")
        os.replace(partial, target)  # a link cut short would count as a library
    finally:
        partial.unlink(missing_ok=True)
    made_by.write_text(asked)
    return ""


class AnyPython(bdist_wheel):
    """A wheel for this platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def run(command: list[str], what: str) -> None:
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed on {what}, see its message above") from error


setup(
    packages=[*find_packages(include=["dqw", "dqw.*"]), "dqw_kernels"],
    package_dir={"dqw_kernels": "kernels"},
    package_data={"dqw": ["recipes/*.toml", "py.typed"]},
    ext_modules=[Extension("dqw._C", sources=SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": AnyPython},
)
