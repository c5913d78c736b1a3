"""Fake quantization on the CPU against the reference: every tier, grid, dtype and odd shape."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_helpers import (
    BITS,
    INSTRUCTION_SETS,
    all_grids,
    instruction_set,
    needs_library,
    random_scale,
)

from dqw import grids, reference

pytestmark = needs_library
dqw = torch.ops.dqw

# (rows, cols, granularity): widths around the lanes of a register, and groups with a ragged end.
SHAPES = [
    (1, 1, "tensor"),
    (3, 7, "channel"),
    (5, 63, "tensor"),
    (4, 65, "channel"),
    (4, 65, "16"),
    (4, 65, "32"),
    (2, 1023, "64"),
    (3, 130, "128"),
    (2, 100, "24"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, cols)
    x.view(-1)[::5] *= 3  # outside the clip
    x.view(-1)[::7] = 0.0
    x.view(-1)[3::11] = -0.0
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, signs of zero included; any NaN equals any NaN."""
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_rounds_as_the_reference(isa: str, grid: str) -> None:
    with instruction_set(isa):
        for bits in grids.widths(grid):
            bucket, top = grids.bucket(grid, bits), grids.level_max(grid, bits)
            for rows, cols, granularity in SHAPES:
                for dtype in DTYPES:
                    scale, group = random_scale(rows, cols, granularity, 1.5 / top)
                    x = weights(rows, cols, dtype)
                    if cols > 5:
                        x[0, 1], x[0, 2], x[0, 5] = float("nan"), float("inf"), -float("inf")
                    args = (x, scale, bucket, group)
                    where = (bits, rows, cols, granularity, dtype)
                    assert same(dqw.fake_quant(*args), reference.fake_quant(*args)), where
                    assert torch.equal(dqw.quantize(*args), reference.quantize(*args)), where


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_ties_go_to_the_larger_magnitude(isa: str) -> None:
    with instruction_set(isa):
        for grid in grids.GRIDS:
            for bits in grids.widths(grid):
                values = torch.tensor(grids.magnitudes(grid, bits)).float()
                ties = (values[1:] + values[:-1]) / 2 * 0.25  # exact: the scale is a power of two
                x = torch.cat([ties, -ties])[None]
                got = dqw.quantize(x, torch.full((1, 1), 0.25), grids.bucket(grid, bits), 0)
                assert got[0].tolist() == [
                    *values[1:].int().tolist(),
                    *(-values[1:].int()).tolist(),
                ]


