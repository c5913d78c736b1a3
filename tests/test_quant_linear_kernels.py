"""Packed linear layers on the CPU: every tier, width, granularity, dtype and number of rows."""

import pytest
import torch
from kernel_helpers import (
    BITS,
    INSTRUCTION_SETS,
    all_grids,
    instruction_set,
    needs_library,
    quantized_rows,
    random_scale,
    random_weight,
    wildest_levels,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dqw import grids, ops, packing, reference

pytestmark = needs_library
dqw = torch.ops.dqw


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_int8_is_exact(isa: str, granularity: str) -> None:
    """Bit for bit the result of 64-bit integers, for every grid."""
    with instruction_set(isa):
        for grid, bits in all_grids():
            levels = grids.levels(grid, bits)
            for m, rows, cols in ((1, 17, 65), (3, 5, 130), (4, 33, 7), (6, 40, 63), (14, 33, 200)):
                weight, level = random_weight(rows, cols, bits, levels)
                scale, _ = random_scale(rows, cols, granularity, 0.1)
                x, bias = torch.randn(m, cols), torch.randn(rows)
                q, s = quantized_rows(x)
                want = (q @ level.T).float() * (s * scale.T) + bias
                got = dqw.quant_linear(x, weight, scale, levels, bias, rows, bits, 0, True)
                assert torch.equal(got, want), (grid, bits, m, rows, cols)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_int8_is_exact_for_any_table(isa: str) -> None:
    with instruction_set(isa):
        for bits in BITS:
            for m in (2, 9):
                levels = wildest_levels(bits)
                weight, level = random_weight(20, 300, bits, levels)
                scale, _ = random_scale(20, 300, "channel")
                x = torch.randn(m, 300)
                q, s = quantized_rows(x)
                got = dqw.quant_linear(x, weight, scale, levels, None, 20, bits, 0, True)
                assert torch.equal(got, (q @ level.T).float() * (s * scale.T)), (bits, m)


@pytest.mark.parametrize("cols", [8192, 70000])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_long_rows_do_not_overflow(isa: str, cols: int) -> None:
    """Every product at its largest: 8192 × 127 × 32639 is 16 times what int32 holds."""
    levels = torch.tensor([0, 127, -127, 32639], dtype=torch.int16)
    rows = 3 if cols > 65536 else 18
    weight = torch.tensor([0b01010101, 0b10101010, 0b11111111], dtype=torch.uint8)
    weight = weight.repeat(-(-rows // 3))[:rows].repeat_interleave(-(-cols // 64) * 16)
    level = torch.tensor([127, -127, 32639]).repeat(-(-rows // 3))[:rows]
    with instruction_set(isa):
        for m in (1, 6):
            x = torch.ones(m, cols) * torch.tensor([1.0, -1.0])[torch.arange(m) % 2, None]
            got = dqw.quant_linear(x, weight, torch.ones(1, 1), levels, None, rows, 2, 0, True)
            want = (x[:, :1].long() * 127 * level * cols).float() * torch.tensor(1.0 / 127)
            assert torch.equal(got, want), m


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_no_sum_saturates(isa: str) -> None:
    """All products at their largest, of both signs, alone and in groups, for every grid."""
    with instruction_set(isa):
        for grid, bits in all_grids():
            levels = grids.levels(grid, bits)
            rows, cols = 5, 320
            codes = torch.tensor([levels.argmax(), levels.argmin(), 0, 0, 0], dtype=torch.uint8)
            codes = codes[:, None].repeat(1, cols)
            codes[2, ::2], codes[3, 1::2], codes[4, 64:] = codes[0, 0], codes[1, 0], codes[0, 0]
            weight, level = packing.pack(codes, bits), levels[codes.long()].long()
            for m in (1, 4, 13):
                x = torch.tensor([127.0, -127.0])[torch.arange(m) % 2, None].repeat(1, cols)
                exact = x.long() @ level.T
                for group in (0, 16, 32, 64):
                    scale = torch.ones(rows, cols // group if group else 1)
                    for int8 in (True, False):
                        args = (weight, scale, levels, None, rows, bits, group, int8)
                        got = dqw.quant_linear(x, *args)
                        torch.testing.assert_close(
                            got, exact.float(), rtol=1e-6, atol=0, msg=f"{grid} {bits} {m} {group}"
                        )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_float_bears_outliers_and_extremes(isa: str) -> None:
    """A row's error stays that of a float32 sum, whatever the spread and the size of its values."""
    with instruction_set(isa):
        levels = grids.levels("apot", 4)
        weight, level = random_weight(40, 600, 4, levels)
        scale, _ = random_scale(40, 600, "channel", 0.1)
        x = torch.randn(20, 600)
        x[0:3, 5] = 1e4  # an outlier, as Whisper has
        x[3:6] *= torch.exp(4 * torch.randn(3, 600))
        x[6] *= 1e30
        x[7] *= 1e-30
        x[8], x[9, 1:] = 0.0, 0.0
        x[10] = 8355711.0 * 2.0**-23  # the largest of three digits, and one beyond
        x[11] = 8355712.0 * 2.0**-23
        exact = x.double() @ (level.double() * scale.double()).T
        plain = x @ (level.float() * scale).T
        for part in (x[:1], x):
            got = dqw.quant_linear(part, weight, scale, levels, None, 40, 4, 0, False)
            error = (got - exact[: len(part)]).abs().amax(1)
            bound = 2 * (plain - exact)[: len(part)].abs().amax(1)
            assert (error <= bound + 1e-6 * exact[: len(part)].abs().amax(1)).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_groups(isa: str, int8: bool) -> None:
    with instruction_set(isa):
        for grid, bits in [*(("apot", b) for b in BITS), ("pot", 6), ("uniform", 5)]:
            levels = grids.levels(grid, bits)
            for granularity, cols in (
                ("16", 200),
                ("16", 2100),  # more columns than the gemv has room for scales
                ("32", 200),
                ("64", 200),
                ("128", 320),
                ("24", 100),
                ("96", 200),
                ("48", 200),
            ):
                for m in (1, 3, 7, 14):
                    weight, level = random_weight(37, cols, bits, levels)
                    scale, group = random_scale(37, cols, granularity, 0.1)
                    x, bias = torch.randn(m, cols), torch.randn(37)
                    w = level.double() * scale.repeat_interleave(group, 1)[:, :cols].double()
                    xs = x.double()
                    if int8:
                        q, s = quantized_rows(x)
                        xs = q.double() * s.double()
                    want = (xs @ w.T + bias).float()
                    bound = 4e-7 * float((xs.abs() @ w.abs().T).max())  # rounding of float32 sums
                    got = dqw.quant_linear(x, weight, scale, levels, bias, 37, bits, group, int8)
                    torch.testing.assert_close(
                        got, want, rtol=0, atol=bound, msg=f"{grid} {bits} {granularity} {m}"
                    )


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128, 192])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_int8_sums_of_groups_are_exact(isa: str, group: int) -> None:
    """Scales that are powers of two, and exact sums of few groups: bit for bit those of int64."""
    with instruction_set(isa):
        for bits in BITS:
            levels = grids.levels("uniform", bits)
            # 2240 columns: more than the gemv has room for scales.
            for m, rows, cols, most in (
                (1, 17, 70, 126),
                (2, 9, 129, 126),
                (4, 33, 200, 126),
                (9, 40, 130, 126),
                (1, 18, 2240, 12),
                (3, 18, 2240, 12),
            ):
                weight, level = random_weight(rows, cols, bits, levels)
                shape = rows, -(-cols // group)
                scale = 2.0 ** torch.randint(0, 3, shape).float() / 4
                x = torch.randint(-most, most + 1, (m, cols)).float()
                x[:, 0] = 127.0  # so that q = x
                unit = scale.repeat_interleave(group, 1)[:, :cols].mul(4).long()
                want = (x.long() @ (level * unit).T).float() / 4
                args = (weight, scale.half(), levels, None, rows, bits, group, True)
                assert torch.equal(dqw.quant_linear(x, *args), want), (bits, m, cols)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_float_is_as_good_as_float32(isa: str) -> None:
    """At most twice the error of a plain float32 product, against float64."""
    with instruction_set(isa):
        for bits in BITS:
            levels = grids.levels("apot", bits)
            for m, rows, cols in ((1, 50, 1023), (4, 33, 65), (7, 70, 512), (30, 33, 200)):
                weight, level = random_weight(rows, cols, bits, levels)
                scale, _ = random_scale(rows, cols, "channel", 0.1)
                x = torch.randn(m, cols)
                exact = x.double() @ (level.double() * scale.double()).T
                plain = x @ (level.float() * scale).T
                got = dqw.quant_linear(x, weight, scale, levels, None, rows, bits, 0, False)
                floor = 1e-6 * float(exact.abs().max())
                assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@pytest.mark.parametrize("granularity", ["tensor", "channel", "16", "32", "64", "128", "24"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_identity_gives_the_exact_weight(isa: str, granularity: str) -> None:
    with instruction_set(isa):
        for bits, levels in [(b, grids.levels("apot", b)) for b in BITS] + [(6, wildest_levels(6))]:
            rows, cols = 19, 130
            weight, _ = random_weight(rows, cols, bits, levels)
            scale, group = random_scale(rows, cols, granularity)
            want = reference.dequantize(weight, scale, levels, rows, cols, bits, group)
            eye = torch.eye(cols)
            for x, part in ((eye, want), (eye[:1], want[:, :1]), (eye[126:130], want[:, 126:130])):
                got = dqw.quant_linear(x, weight, scale, levels, None, rows, bits, group, False)
                assert torch.equal(got.T, part), (bits, len(x))


@pytest.mark.parametrize("int8", [False, True])
def test_every_number_of_rows(int8: bool) -> None:
    """A row's result does not depend on its company, whatever path and block it falls into."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(70, 150, 4, levels)
    scale, _ = random_scale(70, 150, "channel")
    x = torch.randn(1500, 150)
    want = reference.quant_linear(x, weight, scale, levels, None, 70, 4, 0, int8)
    for isa in torch.ops.dqw_cpu.instruction_sets().split():
        with instruction_set(isa):
            for m in [*range(30), 36, 37, 64, 100, 257, 1500]:
                got = dqw.quant_linear(x[:m], weight, scale, levels, None, 70, 4, 0, int8)
                if int8:
                    assert torch.equal(got, want[:m]), (isa, m)
                else:
                    torch.testing.assert_close(got, want[:m], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_half_precision_rounds_once(isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        levels = grids.levels("apot", 4)
        weight, _ = random_weight(50, 70, 4, levels)
        for granularity in ("channel", "16", "32"):
            scale, group = random_scale(50, 70, granularity, 0.1)
            # Many rows of bfloat16 are multiplied in bfloat16 where the tier does that.
            many = [] if isa in ("amx", "avx512_bf16") else [40]
            for m in (1, 4, 13, *many):
                x, bias = torch.randn(m, 70).to(dtype), torch.randn(50).to(dtype)
                for int8 in (False, True):
                    args = (weight, scale.half(), levels, bias, 50, 4, group, int8)
                    want = dqw.quant_linear(x.float(), *args)
                    got = dqw.quant_linear(x, *args)
                    assert got.dtype == dtype and torch.equal(got, want.to(dtype)), (m, int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_nan_and_infinity_stay_in_their_row(isa: str, int8: bool) -> None:
    with instruction_set(isa):
        levels = grids.levels("uniform", 4)
        weight, _ = random_weight(20, 70, 4, levels)
        for granularity in ("channel", "16", "32"):
            scale, group = random_scale(20, 70, granularity)
            for m in (3, 8):
                x = torch.randn(m, 70)
                x[0, 5], x[1, 69] = float("nan"), float("inf")
                got = dqw.quant_linear(x, weight, scale, levels, None, 20, 4, group, int8)
                assert got[0].isnan().all() and not got[1].isfinite().any()
                assert got[2:].isfinite().all()
        zeros = dqw.quant_linear(
            torch.zeros(5, 70), weight, scale, levels, None, 20, 4, group, int8
        )
        assert torch.equal(zeros, torch.zeros(5, 20))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("int8", "group"), [(False, 0), (False, 16), (True, 0), (True, 24)])
def test_autocast_changes_nothing(isa: str, int8: bool, group: int) -> None:
    """Where torch multiplies in here, it must not do so in 16 bits."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(37, 96, 4, levels)
    scale, _ = random_scale(37, 96, str(group) if group else "channel")
    x, bias = torch.randn(40, 96), torch.randn(37)
    with instruction_set(isa):
        found = ops.quant_linear(x, weight, scale, levels, bias, 37, 4, group, int8)
        with torch.autocast("cpu", torch.bfloat16):
            again = ops.quant_linear(x, weight, scale, levels, bias, 37, 4, group, int8)
            through = torch.ops.dqw.quant_linear(x, weight, scale, levels, bias, 37, 4, group, int8)
    assert torch.equal(again, found) and torch.equal(through, found)


def test_shapes_and_strides() -> None:
    levels = grids.levels("apot", 3)
    weight, _ = random_weight(9, 40, 3, levels)
    scale, _ = random_scale(9, 40, "channel")
    args = (weight, scale, levels, None, 9, 3, 0, True)
    for x in (torch.randn(40), torch.randn(2, 3, 40), torch.randn(40, 5).T, torch.randn(2, 0, 40)):
        got = dqw.quant_linear(x, *args)
        assert got.shape == (*x.shape[:-1], 9)
        assert torch.equal(got, reference.quant_linear(x.contiguous(), *args))
    wide = torch.randn(4, 2, 80)[:, :, ::2]
    assert torch.equal(dqw.quant_linear(wide, *args), dqw.quant_linear(wide.contiguous(), *args))
    none = dqw.quant_linear(torch.randn(3, 40), weight[:0], scale[:0], levels, None, 0, 3, 0, False)
    assert none.shape == (3, 0)


def test_wrong_arguments_are_errors() -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(8, 64, 4, levels)
    x, scale = torch.randn(2, 64), torch.ones(8, 1)
    with pytest.raises(RuntimeError, match="packed weight has"):
        dqw.quant_linear(x, weight[:-1], scale, levels, None, 8, 4, 0, False)
    with pytest.raises(RuntimeError, match="levels must be"):
        dqw.quant_linear(x, weight, scale, levels[:8], None, 8, 4, 0, False)
    with pytest.raises(RuntimeError, match="bias must have"):
        dqw.quant_linear(x, weight, scale, levels, torch.ones(7), 8, 4, 0, False)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        dqw.quant_linear(x, weight, torch.ones(8, 2), levels, None, 8, 4, 0, False)


@pytest.mark.parametrize("elsewhere", ["scale", "levels", "bias"])
def test_tensors_of_another_device_are_an_error(elsewhere: str) -> None:
    """By the shortest way; the dispatcher would give the call to that device."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(8, 64, 4, levels)
    parts = {"scale": torch.ones(8, 1), "levels": levels, "bias": torch.ones(8)}
    parts[elsewhere] = parts[elsewhere].to("meta")
    with pytest.raises(RuntimeError, match=rf"{elsewhere}.* must be on the CPU"):
        ops.quant_linear(torch.ones(2, 64), weight, *parts.values(), 8, 4, 0, False)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_levels_may_all_be_0(isa: str, int8: bool) -> None:
    levels = torch.zeros(16, dtype=torch.int16)
    weight, _ = random_weight(32, 128, 4, levels)
    with instruction_set(isa):
        for granularity in ("channel", "16", "32", "64"):
            scale, group = random_scale(32, 128, granularity)
            for m in (1, 2, 8, 70):
                x = torch.randn(m, 128)  # before, to leave something in the kernels' memory
                dqw.quant_linear(
                    x, weight, scale, grids.levels("apot", 4), None, 32, 4, group, int8
                )
                y = dqw.quant_linear(x, weight, scale, levels, None, 32, 4, group, int8)
                assert torch.equal(y.abs(), torch.zeros(m, 32)), (granularity, m)


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(int8: bool) -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(8, 70, 4, levels)
    for granularity in ("channel", "16", "32"):
        scale, group = random_scale(8, 70, granularity)
        for m in (2, 6):
            args = (torch.randn(m, 70), weight, scale, levels, torch.randn(8), 8, 4, group, int8)
            torch.library.opcheck(dqw.quant_linear.default, args)


def test_compiles_whole_and_once_for_all_rows() -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(32, 64, 4, levels)
    scale, _ = random_scale(32, 64, "channel")

    def layer(x: Tensor) -> Tensor:
        return dqw.quant_linear(x.relu(), weight, scale, levels, None, 32, 4, 0, True) + 1

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 3, 8, 100):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1
