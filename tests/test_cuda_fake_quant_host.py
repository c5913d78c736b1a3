"""csrc/cuda's fake quantization without a GPU: run on CPU threads under a shim, compiled by nvcc.

As tests/test_cuda_host.py does it for the products: fake_quant.h, the very source that a GPU runs,
and the choice of kernel and blocks in fake_quant_launch.h, against the reference.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from kernel_helpers import random_scale
from test_cuda_host import aligned, host_library, nvcc, sass
from torch import Tensor

from dqw import grids, packing, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# x's type, and that of y or of the gradient: other types than float32 are rounded to themselves.
PAIRS = [(torch.float32, other) for other in DTYPES] + [(t, t) for t in DTYPES[1:]]
DAMPING = 0.25


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = host_library("fake_quant", tmp_path_factory.mktemp("cuda_host"))
    pointers, sizes = [ctypes.c_void_p] * 8, [ctypes.c_int64] * 5
    found.dqw_fake_quant_add.argtypes = [*pointers, *sizes, ctypes.c_float]
    found.dqw_fake_quants.argtypes = [
        ctypes.c_bool, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int)
    ]  # fmt: skip
    found.dqw_fake_quants.restype = ctypes.c_int64
    found.dqw_fake_quant_rows.argtypes = [*pointers[:2], *sizes[:2], ctypes.c_int]
    found.dqw_fake_quant_rows.restype = ctypes.c_int64
    return found


def run(
    library: ctypes.CDLL, problems: "list[Problem]", backward: bool
) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """y or dx, and dclip, of problems of one pair of types that are asked for together; what the C
    function returns, and its launches."""
    made = [p.ask(library, backward) for p in problems]
    launches = ctypes.c_int()
    types = [DTYPES.index(t) for t in problems[0].pair]
    ran = library.dqw_fake_quants(backward, *types, ctypes.byref(launches))
    return [(out, dclip) for out, dclip, *_ in made], ran, launches.value


class Problem:
    """A matrix, a gradient, and clips of which some are odd; what the kernel makes of them."""

    def __init__(
        self, rows: int, cols: int, granularity: str, kind: tuple[str, int] = ("apot", 4),
        pair: tuple[torch.dtype, torch.dtype] = PAIRS[0], shifted: str = "",
    ) -> None:  # fmt: skip
        """shifted: x, grad or out, which is to miss its alignment by an element."""
        self.bucket, top = grids.bucket(*kind), grids.level_max(*kind)
        scale, self.group = random_scale(rows, cols, granularity, 1 / top)
        self.clip, self.window, self.pair, self.shifted = scale * top, None, pair, shifted
        if self.group:  # cut off at both ends, as those of a group are
            self.window = torch.stack([scale.quantile(0.2), scale.quantile(0.8)])
        odd = torch.tensor([1.0, 1 - 2**-22, 1 + 2**-22, 0.0, -1.0, 2.0**-9])
        if self.clip.numel() >= 8:
            self.clip.view(-1)[1] = torch.nan
            self.clip.view(-1)[-6:] = odd * packing.SMALLEST_SCALE * top
        self.x, self.grad = torch.randn(rows, cols).to(pair[0]), torch.randn(rows, cols).to(pair[1])
        nan = 0.5 if granularity == "tensor" else torch.nan  # whose one sum would be NaN
        special = torch.tensor([0.0, torch.inf, -torch.inf, -0.0, nan, 1e-30])
        for row in {0, rows // 2}:
            some = self.x[row, :: max(1, cols // 6)][:6]
            some.copy_(special[: len(some)])

    def placed(self, t: Tensor, name: str) -> Tensor:
        """A copy that lies where a GPU's allocator, or a view, puts it."""
        shift = int(name == self.shifted)
        room = aligned(torch.zeros(t.numel() + shift, dtype=t.dtype))
        return room[shift:].view(t.shape).copy_(t)

    def ask(self, library: ctypes.CDLL, backward: bool) -> tuple[Tensor, ...]:
        """y or dx, and dclip, which the next run writes; and what else must live until then."""
        x, grad = self.placed(self.x, "x"), self.placed(self.grad, "grad")
        out = torch.full_like(self.x, torch.nan, dtype=self.pair[0 if backward else 1])
        out = self.placed(out, "out")
        dclip, sums = torch.full_like(self.clip, 7.0), torch.full((len(x),), torch.nan)
        factor = DAMPING / (self.bucket.numel() // 2)
        library.dqw_fake_quant_add(
            x.data_ptr(), grad.data_ptr() if backward else None, out.data_ptr(),
            self.clip.data_ptr(), None if self.window is None else self.window.data_ptr(),
            self.bucket.data_ptr(), dclip.data_ptr(), sums.data_ptr(), *x.shape, self.group,
            self.clip.shape[0], self.bucket.numel(), factor,
        )  # fmt: skip
        return out, dclip, x, grad, sums

    def run(self, library: ctypes.CDLL, backward: bool) -> tuple[Tensor, Tensor, int]:
        """y or dx, dclip, and what the C function returns."""
        [(out, dclip)], ran, launches = run(library, [self], backward)
        assert launches == (2 if backward and self.clip.numel() == 1 < len(self.x) else 1)
        return out, dclip, ran

    def check(self, library: ctypes.CDLL) -> int:
        """Against the reference; → whether fake_quant_groups ran, as -1, or fake_quant_teams."""
        args = (self.clip, self.bucket, self.window, self.group)
        y, _, ran = self.run(library, False)
        assert ran != 0
        same(y, reference.fake_quant_clip(self.x, *args, self.pair[1]))
        dx, dclip, ran = self.run(library, True)
        want_dx, want = reference.fake_quant_clip_backward(self.grad, self.x, *args, DAMPING)
        same(dx, want_dx)
        slack = 2e-6 * self.x.shape[1] ** 0.5
        torch.testing.assert_close(dclip, want, rtol=1e-5, atol=slack, equal_nan=True)
        assert torch.equal(dclip == 0, want == 0)
        return -1 if ran < 0 else 1


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for what a NaN looks like."""
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    known = ~want.isnan()
    assert torch.equal(got[known], want[known])
    assert torch.equal(got[known].signbit(), want[known].signbit())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair_of_types(library, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Both kernels, wide chunks and single elements, the table in shared memory and beyond it."""
    for rows, cols, granularity, kind, kernel in (
        (9, 64, "16", ("apot", 4), -1), (3, 256, "64", ("lloyd", 4), -1),
        (8, 72, "channel", ("apot", 4), 1), (8, 33, "channel", ("uniform", 8), 1),
        (5, 40, "tensor", ("apot", 8), 1), (2, 64, "32", ("pot", 5), -1),
    ):  # fmt: skip
        problem = Problem(rows, cols, granularity, kind, pair)
        assert problem.check(library) == kernel, (rows, cols, granularity)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "16", "20", "48", "64", "128"])
