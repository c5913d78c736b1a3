"""Products of bfloat16 on the CPU: as good as torch's own, for every packing, shape and tier."""

import pytest
import torch
from kernel_helpers import (
    BF16_SETS,
    BITS,
    assert_as_good,
    instruction_set,
    needs_library,
    random_scale,
    random_weight,
    wildest_levels,
)
from torch import Tensor
from torch.nn.functional import linear

from dqw import grids, reference

pytestmark = needs_library
dqw = torch.ops.dqw
GRANULARITIES = ("tensor", "channel", "6", "16", "24", "32", "64", "128")


def check(x: Tensor, args: tuple, weight: Tensor, bias: Tensor | None, where: tuple) -> Tensor:
    """At most twice the error of torch's bfloat16 product, against float64."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = linear(x, weight.bfloat16(), None if bias is None else bias.bfloat16())
    got = dqw.quant_linear(x, *args)
    assert got.dtype == torch.bfloat16 and got.shape == plain.shape
    assert_as_good(got, plain, exact, where)
    return got


def weight_of(args: tuple, cols: int) -> Tensor:
    weight, scale, levels, _, rows, bits, group, _ = args
    return reference.dequantize(weight, scale.float(), levels, rows, cols, bits, group)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tier", BF16_SETS)
def test_as_good_as_torch(tier: str, bits: int, granularity: str) -> None:
    shapes = ((17, 33, 7), (31, 32, 64), (33, 70, 1023), (65, 40, 2100), (100, 97, 130))
    with instruction_set(tier):
        for levels in (grids.levels("apot", bits), wildest_levels(bits)):
            for m, rows, cols in shapes:
                weight, _ = random_weight(rows, cols, bits, levels)
                scale, group = random_scale(rows, cols, granularity, 0.1)
                bias = torch.randn(rows) if m % 2 else None
                args = (weight, scale.half(), levels, bias, rows, bits, group, False)
                x = torch.randn(m, cols).bfloat16()
                check(x, args, weight_of(args, cols), bias, (m, rows, cols))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tier", BF16_SETS)
def test_identity_gives_the_weight_rounded_once(tier: str, granularity: str) -> None:
    with instruction_set(tier):
        for bits, levels in [(b, grids.levels("apot", b)) for b in BITS] + [(6, wildest_levels(6))]:
            rows, cols = 45, 1700
            weight, _ = random_weight(rows, cols, bits, levels)
            scale, group = random_scale(rows, cols, granularity)
            args = (weight, scale, levels, None, rows, bits, group, False)
            want = weight_of(args, cols).bfloat16()
            got = dqw.quant_linear(torch.eye(cols).bfloat16(), *args)
            assert torch.equal(got.T, want), bits


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tier", BF16_SETS)
def test_every_number_of_rows(tier: str, threads: int) -> None:
    """A row's result does not depend on its company nor on who computes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set(tier):
            for rows, cols in ((70, 150), (1100, 1600)):
                levels = grids.levels("apot", 4)
                weight, _ = random_weight(rows, cols, 4, levels)
                scale, group = random_scale(rows, cols, "16", 0.1)
                args = (weight, scale, levels, torch.randn(rows), rows, 4, group, False)
                x = torch.randn(1500, cols).bfloat16()
                want = dqw.quant_linear(x, *args)
                check(x, args, weight_of(args, cols), args[3], (1500,))
                for m in (*range(17, 70), 100, 257, 1499):
                    assert torch.equal(dqw.quant_linear(x[:m], *args), want[:m]), m
                for m in range(17):
                    assert dqw.quant_linear(x[:m], *args).shape == (m, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tier", BF16_SETS)
def test_nan_and_infinity_stay_in_their_row(tier: str) -> None:
    with instruction_set(tier):
        levels = grids.levels("uniform", 4)
        weight, _ = random_weight(50, 70, 4, levels)
        for granularity in ("channel", "16", "32"):
            scale, group = random_scale(50, 70, granularity)
            for m in (18, 40):
                x = torch.randn(m, 70).bfloat16()
                x[0, 5], x[1, 69] = float("nan"), float("inf")
                got = dqw.quant_linear(x, weight, scale, levels, None, 50, 4, group, False)
                assert got[0].isnan().all() and not got[1].isfinite().any()
                assert got[2:].isfinite().all()


@pytest.mark.parametrize("tier", BF16_SETS)
def test_any_strides_and_dimensions(tier: str) -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(40, 80, 4, levels)
    scale, group = random_scale(40, 80, "16")
    args = (weight, scale, levels, None, 40, 4, group, False)
    with instruction_set(tier):
        x = torch.randn(3, 2, 20, 160).bfloat16()[..., ::2].transpose(0, 2)
        got = dqw.quant_linear(x, *args)
        assert got.shape == (20, 2, 3, 40)
        assert torch.equal(got, dqw.quant_linear(x.contiguous(), *args))


def test_float32_and_int8_stay_what_they_are() -> None:
    """Without tiles only bfloat16 x is multiplied so: the rest is AVX-512, bit for bit."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(40, 80, 4, levels)
    scale, group = random_scale(40, 80, "16")
    x = torch.randn(50, 80)
    for type_, int8 in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)):
        args = (x.to(type_), weight, scale, levels, None, 40, 4, group, int8)
        with instruction_set("avx512_bf16"):
            got = dqw.quant_linear(*args)
        with instruction_set("avx512"):
            assert torch.equal(got, dqw.quant_linear(*args))
