"""Packed weights back to floats on the CPU, whole or by rows: every tier, width and granularity."""

import pytest
import torch
from kernel_helpers import (
    INSTRUCTION_SETS,
    all_grids,
    instruction_set,
    needs_library,
    random_scale,
    random_weight,
    wildest_levels,
)

from dqw import grids, reference

pytestmark = needs_library
dqw = torch.ops.dqw


@pytest.mark.parametrize("granularity", ["tensor", "channel", "16", "32", "64", "128", "24"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_equals_the_reference(isa: str, granularity: str) -> None:
    with instruction_set(isa):
        for grid, bits in all_grids():
            levels = grids.levels(grid, bits)
            for rows, cols in ((1, 1), (5, 7), (3, 63), (4, 65), (2, 1023)):
                weight, _ = random_weight(rows, cols, bits, levels)
                scale, group = random_scale(rows, cols, granularity)
                ids = torch.randint(0, rows, (2, 3))
                for s in (scale, scale.half()):
                    args = (weight, s, levels, rows, cols, bits, group)
                    where = (grid, bits, rows, cols)
                    assert torch.equal(dqw.dequantize(*args), reference.dequantize(*args)), where
                    got = dqw.quant_embedding(ids, *args)
                    assert torch.equal(got, reference.quant_embedding(ids, *args)), where


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_any_table(isa: str) -> None:
    with instruction_set(isa):
        for bits in range(2, 9):
            levels = wildest_levels(bits)
            weight, level = random_weight(3, 2**bits + 9, bits, levels)
            got = dqw.dequantize(weight, torch.ones(1, 1), levels, *level.shape, bits, 0)
            assert torch.equal(got, level.float())


def test_ids_of_any_shape_and_integer_type() -> None:
    levels = grids.levels("apot", 4)
    weight, level = random_weight(10, 33, 4, levels)
    args = (weight, torch.ones(1, 1), levels, 10, 33, 4, 0)
    for ids in (
        torch.tensor(3),
        torch.arange(10).view(5, 2).T,
        torch.empty(0, 4, dtype=torch.long),
    ):
        assert torch.equal(dqw.quant_embedding(ids, *args), level.float()[ids])
        assert torch.equal(dqw.quant_embedding(ids.int(), *args), level.float()[ids])


def test_an_id_outside_the_table_is_an_error() -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(10, 33, 4, levels)
    for bad in (-1, 10):
        with pytest.raises((IndexError, RuntimeError), match="outside the embedding's 10 rows"):
            dqw.quant_embedding(
                torch.tensor([0, bad]), weight, torch.ones(1, 1), levels, 10, 33, 4, 0
            )


def test_opcheck() -> None:
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(6, 70, 4, levels)
    scale, group = random_scale(6, 70, "32")
    args = (weight, scale, levels, 6, 70, 4, group)
    torch.library.opcheck(dqw.dequantize.default, args)
    torch.library.opcheck(dqw.quant_embedding.default, (torch.tensor([[1, 5]]), *args))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_small_scales_count_where_tiny_floats_do_not(isa: str) -> None:
    """Halves below 2^-14 are subnormal, and the floats they stand for are not."""
    levels = grids.levels("apot", 4)
    weight, _ = random_weight(1, 1023 * 16, 4, levels)
    scale = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16)[None]
    args = (weight, scale, levels, 1, 1023 * 16, 4, 16)
    with instruction_set(isa):
        wanted = reference.dequantize(*args)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor always counts them")
        try:
            found = dqw.dequantize(*args)
        finally:
            torch.set_flush_denormal(False)
    assert torch.equal(found, wanted)
