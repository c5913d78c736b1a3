"""csrc/cuda's kernel without a GPU: run on CPU threads under a shim, and compiled by nvcc.

The very source that a GPU runs, gemv.h and its parts, is compiled by the host's compiler with
tests/cuda_host/shim.h in the place of CUDA: every code path against the reference. Where nvcc is,
it is compiled for sm_80 and sm_90a too: no spills, 16-byte loads, at most 16 instructions for 8
decoded weights.
"""

import ctypes
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import random_scale, random_weight
from torch import Tensor
from torch.nn import functional as F

from dqw import grids, ops_cuda, packing, reference

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda"
HOST = ROOT / "tests" / "cuda_host"
GROUPS = (0, 16, 32, 64, 128)


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p), ("rows", ctypes.c_int), ("scale_stride", ctypes.c_int),
    )  # fmt: skip


class Gemv(ctypes.Structure):
    _fields_ = (
        ("matrix", Matrix * 3), ("levels", ctypes.c_void_p), ("x", ctypes.c_void_p),
        ("matrices", ctypes.c_int), ("m", ctypes.c_int), ("cols", ctypes.c_int),
        ("blocks", ctypes.c_int), ("group_shift", ctypes.c_int),
        ("cluster_shift", ctypes.c_int), ("gelu", ctypes.c_bool),
    )  # fmt: skip