@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gradients_as_the_reference(isa: str, grid: str) -> None:
    with instruction_set(isa):
        for bits in grids.widths(grid):
            bucket, top = grids.bucket(grid, bits), grids.level_max(grid, bits)
            for rows, cols, granularity in SHAPES:
                for dtype in DTYPES:
                    scale, group = random_scale(rows, cols, granularity, 1.5 / top)
                    x, grad = weights(rows, cols, dtype), torch.randn(rows, cols).to(dtype)
                    if cols > 5:
                        x[0, 2], x[0, 5] = float("inf"), -float("inf")
                    args = (grad, x, scale, bucket, group)
                    (dx, ds), (want_dx, want_ds) = (
                        dqw.fake_quant_backward(*args),
                        reference.fake_quant_backward(*args),
                    )
                    assert same(dx, want_dx), (bits, rows, cols, granularity, dtype)
                    # Each term is at most top * |g|: the sums differ by their rounding.
                    bound = (
                        3e-7 * top * max(cols, 16) ** 0.5 * (rows if granularity == "tensor" else 1)
                    )
                    torch.testing.assert_close(ds, want_ds, rtol=1e-5, atol=3 * bound)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gradient_of_the_clip_in_closed_form(isa: str) -> None:
    """RCF (arXiv 1909.13144): x = clip u, d/dclip = Σ g (sign 1[|u|>1] + (q - u) 1[|u|<=1])."""
    with instruction_set(isa):
        for bits in BITS:
            top = grids.level_max("apot", bits)
            x, grad = weights(4, 77, torch.float32).double(), torch.randn(4, 77).double()
            clip = torch.rand(4, 1).double() + 0.7
            scale = (clip / top).float()
            _, ds = dqw.fake_quant_backward(
                grad.float(), x.float(), scale, grids.bucket("apot", bits), 0
            )
            unit = torch.tensor(grids.magnitudes("apot", bits)).double() / top
            u = x / (scale.double() * top)
            nearest = unit[(u.abs()[..., None] - unit).abs().argmin(-1)] * u.sign()
            want = grad * torch.where(u.abs() > 1, u.sign(), nearest - u)
            torch.testing.assert_close(
                ds.double() / top, want.sum(1, keepdim=True), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_nan_spoils_its_own_gradient_only(isa: str) -> None:
    with instruction_set(isa):
        x, grad = torch.randn(3, 40), torch.randn(3, 40)
        x[1, 4] = float("nan")
        dx, ds = dqw.fake_quant_backward(grad, x, torch.ones(3, 1), grids.bucket("apot", 4), 0)
        assert ds.isnan().flatten().tolist() == [False, True, False]
        assert torch.equal(dx[1, 4], grad[1, 4]) and not dx.isnan().any()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_scale_of_zero_gives_zeros(isa: str) -> None:
    with instruction_set(isa):
        x = torch.randn(2, 40)
        x[0, 0] = 0.0
        for grid in grids.GRIDS:
            args = (x, torch.zeros(2, 1), grids.bucket(grid, 4), 0)
            assert not dqw.fake_quant(*args).any()
            assert dqw.fake_quant_backward(torch.ones(2, 40), *args)[1].isfinite().all()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_gradient_of_the_scale_does_not_depend_on_threads(isa: str) -> None:
    x, grad = torch.randn(300, 700), torch.randn(300, 700)
    threads = torch.get_num_threads()
    with instruction_set(isa):
        for granularity in ("tensor", "channel", "64"):
            scale, group = random_scale(300, 700, granularity, 0.2)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(
                    dqw.fake_quant_backward(grad, x, scale, grids.bucket("apot", 4), group)[1]
                )
            torch.set_num_threads(threads)
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_any_strides(isa: str) -> None:
    bucket, scale = grids.bucket("apot", 4), torch.full((6, 1), 0.1)
    with instruction_set(isa):
        for x in (torch.randn(9, 6).T, torch.randn(6, 18)[:, ::2], torch.randn(1, 9).expand(6, 9)):
            args = (x, scale, bucket, 0)
            want = reference.fake_quant(x.contiguous(), scale, bucket, 0)
            assert torch.equal(dqw.fake_quant(*args), want)
            assert torch.equal(dqw.quantize(*args), reference.quantize(*args))
            got = dqw.fake_quant_backward(torch.ones(1, 1).expand(6, 9), *args)
            assert torch.equal(got[0], reference.fake_quant_backward(torch.ones(6, 9), *args)[0])
        x = torch.randn(3, 4, 5).transpose(0, 2)
        assert torch.equal(dqw.fake_quant_activation(x), reference.fake_quant_activation(x))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_activations_as_the_reference(isa: str) -> None:
    with instruction_set(isa):
        for cols in (1, 7, 63, 65, 512, 1023):
            for dtype in DTYPES:
                x = torch.randn(9, cols) * torch.logspace(-9, 9, 9)[:, None]
                x = x.clamp(-6e4, 6e4).to(dtype)
                x[1] = 0
                x[2, cols // 2], x[3, 0] = float("nan"), -float("inf")
                got = dqw.fake_quant_activation(x.view(3, 3, cols))
                want = reference.fake_quant_activation(x).view(3, 3, cols)
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (cols, dtype)
        tiny = torch.full((1, 40), 1e-39)  # 127 / 1e-39 overflows: a row of zeros
        tiny[0, 0] = 0
        assert dqw.fake_quant_activation(tiny).abs().max() <= 1e-39


def test_empty_inputs() -> None:
    bucket = grids.bucket("apot", 4)
    for rows, cols in ((0, 5), (5, 0), (0, 0)):
        x, scale = torch.zeros(rows, cols), torch.ones(rows, 1)
        assert dqw.fake_quant(x, scale, bucket, 0).shape == (rows, cols)
        assert dqw.quantize(x, scale, bucket, 0).shape == (rows, cols)
        dx, ds = dqw.fake_quant_backward(x, x, scale, bucket, 0)
        assert dx.shape == x.shape and torch.equal(ds, torch.zeros(rows, 1))
        groups = torch.ones(rows, -(-cols // 16))
        dx, ds = dqw.fake_quant_backward(x, x, groups, bucket, 16)
        assert dx.shape == x.shape and torch.equal(ds, torch.zeros_like(groups))
        assert dqw.fake_quant_activation(x).shape == (rows, cols)


def test_wrong_arguments_are_errors() -> None:
    bucket, x = grids.bucket("apot", 4), torch.randn(4, 64)
    for scale, group in ((torch.ones(3, 1), 0), (torch.ones(4, 2), 0), (torch.ones(4, 1), 32)):
        with pytest.raises(RuntimeError, match="scale must have shape"):
            dqw.fake_quant(x, scale, bucket, group)
    with pytest.raises(RuntimeError, match="bucket must be"):
        dqw.fake_quant(x, torch.ones(4, 1), bucket.float(), 0)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        dqw.fake_quant(x.double(), torch.ones(4, 1), bucket, 0)


@pytest.mark.parametrize("wanted", ["scalar", "avx1024"])
def test_the_environment_chooses_the_instruction_set(wanted: str) -> None:
    code = "import torch, dqw.ops; print(torch.ops.dqw_cpu.instruction_set())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DQW_CPU_ISA": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    has = torch.ops.dqw_cpu.instruction_sets().split()
    assert done.stdout.strip() == (wanted if wanted in has else has[0])
    assert (wanted in has) == ("DQW_CPU_ISA" not in done.stderr)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_columns_pass_on_their_errors(isa: str) -> None:
    """Bit for bit the reference's loop, for every grid, number of columns and of rows."""
    with instruction_set(isa):
        for grid, bits in all_grids():
            bucket = grids.bucket(grid, bits)
            for cols, rows in ((1, 1), (5, 33), (16, 7), (64, 40), (3, 0), (0, 5)):
                state, base = torch.randn(cols, rows), torch.randn(cols, rows)
                state[:1, :1] = float("nan")
                scale = (torch.rand(cols, rows) + 0.5) * 2 / (bucket.numel() // 2)
                scale[-1:, -1:] = 0.0
                divisor, coefficient = torch.rand(cols) + 0.5, torch.randn(cols, cols) / 8
                for start in (None, base):
                    args = (state, start, divisor, coefficient, scale, bucket)
                    want = reference.round_columns(*args)
                    for got, wanted in zip(dqw.round_columns(*args), want, strict=True):
                        assert torch.equal(got.nan_to_num(7e7), wanted.nan_to_num(7e7))


def test_columns_of_any_layout() -> None:
    bucket = grids.bucket("lloyd", 4)
    state, h = torch.randn(40, 12).T, torch.randn(30, 30)
    args = (state, None, h.diagonal()[:12].abs(), h[3:15, 3:15], torch.rand(40, 24).T[::2], bucket)
    want = reference.round_columns(*args)
    assert all(map(torch.equal, dqw.round_columns(*args), want))
    torch.library.opcheck(dqw.round_columns.default, args)
    with pytest.raises(RuntimeError, match="at most 64 columns"):
        dqw.round_columns(torch.ones(65, 2), None, torch.ones(65), torch.ones(65, 65),
                          torch.ones(65, 2), bucket)  # fmt: skip
    with pytest.raises(RuntimeError, match="shape of state"):
        dqw.round_columns(torch.ones(2, 2), None, torch.ones(2), torch.ones(2, 2),
                          torch.ones(2, 3), bucket)  # fmt: skip
