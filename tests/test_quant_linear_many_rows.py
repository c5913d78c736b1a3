"""Many rows of x on the CPU, where a tier may multiply int8 in tiles, floats as bfloat16 terms."""

import pytest
import torch
from kernel_helpers import (
    BITS,
    assert_as_good,
    instruction_set,
    needs_library,
    quantized_rows,
    random_scale,
    random_weight,
    wildest_levels,
)
from torch import Tensor
from torch.nn.functional import linear

from dqw import grids, ops, reference
from dqw.packing import round_scales

pytestmark = needs_library
dqw = torch.ops.dqw
TIERS = ("avx2", "avx512", "amx")  # products in registers, of other blocks, and in tiles
GRANULARITIES = ("tensor", "channel", "6", "16", "24", "64", "128")
GRIDS = [("lloyd", 2), ("lloyd", 3), ("lloyd", 4), ("apot", 5), ("uniform", 8), ("pot", 4)]
# The fourth and fifth are of whole blocks of rows: 12 on AVX-512, in groups 6.
SHAPES = (
    (17, 33, 7),
    (33, 70, 1023),
    (12, 33, 200),
    (36, 33, 200),
    (65, 40, 600),
    (100, 97, 130),
    (70, 1100, 64),
)


def packed(
    rows: int, cols: int, bits: int, levels: Tensor, granularity: str, short: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, int]:
    """What the operator takes, the weight it stands for in float32, and the group size."""
    weight, _ = random_weight(rows, cols, bits, levels)
    scale, group = random_scale(rows, cols, granularity, 0.1)
    if group and short:
        scale = round_scales(scale).half()  # as packed groups have them
    full = reference.dequantize(weight, scale.float(), levels, rows, cols, bits, group)
    return (weight, scale, levels), full, group


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("isa", TIERS)
def test_int8_is_exact(isa: str, granularity: str) -> None:
    with instruction_set(isa):
        for grid, bits in GRIDS:
            for m, rows, cols in SHAPES:
                levels = grids.levels(grid, bits)
                weight, level = random_weight(rows, cols, bits, levels)
                scale, _ = random_scale(rows, cols, granularity, 0.1)
                bias = torch.randn(rows) if m % 2 else None
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    x = torch.randn(m, cols).to(dtype)
                    q, s = quantized_rows(x)
                    want = (q @ level.T).float() * (s * scale.T)
                    want = want if bias is None else want + bias
                    args = (weight, scale, levels, bias, rows, bits, 0, True)
                    got = dqw.quant_linear(x, *args)
                    assert torch.equal(got, want.to(dtype)), (grid, bits, m, rows, cols, dtype)


@pytest.mark.parametrize("isa", TIERS)
def test_no_sum_overflows(isa: str) -> None:
    """Every product at its largest, of one sign: sums reach what float32 does not count."""
    with instruction_set(isa):
        levels = grids.levels("uniform", 8)
        rows, cols, m = 40, 9000, 40
        weight, level = random_weight(rows, cols, 8, torch.full_like(levels, int(levels.max())))
        x = torch.ones(m, cols)
        x[1::2] = -1
        args = (weight, torch.ones(1, 1), torch.full_like(levels, int(levels.max())), None, rows, 8)
        want = (x.long() * 127 @ level.T).float() * torch.tensor(1.0 / 127)
        assert torch.equal(dqw.quant_linear(x, *args, 0, True), want)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("isa", TIERS)
