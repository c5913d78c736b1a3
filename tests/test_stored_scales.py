"""Scales of groups as a folder stores them, a byte each: every operator gives what halves give."""

import pytest
import torch
from kernel_helpers import (
    INSTRUCTION_SETS,
    instruction_set,
    needs_library,
    random_weight,
)

from dqw import grids
from dqw.packing import pack_scales, round_scales

pytestmark = needs_library
dqw = torch.ops.dqw


def scales(rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all of the 16 octaves that bytes hold: as float16, and as they are stored."""
    half = round_scales(2.0**-18 * torch.exp2(torch.rand(rows, groups) * 15.9)).half()
    return half, pack_scales(half)


@pytest.mark.parametrize("group", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_equal_to_halves(isa: str, group: int) -> None:
    with instruction_set(isa):
        for bits, rows, cols in (
            (4, 1, 1),
            (2, 33, 65),
            (4, 50, 512),
            (8, 19, 1023),
            (4, 40, 2240),
        ):
            levels = grids.levels("apot", bits)
            weight, _ = random_weight(rows, cols, bits, levels)
            half, stored = scales(rows, -(-cols // group))
            rest = (levels, rows, cols, bits, group)
            assert torch.equal(
                dqw.dequantize(weight, stored, *rest), dqw.dequantize(weight, half, *rest)
            )
            ids = torch.randint(0, rows, (2, 3))
            want = dqw.quant_embedding(ids, weight, half, *rest)
            assert torch.equal(dqw.quant_embedding(ids, weight, stored, *rest), want)
            for m in (1, 3, 9, 70):
                for dtype, int8 in (
                    (torch.float32, False),
                    (torch.bfloat16, False),
                    (torch.float32, True),
                ):
                    x = torch.randn(m, cols).to(dtype)
                    rest = (levels, torch.randn(rows), rows, bits, group, int8)
                    got, want = (dqw.quant_linear(x, weight, s, *rest) for s in (stored, half))
                    assert torch.equal(got, want), (bits, cols, m, dtype, int8)


def test_what_does_not_fit() -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(5, 64, 4, levels)
    stored = pack_scales(torch.ones(5, 4).half())
    with pytest.raises(RuntimeError, match=r"have 20 bytes, but those of .* have 21"):
        dqw.dequantize(weight, stored[1:], levels, 5, 64, 4, 16)
    with pytest.raises(RuntimeError, match="those of groups, and group_size is 0"):
        dqw.dequantize(weight, stored, levels, 5, 64, 4, 0)
