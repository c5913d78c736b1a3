"""``dqw_cpu.add_moment``, and ``add_product`` over it: sums of products of bfloat16 rows."""

import pytest
import torch
from kernel_helpers import INSTRUCTION_SETS, instruction_set, needs_library
from torch import Tensor

from bench import moment
from dqw.compensate import Moment, add_product

pytestmark = needs_library
SHAPES = [
    (0, 64),
    (1, 1),
    (2, 33),
    (5, 32),
    (31, 31),
    (100, 130),
    (1024, 64),
    (1025, 96),
    (2600, 48),
]
TIER = "avx512_bf16"  # the one that has a kernel


def rows(n: int, cols: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(n, cols) + 0.5).bfloat16()


def symmetric(cols: int) -> Tensor:
    start = torch.randn(cols, cols)
    return start + start.T


@pytest.mark.parametrize(("n", "cols"), SHAPES)
@pytest.mark.parametrize("crossed", [False, True])
def test_the_kernel_adds_products(n: int, cols: int, crossed: bool) -> None:
    """Off by no more than twice what float32 products of the same numbers are, or 5e-7."""
    x, y = rows(n, cols, 1), rows(n, cols, 2) if crossed else None
    total = symmetric(cols)
    left = x if y is None else y
    wanted = total.double() + left.double().T @ x.double()
    sizes = total.double().abs() + left.double().abs().T @ x.double().abs()
    plain = torch.addmm(total, left.float().T, x.float())
    usual = float(((plain - wanted).abs() / sizes.clamp(min=1e-9)).max())
    columns = torch.randn(cols)
    sums = columns.double() + left.double().sum(0)
    with instruction_set(TIER):
        assert torch.ops.dqw_cpu.add_moment(total, x, y, columns)
    assert ((columns - sums).abs() <= 5e-7 * (left.double().abs().sum(0) + 4)).all()
    assert ((total - wanted).abs() <= max(2 * usual, 5e-7) * sizes + 1e-12).all()
    if y is None:
        assert torch.equal(total, total.T)


def test_strides_threads_and_nan() -> None:
    wide = rows(200, 140, 3)
    x, y = wide[::2, :70], wide[1::2, 70:]
    before = torch.get_num_threads()
    found = []
    with instruction_set(TIER):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                for given in (None, y):
                    total = torch.zeros(70, 70)
                    assert torch.ops.dqw_cpu.add_moment(total, x, given)
                    found.append(total)
            finally:
                torch.set_num_threads(before)
        assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
        assert (found[1] - y.float().T @ x.float()).abs().max() < 1e-3
        x = x.clone()
        x[3, 5] = float("nan")
        total = torch.zeros(70, 70)
        torch.ops.dqw_cpu.add_moment(total, x)
    assert total[5].isnan().all() and total[:, 5].isnan().all()
    assert total.isnan().sum() == 2 * 70 - 1


def test_unfit_arguments_are_refused() -> None:
    operator, x, total = torch.ops.dqw_cpu.add_moment, rows(4, 8, 0), torch.zeros(8, 8)
    with instruction_set(TIER):
        for given in (
            (total, x.float(), None),
            (total[:4], x, None),
            (total.double(), x, None),
            (total, x, x[:3]),
            (torch.zeros(8, 9)[:, :8], x, None),
        ):
            with pytest.raises(RuntimeError, match="must be"):
                operator(*given)
    assert not total.any()


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_where_there_is_no_kernel(tier: str, dtype: torch.dtype) -> None:
    x, y = rows(40, 24, 1).to(dtype), rows(40, 24, 2).to(dtype)
    with instruction_set(tier):
        for given in (None, y):
            total = torch.zeros(24, 24)
            add_product(total, x, given)
            wanted = (x if given is None else y).double().T @ x.double()
            assert (total - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("low", [False, True])
def test_weighted_moments(low: bool) -> None:
    x, y, weight = rows(50, 16, 1).float(), rows(50, 16, 2).float(), torch.rand(50) + 0.1
    sums = Moment.empty(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        sums.add(x, weight, y)
        sums.add(x, weight, y)
    w = weight.double()[:, None]
    limit = 3e-2 if low else 1e-5  # a bfloat16 is off by 2^-9, of sums about 30
    for found, wanted in (
        (sums.second, 2 * (w * x.double()).T @ x.double()),
        (sums.cross, 2 * (w * y.double()).T @ x.double()),
        (sums.first, 2 * (w * x.double()).sum(0)),
        (sums.first_float, 2 * (w * y.double()).sum(0)),
    ):
        assert found is not None and found.dtype == torch.float32
        assert (found - wanted).abs().max() < limit * wanted.abs().max()
    assert sums.count == pytest.approx(2 * float(weight.sum()), rel=1e-6)


def test_the_benchmark_compares_with_torch() -> None:
    with instruction_set(TIER):
        found = moment.compare(40, 33, quick=True)
    names = ["dqw X^T X", "dqw Y^T X", "torch float32", "torch bfloat16"]
    assert [name for name, _, _ in found] == names
    assert all(ms > 0 and rate > 0 for _, ms, rate in found)