def test_floats_are_as_good_as_torch(isa: str, granularity: str) -> None:
    """At most twice the error of torch's product in x's own type, for scales as groups have them
    and others."""
    with instruction_set(isa):
        for bits in BITS:
            for levels in (grids.levels("uniform", bits), wildest_levels(bits)):
                m, rows, cols = SHAPES[bits % len(SHAPES)]
                for dtype in (torch.float32, torch.float16):
                    args, full, group = packed(rows, cols, bits, levels, granularity, bits != 4)
                    bias = torch.randn(rows) if m % 2 else None
                    x = (torch.randn(m, cols) / full.abs().max()).to(dtype)
                    exact = linear(
                        x.double(), full.double(), None if bias is None else bias.double()
                    )
                    plain = linear(x.float(), full, bias).to(dtype)
                    got = dqw.quant_linear(x, *args, bias, rows, bits, group, False)
                    assert got.dtype == dtype
                    assert_as_good(got, plain, exact, (bits, m, rows, cols, dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("isa", TIERS)
def test_int8_in_groups(isa: str, granularity: str) -> None:
    with instruction_set(isa):
        for grid, bits in GRIDS:
            m, rows, cols = 70, 45, 330
            args, full, group = packed(rows, cols, bits, grids.levels(grid, bits), granularity)
            x = torch.randn(m, cols)
            if bits == 4:  # scales that float16 holds without an exponent of their own
                small = (args[1].float() * 2**-13).half()
                full = reference.dequantize(
                    args[0], small.float(), args[2], rows, cols, bits, group or 0
                )
                args = (args[0], small if group else small.float(), args[2])
            rounded = ops.fake_quant_activation(x)
            exact = rounded.double() @ full.double().T
            plain = rounded @ full.T
            got = dqw.quant_linear(x, *args, None, rows, bits, group, True)
            assert_as_good(got, plain, exact, (grid, bits))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("isa", TIERS)
def test_identity_gives_the_weight(isa: str, granularity: str) -> None:
    with instruction_set(isa):
        for bits, levels in [(b, grids.levels("apot", b)) for b in BITS] + [(6, wildest_levels(6))]:
            rows, cols = 45, 700
            args, full, group = packed(rows, cols, bits, levels, granularity)
            for dtype in (torch.float32, torch.float16):
                got = dqw.quant_linear(
                    torch.eye(cols).to(dtype), *args, None, rows, bits, group, False
                )
                assert torch.equal(got.T, full.to(dtype)), (bits, dtype)


@pytest.mark.parametrize("isa", TIERS)
def test_a_row_bears_outliers_and_extremes(isa: str) -> None:
    with instruction_set(isa):
        levels = grids.levels("lloyd", 4)
        for granularity in ("channel", "16"):
            args, full, group = packed(40, 600, 4, levels, granularity)
            x = torch.randn(40, 600)
            x[0:3, 5] = 1e4
            x[3:6] *= torch.exp(4 * torch.randn(3, 600))
            x[6] *= 1e30
            x[7] *= 1e-25
            x[8], x[9, 1:] = 0.0, 0.0
            exact, plain = x.double() @ full.double().T, x @ full.T
            got = dqw.quant_linear(x, *args, None, 40, 4, group, False)
            error, bound = (got - exact).abs().amax(1), 2 * (plain - exact).abs().amax(1)
            assert (error <= bound + 1e-6 * exact.abs().amax(1)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    with instruction_set(isa):
        levels = grids.levels("lloyd", 4)
        for granularity in ("channel", "16"):
            args, _, group = packed(50, 70, 4, levels, granularity)
            for int8 in (False, True):
                x = torch.randn(70, 70)
                x[0, 5], x[1, 69] = float("nan"), float("inf")
                # A NaN whose payload lies in the bits that bfloat16 has not.
                x[2, 3] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
                got = dqw.quant_linear(x, *args, None, 50, 4, group, int8)
                assert got[0].isnan().all() and got[2].isnan().all()
                assert not got[1].isfinite().any() and got[3:].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ("amx",))
def test_every_number_of_rows(isa: str, threads: int) -> None:
    """A row's result does not depend on its company nor on who computes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set(isa):
            for rows, cols in ((70, 150), (1100, 1600)):
                for granularity in ("channel", "16"):
                    args, _, group = packed(rows, cols, 4, grids.levels("lloyd", 4), granularity)
                    bias = torch.randn(rows)
                    for int8 in (False, True):
                        rest = (*args, bias, rows, 4, group, int8)
                        x = torch.randn(300, cols)
                        want = dqw.quant_linear(x, *rest)
                        for m in (*range(65, 70), 100, 257, 299):
                            assert torch.equal(dqw.quant_linear(x[:m], *rest), want[:m]), m
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", TIERS)
def test_any_strides_and_dimensions(isa: str) -> None:
    with instruction_set(isa):
        for int8 in (False, True):
            args, _, group = packed(40, 80, 4, grids.levels("lloyd", 4), "16")
            rest = (*args, None, 40, 4, group, int8)
            x = torch.randn(3, 2, 20, 160)[..., ::2].transpose(0, 2)
            got = dqw.quant_linear(x, *rest)
            assert got.shape == (20, 2, 3, 40)
            assert torch.equal(got, dqw.quant_linear(x.contiguous(), *rest))
