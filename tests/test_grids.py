"""Levels against the published construction, written out, and the rounding rule by brute force."""

import pytest
import torch

from dqw import grids, ops
from dqw.errors import UserError
from dqw.fake_quant import least_squares_scale
from dqw.packing import round_scales
from dqw.recipe import QuantSpec
from tests.kernel_helpers import all_grids

# build_power_value's levels times their common denominator, as printed by the authors' release.
PUBLISHED = {
    2: (0, 1),
    3: (0, 1, 2, 4),
    4: (0, 1, 2, 3, 4, 6, 8, 10),
    5: (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48),
    6: (
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21, 24, 28, 32, 34, 36, 38, 48, 52),
        *(64, 65, 68, 69, 72, 76, 96, 100),
    ),
    7: (
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21, 24, 28, 32, 33, 34, 35, 40, 42),
        *(48, 49, 56, 64, 66, 68, 70, 80, 84, 96, 98, 112, 128, 129, 132, 133, 136, 140, 160, 161),
        *(168, 192, 196, 224, 256, 257, 258, 259, 264, 266, 272, 273, 280, 320, 322, 336, 384),
        *(385, 392, 448),
    ),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_apot_is_the_published_grid(bits: int) -> None:
    assert grids.magnitudes("apot", bits) == PUBLISHED[bits]


def test_apot_8_bits_extends_the_rule() -> None:
    values = grids.magnitudes("apot", 8)
    assert len(values) == 128 and values[-4:] == (784, 792, 896, 904)
    assert values[:20] == (*range(17), 18, 20, 22)


def test_uniform_and_pot() -> None:
    assert grids.magnitudes("uniform", 4) == tuple(range(8))
    assert grids.magnitudes("pot", 4) == (0, 1, 2, 4, 8, 16, 32, 64)
    assert grids.level_max("pot", 8) == 2**14  # cut there: int16, and 2**-14 of the clip


@pytest.mark.parametrize(("grid", "bits"), all_grids())
def test_bucket_gives_the_nearest_level_and_ties_go_up(grid: str, bits: int) -> None:
    values = torch.tensor(grids.magnitudes(grid, bits))
    top = int(values[-1])
    doubled = torch.arange(2 * top + 1)
    if top > 1000:  # all of them at up to 1000, a sample above
        doubled = torch.cat([doubled[:500], doubled[500::97], doubled[-3:]])
    for y in (doubled / 2, doubled / 2 + 0.25):
        distance = (y[:, None] - values).abs()
        nearest = len(values) - 1 - distance.flip(1).argmin(1)  # the larger of two equals
        nearest = values[nearest].clamp(max=top)
        assert torch.equal(grids.bucket(grid, bits)[doubled].long(), nearest)


def test_four_bit_apot_is_arithmetic() -> None:
    y = torch.arange(0, 10.01, 0.25)
    rule = torch.where(y < 4, (y + 0.5).floor(), 2 * (y / 2 + 0.5).floor())
    index = (2 * y).floor().clamp(max=20).long()
    assert torch.equal(grids.bucket("apot", 4)[index].float(), rule)


@pytest.mark.parametrize(("grid", "bits"), all_grids())
def test_codes_and_levels_are_inverse(grid: str, bits: int) -> None:
    table, back = grids.levels(grid, bits), grids.code_of_level(grid, bits)
    top = grids.level_max(grid, bits)
    if 0 in grids.magnitudes(grid, bits):
        assert table[0] == 0 and back[top] == 0
    for value in grids.magnitudes(grid, bits):
        assert table[int(back[top + value])] == value
        assert table[int(back[top - value])] == -value


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="choose 2 to 8"):
        grids.magnitudes("apot", bits)


def test_unknown_grid_is_refused() -> None:
    with pytest.raises(UserError, match="apot, pot, uniform, lloyd"):
        grids.levels("nf", 4)


def test_lloyd_has_two_to_five_bits_and_no_zero() -> None:
    for bits in grids.widths("lloyd"):
        assert len(grids.levels("lloyd", bits).unique()) == 2**bits
        assert grids.bucket("lloyd", bits)[0] == grids.magnitudes("lloyd", bits)[0] > 0
    with pytest.raises(UserError, match="choose uniform from 6 on"):
        grids.levels("lloyd", 6)


@pytest.mark.parametrize("bits", grids.widths("lloyd"))
def test_lloyd_has_the_least_error_on_normal_weights_in_groups(bits: int) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))

    def error(grid: str) -> float:
        bucket = grids.bucket(grid, bits)
        scale = least_squares_scale(weight, QuantSpec(bits=bits, grid=grid, group_size=16), bucket)
        return float((ops.fake_quant(weight, scale, bucket, 16) - weight).square().sum())

    assert error("lloyd") < 0.85 * min(error("apot"), error("uniform"))


def test_scales_of_a_byte_cost_little() -> None:
    """What dqw.packing says of them: 3 % of squared error, where groups of 32 cost 25 %."""
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    bucket = grids.bucket("lloyd", 4)
    error = {}
    for size in (16, 32):
        scale = least_squares_scale(weight, QuantSpec(grid="lloyd", group_size=size), bucket)
        for name, used in (("exact", scale), ("byte", round_scales(scale))):
            rounded = ops.fake_quant(weight, used, bucket, size)
            error[name, size] = float((rounded - weight).square().sum())
    assert 1.02 < error["byte", 16] / error["exact", 16] < 1.04
    assert 1.2 < error["exact", 32] / error["exact", 16] < 1.3