def host_library(name: str, folder: Path) -> ctypes.CDLL:
    """tests/cuda_host/``name``.cpp, compiled over the shim."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    file = folder / f"{name}.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"]
    include = ["-DDQW_CUDA_ON_HOST", f"-I{SOURCE}", f"-I{HOST}"]
    subprocess.run([*command, *include, HOST / f"{name}.cpp", "-o", file], check=True)
    return ctypes.CDLL(str(file))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = host_library("gemv", tmp_path_factory.mktemp("cuda_host"))
    assert found.dqw_gemv_size() == ctypes.sizeof(Gemv)
    return found


def aligned(t: Tensor) -> Tensor:
    """A copy that starts at a multiple of 64 bytes, as a GPU's allocator gives."""
    size = t.numel() * t.element_size()
    room = torch.zeros(size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    copy = room[start : start + size].view(t.dtype).view(t.shape)
    return copy.copy_(t)


def gemv(
    library: ctypes.CDLL,
    x: Tensor,
    parts: list[tuple[Tensor, Tensor, Tensor | None, int]],
    levels: Tensor,
    bits: int,
    group: int,
    gelu: bool = False,
    processors: int = 132,
) -> list[Tensor]:
    """parts: (weight, scale, bias, rows) of up to three matrices."""
    m, cols = x.shape
    keep, outs = [aligned(x), levels], []
    call = Gemv(levels=levels.data_ptr(), x=keep[0].data_ptr(), matrices=len(parts), m=m, cols=cols,
                blocks=-(-cols // 64), gelu=gelu)  # fmt: skip
    for i, (weight, scale, bias, rows) in enumerate(parts):
        weight, y = aligned(weight), torch.full((m, rows), float("nan"), dtype=x.dtype)
        keep += [weight, scale]
        stride = 0 if scale.shape[0] == 1 and not group else scale.shape[1]
        call.matrix[i] = Matrix(weight.data_ptr(), scale.data_ptr(),
                                None if bias is None else bias.data_ptr(), y.data_ptr(), rows,
                                stride)  # fmt: skip
        outs.append(y)
    kind = x.dtype == torch.bfloat16
    assert library.dqw_gemv(ctypes.byref(call), bits, group, kind, processors, 8) == 1
    return outs


def scales(rows: int, cols: int, group: int, size: float = 1.0) -> Tensor:
    """As dqw stores them: groups' have 5 bits, and level × scale is exact in float16."""
    scale, _ = random_scale(rows, cols, str(group) if group else "channel", size)
    return packing.round_scales(scale).half() if group else scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_identity_gives_the_exact_weight(library, bits: int, dtype: torch.dtype) -> None:
    for grid in grids.GRIDS if bits == 4 else ("apot", "uniform"):
        if bits > 6 and dtype == torch.bfloat16 and grid == "apot":
            continue  # it does not hold them: see test_few_rows_reach_this_kernel
        levels = grids.levels(grid, bits)
        for group in GROUPS:
            rows, cols = 11, 200
            weight, _ = random_weight(rows, cols, bits, levels)
            scale = scales(rows, cols, group)
            w = reference.dequantize(weight, scale, levels, rows, cols, bits, group)
            for start in (12, 44, 60, 192):  # across every boundary of a group
                count = 8 if group else 16 if start > 12 else 32
                x = torch.eye(cols, dtype=dtype)[start : start + count]
                (y,) = gemv(library, x, [(weight, scale, None, rows)], levels, bits, group)
                assert torch.equal(y, w.T[start : start + len(x)].to(dtype)), (group, start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_the_plain_one(library, dtype: torch.dtype) -> None:
    shapes = [(1, 1, 8), (1, 33, 1032), (3, 7, 6152), (16, 9, 640), (9, 40, 1416), (5, 8, 72),
              (17, 33, 1544), (32, 8, 3080), (25, 40, 136)]  # fmt: skip
    for n, (m, rows, cols) in enumerate(shapes):
        bits, group = (4, 2, 3, 5, 6, 4, 4, 2, 6)[n], GROUPS[n % 5]
        levels = grids.levels("apot", bits)
        weight, _ = random_weight(rows, cols, bits, levels)
        scale, _ = random_scale(rows, cols, str(group) if group else "channel", 0.1)
        scale = scale.half() if group else scale  # of 11 bits
        w = reference.dequantize(weight, scale, levels, rows, cols, bits, group)
        x, bias = torch.randn(m, cols).to(dtype), torch.randn(rows).to(dtype)
        exact = x.double() @ w.double().T + bias.double()
        plain = F.linear(x, w.to(dtype), bias)
        (y,) = gemv(library, x, [(weight, scale, bias, rows)], levels, bits, group)
        floor = torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor, (m, rows, cols)


@pytest.mark.parametrize("group", [0, 64])
def test_three_projections_in_one_launch(library, group: int) -> None:
    """Query, key and value with biases of their own or none, and an even per-tensor scale."""
    levels, cols = grids.levels("apot", 4), 192
    x = torch.randn(2, cols).half()
    parts = []
    for rows in (24, 9, 16):
        weight, _ = random_weight(rows, cols, 4, levels)
        scale = torch.full((1, 1), 0.3) if rows == 9 and not group else scales(rows, cols, group)
        parts.append((weight, scale, None if rows == 9 else torch.randn(rows).half(), rows))
    got = gemv(library, x, parts, levels, 4, group)
    for y, (weight, scale, bias, rows) in zip(got, parts, strict=True):
        alone = gemv(library, x, [(weight, scale, bias, rows)], levels, 4, group)[0]
        want = reference.quant_linear(x, weight, scale, levels, bias, rows, 4, group, False)
        assert torch.equal(y, alone)
        torch.testing.assert_close(y, want, rtol=2e-3, atol=2e-2)


def test_how_columns_are_shared(library) -> None:
    """Whisper's shapes on 132 processors; a card without clusters has none."""
    for rows, cols, most, clusters, want in (
        (1280, 1280, 10, 8, (0, 10)), (5120, 1280, 10, 8, (0, 10)), (1280, 5120, 10, 8, (2, 10)),
        (1280, 5120, 8, 8, (3, 5)), (51866, 1280, 10, 8, (0, 4)), (4096, 4096, 10, 8, (1, 10)),
        (4096, 4096, 8, 8, (1, 8)), (1280, 1280, 8, 8, (0, 8)),
        (384, 384, 10, 8, (0, 3)), (1280, 5120, 10, 1, (0, 10)), (32, 64, 10, 8, (0, 1)),
        (1280, 1280, 4, 4, (2, 3)), (512, 512, 4, 4, (0, 4)), (1280, 5120, 4, 4, (2, 4)),
    ):  # fmt: skip
        found = library.dqw_plan(-(-rows // 32), -(-cols // 64), most, 132, clusters)
        assert divmod(found, 100) == want, (rows, cols, most, divmod(found, 100))
    for blocks in range(300):
        shift, warps = divmod(library.dqw_plan(3, blocks, 10, 132, 8), 100)
        assert 1 <= warps <= 10 and shift <= 3


def test_gelu_is_the_exact_one(library) -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(32, 64, 4, levels)
    scale = scales(32, 64, 64, 0.1)
    x = torch.randn(4, 64).half()
    (y,) = gemv(library, x, [(weight, scale, None, 32)], levels, 4, 64, gelu=True)
    w = reference.dequantize(weight, scale, levels, 32, 64, 4, 64)
    torch.testing.assert_close(y, F.gelu(x.float() @ w.T).half(), rtol=2e-3, atol=1e-3)


def test_nan_stays_in_its_row(library) -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(8, 72, 4, levels)
    x = torch.randn(3, 72).half()
    x[1, 0] = float("nan")  # what lies behind the last column of row 0
    (y,) = gemv(library, x, [(weight, scales(8, 72, 0), None, 8)], levels, 4, 0)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_few_rows_reach_this_kernel(library, monkeypatch: pytest.MonkeyPatch) -> None:
    """dqw.ops sends layers of up to 32 rows here, alone or three at a time, no others."""
    calls = []

    def kernel(x, weights, scales, levels, biases, rows, bits, group, gelu):  # type: ignore[no-untyped-def]
        calls.append(len(weights))
        bias = [b if b.numel() else None for b in biases]
        parts = list(zip(weights, scales, bias, rows, strict=True))
        return gemv(library, x, parts, levels, bits, group, gelu)

    monkeypatch.setattr(torch.ops, "dqw_cuda", SimpleNamespace(gemv=kernel), raising=False)
    monkeypatch.setattr(ops_cuda, "library_reason", "")
    levels, cols, rows = grids.levels("apot", 4), 136, [24, 9, 16]
    packed = [aligned(random_weight(n, cols, 4, levels)[0]) for n in rows]
    scale, biases = [scales(n, cols, 64) for n in rows], [torch.randn(24), None, torch.randn(16)]
    x = torch.randn(2, 3, cols).half()
    got = ops_cuda.quant_linears(x, packed, scale, levels, biases, rows, 4, 64, True)
    assert calls == [3]
    for y, w, s, b, n in zip(got, packed, scale, biases, rows, strict=True):
        want = reference.quant_linear(x.float(), w, s, levels, b, n, 4, 64, False)
        torch.testing.assert_close(y, F.gelu(want).half(), rtol=2e-3, atol=3e-2)
        alone = ops_cuda.quant_linear(x, w, s, levels, b, n, 4, 64, False)
        torch.testing.assert_close(alone, want.half(), rtol=2e-3, atol=3e-2)
    assert calls == [3, 1, 1, 1]
    for dtype, m, bits, group, where in (
        (torch.float32, 1, 4, 64, False), (torch.float16, 33, 4, 64, False),
        (torch.float16, 32, 4, 64, True),
        (torch.bfloat16, 8, 6, 64, True), (torch.float16, 8, 7, 64, True),
        (torch.float16, 1, 4, 96, False), (torch.bfloat16, 1, 4, 0, True),
        (torch.float16, 1, 4, 16, True), (torch.float16, 1, 4, 32, True),
    ):  # fmt: skip
        few = torch.zeros(m, 64, dtype=dtype)
        kind = torch.float16 if group else torch.float32
        args = ([aligned(torch.zeros(64, dtype=torch.uint8))], [torch.ones(1, 1, dtype=kind)])
        levels = grids.levels("apot", bits)
        assert ops_cuda.gemv_serves(few, *args, levels, bits, group) == where, (dtype, m, bits)
        assert not ops_cuda.gemv_serves(few[:, :63], *args, levels, bits, group)
    args = (args[0], [torch.ones(1, 1)])
    large = [aligned(torch.zeros(2**19 + 16, dtype=torch.uint8))]
    for bits, weights, most in ((4, args[0], 32), (4, large, 16), (5, large, 32)):
        for m in (16, 17, 32, 33):
            served = ops_cuda.gemv_serves(
                torch.zeros(m, 64).half(), weights, args[1], grids.levels("apot", bits), bits, 0
            )
            assert served == (m <= most)
    for bits in (7, 8):  # bfloat16 holds what is exact in 8 bits
        for grid in ("apot", "pot", "uniform"):
            levels = grids.levels(grid, bits)
            exact = bool((levels.bfloat16() == levels).all())
            few = torch.zeros(1, 64, dtype=torch.bfloat16)
            for _ in range(2):
                served = ops_cuda.gemv_serves(few, *args, levels, bits, 0)
                assert served == (grid == "uniform") and (exact or not served)


# ---- compiled for GPUs ----

INSTANCES = [  # type of x, bits, groups, tiles of 8 rows of x
    ("__half", 4, 1, 1), ("__half", 4, 0, 1), ("__nv_bfloat16", 4, 1, 1), ("__half", 2, 0, 2),
    ("__half", 3, 1, 2), ("__nv_bfloat16", 5, 1, 1), ("__half", 6, 0, 2), ("__half", 8, 1, 1),
    ("__half", 4, 1, 2), ("__nv_bfloat16", 6, 1, 2), ("__half", 7, 1, 2), ("__half", 8, 0, 1),
    ("__nv_bfloat16", 7, 1, 2), ("__nv_bfloat16", 8, 0, 2), ("__half", 4, 1, 4),
    ("__half", 3, 1, 4),
]  # fmt: skip
PROBE = """
#include "decode.h"
// WORDS nibble words, decoded: the difference between two of these is the decoder alone.
template <int WORDS>
__global__ void probe(const uint32_t* in, uint32_t* out, const dqw::Pool* pools) {
    const dqw::Pool pool = pools[threadIdx.x];
    for (int w = 0; w < WORDS; w++) {
        uint32_t v[4];
        dqw::decode_nibbles(in[w], pool, v);
        reinterpret_cast<uint4*>(out)[w] = *reinterpret_cast<const uint4*>(v);
    }
}
template __global__ void probe<1>(const uint32_t*, uint32_t*, const dqw::Pool*);
template __global__ void probe<9>(const uint32_t*, uint32_t*, const dqw::Pool*);
"""


def nvcc(code: str, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin of ``code`` for ``arch`` and what ptxas says of it."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed: the CUDA C++ kernel is not compiled for GPUs here")
    source, cubin = folder / "code.cu", folder / "code.cubin"
    source.write_text(code)
    command = [compiler, "-std=c++20", "-O3", f"-I{SOURCE}", f"-arch={arch}", "-cubin", "-Xptxas",
               "-v", source, "-o", cubin]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return cubin, done.stderr


def sass(cubin: Path) -> str:
    program = shutil.which("nvdisasm")
    if program is None and find_spec("triton"):
        from triton import knobs

        program = knobs.nvidia.nvdisasm.path
    if program is None:
        pytest.skip("nvdisasm is not installed")
    return subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    lines = [f"template __global__ void dqw::gemv<{t}, {bits}, {groups}, {tiles}>(dqw::Gemv);"
             for t, bits, groups, tiles in INSTANCES]  # fmt: skip
    code = '#include "launch.h"\n' + "\n".join(lines)
    cubin, said = nvcc(code, arch, tmp_path)
    assert said.count(" 0 bytes spill stores, 0 bytes spill loads") == len(INSTANCES), said
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 224, registers  # two blocks of four warps could have 255
    text = sass(cubin)
    for code in re.findall(r"^\.text\._ZN3dqw4gemv.*?(?=^\s*\.section|\Z)", text, re.M | re.S):
        if "Li4ELb" in code[:60]:  # bits
            order = re.findall(r"LDG\.E\.NA|LDG\.E\.128|ACQBULK|HMMA", code)
            wait = ["ACQBULK"] if arch == "sm_90a" else []
            first = ["LDG.E.NA"] * 4 + wait + ["LDG.E.128"]  # four loads of W in flight, then x
            assert order[: len(first)] == first, order[:8]
    assert "HMMA.16816.F32" in text and "LDG.E.NA.128" in text, "tensor cores, 16-byte loads"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_eight_weights_take_at_most_sixteen_instructions(arch: str, tmp_path: Path) -> None:
    text = sass(nvcc(PROBE, arch, tmp_path)[0])
    counts = {}
    for words, part in re.findall(
        r"^\.text\._Z5probeILi(\d)E(.*?)(?=^\s*\.section|\Z)", text, re.M | re.S
    ):
        found = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z0-9]+)", part, re.M)
        counts[words] = sum(name in ("PRMT", "LOP3", "SHF", "IMAD", "LEA", "SEL") for name in found)
    assert 8 <= (counts["9"] - counts["1"]) / 8 <= 16, counts