def test_every_shape(library, granularity: str) -> None:
    """Rows of one element, and of more than a round of a whole block; ragged ends."""
    for n, cols in enumerate((1, 7, 130, 768, 1023, 5120, 9001)):
        rows = max(1, min(9, 6000 // cols))
        Problem(rows, cols, granularity, ("apot", 4), PAIRS[n % len(PAIRS)]).check(library)


def test_all_of_a_block(library) -> None:
    """The last block of the groups' kernel is not full, and a warp of it has nothing."""
    for rows in (1, 9, 41):
        for pair in (PAIRS[1], PAIRS[4]):
            assert Problem(rows, 96, "32", pair=pair).check(library) == -1
            assert Problem(rows, 128, "channel", pair=pair).check(library) == -1


def test_tensors_that_are_not_aligned(library) -> None:
    for name in ("x", "grad", "out"):
        for pair in PAIRS:
            assert Problem(3, 64, "16", pair=pair, shifted=name).check(library) == 1


def test_matrices_of_one_launch(library) -> None:
    """Each as on its own. A launch has 16 matrices at most, of one kernel and number of threads."""
    one = [Problem(9, 96, "channel", ("apot", 4))]
    wide = [Problem(3, 3072, "channel", ("apot", 4))]
    tensors = [Problem(7, 96, "tensor", ("uniform", 8)) for _ in range(2)]
    groups = [Problem(4, 96, "32", ("lloyd", 3)), Problem(70, 64, "16", ("apot", 8))]
    for problems, launches in (
        (one * 16, 1), (one * 17, 2), (one * 3 + wide + one * 2, 2),
        (tensors + one, 1), (groups, 1), (groups + tensors + wide + one, 3),
    ):  # fmt: skip
        for backward in (False, True):
            want = [p.run(library, backward)[:2] for p in problems]
            got, ran, took = run(library, problems, backward)
            totals = any(p.clip.numel() == 1 for p in problems)
            assert ran != 0 and took == launches + (backward and totals)
            for (out, dclip), (want_out, want_dclip) in zip(got, want, strict=True):
                same(out, want_out)
                if backward:
                    same(dclip, want_dclip)


def test_each_run_has_the_same_sums(library) -> None:
    for granularity in ("channel", "tensor", "32"):
        problem = Problem(6, 1280, granularity)
        problem.clip.nan_to_num_(0.5)
        first = problem.run(library, True)[1].nan_to_num()
        for _ in range(3):
            assert torch.equal(problem.run(library, True)[1].nan_to_num(), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(library, dtype: torch.dtype) -> None:
    """Rows of one element, of one warp and many, and longer than a block holds; odd ones."""
    for rows, cols in (
        (1, 1),
        (9, 7),
        (6, 64),
        (7, 200),
        (3, 768),
        (5, 1023),
        (8, 1100),
        (8, 9000),
    ):
        x = torch.randn(rows, cols) * torch.logspace(-9, 9, rows)[:, None]
        x = x.clamp(-6e4, 6e4).to(dtype)
        x[0, -1] = torch.nan if rows > 1 else 1.0
        if rows > 5:
            x[1], x[2, cols // 2], x[3, 0] = 0, torch.inf, -torch.inf
            x[4] = 1e-39  # 127 / 1e-39 overflows: a row of zeros
        for shift in (0, 1):
            room = aligned(torch.zeros(x.numel() + 1, dtype=dtype))
            placed = room[shift:][: x.numel()].view(x.shape).copy_(x)
            y = aligned(torch.full_like(x, 7.0))
            ran = library.dqw_fake_quant_rows(
                placed.data_ptr(), y.data_ptr(), rows, cols, DTYPES.index(dtype)
            )
            assert ran >= 32
            same(y, reference.fake_quant_activation(x))


# ---- compiled for GPUs ----


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    rows = [f"template __global__ void dqw::fake_quant_rows<{t}, {v}>(const dqw::Activation);"
            for t, wide in (("float", 4), ("__half", 8), ("__nv_bfloat16", 8))
            for v in (wide, 1)]  # fmt: skip
    totals = [f"template __global__ void dqw::fake_quant_total<{most}>("
              f"const __grid_constant__ dqw::FakeQuants<{most}>);" for most in (1, 16)]  # fmt: skip
    cubin, said = nvcc("\n".join(['#include "fake_quant_rows.h"', *rows, *totals]), arch, tmp_path)
    # Alone and together, both ways: groups, teams, teams of single elements; the total of one clip.
    kernels = 2 * (2 * 3 * len(PAIRS) + 1) + len(rows)
    assert said.count("Compiling entry function") == kernels
    assert said.count(" 0 bytes spill stores, 0 bytes spill loads") == kernels, said
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 64, registers
    text = sass(cubin)
    assert " ATOM" not in text and " RED" not in text
    found = re.findall(r"^\.text\._ZN3dqw1[67]fake_quant_(\w+)(.*?)(?=^\s*\.section|\Z)", text,
                       re.M | re.S)  # fmt: skip
    wide = [(name, body) for name, body in found if "Li1EEELi" not in name and "total" not in name]
    assert len(wide) == 2 * 2 * 2 * len(PAIRS)
    for name, body in wide:
        first = body[: body.index("FCHK")]  # of a division, which needs the clip
        arrays = 2 if "Backward" in name else 1
        assert len(re.findall(r"LDG\.E\.(?:128|64)", first)) >= 2 * arrays, name
        assert len(re.findall(r"LDG\.E\.128", first)) >= 2, name
        assert re.search(r"LDG\.E\.[US]16", first), f"{name}: the table comes later"
        assert re.search(r"STG\.E\.(128|64)", body), name
        conversions = 1 if "teams" in name else 0  # of a division of integers
        assert body.count("F2I") <= conversions and "FADD.RZ" in body, name
