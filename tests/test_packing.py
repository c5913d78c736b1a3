"""Packing: the byte layout written out once more, and the way back."""

import pytest
import torch

from dqw.packing import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    pack,
    pack_scales,
    packed_bytes,
    packed_scale_bytes,
    padded,
    round_scales,
    unpack,
    unpack_scales,
)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (7, 130), (0, 64), (5, 1023)])
def test_round_trip(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    weight = pack(codes, bits)
    assert weight.dtype == torch.uint8 and weight.dim() == 1
    assert weight.numel() == packed_bytes(*shape, bits) == shape[0] * padded(shape[1]) * bits // 8
    assert torch.equal(unpack(weight, *shape, bits), codes)


def test_layout_of_planes() -> None:
    """7 bits: a 4-bit plane of bits 0-3, a 2-bit plane of bits 4-5, a 1-bit plane of bit 6."""
    code = torch.randint(0, 128, (1, 64), dtype=torch.uint8)
    c = code[0].tolist()
    expected = [c[j] & 15 | (c[j + 32] & 15) << 4 for j in range(32)]
    expected += [sum((c[j + 16 * i] >> 4 & 3) << 2 * i for i in range(4)) for j in range(16)]
    expected += [sum((c[8 * j + i] >> 6) << i for i in range(8)) for j in range(8)]
    assert pack(code, 7).tolist() == expected


def test_wrong_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes 192"):
        unpack(torch.zeros(100, dtype=torch.uint8), 3, 128, 4)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (200, 33), (0, 4)])
@pytest.mark.parametrize("unit", [SMALLEST_SCALE, 2.0**-9, LARGEST_SCALE / 2.0**15])
def test_scales_round_trip(shape: tuple[int, int], unit: float) -> None:
    scale = round_scales(unit * torch.exp2(torch.rand(shape) * 15)).half()
    packed = pack_scales(scale)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_scale_bytes(*shape),)
    assert torch.equal(unpack_scales(packed, *shape), scale)


def test_layout_of_scales() -> None:
    """1.5 × 2^-3 beside 2^-3 and 1.0625 × 2^-2: 124 is the float32 exponent field of 2^-3."""
    scale = torch.tensor([[0.1875, 0.125], [0.265625, 0.125]], dtype=torch.float16)
    assert pack_scales(scale).tolist() == [124, 8, 0, 17, 0]


def test_rounding_of_scales() -> None:
    x = torch.exp2(torch.rand(10_000) * 30 - 20)
    rounded = round_scales(x)
    assert ((rounded / x - 1).abs() <= 1 / 32).all()  # half a step of 1/16
    assert torch.equal(round_scales(rounded), rounded)
    assert torch.equal(rounded.half().float(), rounded)
    assert round_scales(torch.tensor([1 + 1 / 32])).item() == 1 + 1 / 16  # a tie goes up
    edge = torch.tensor([SMALLEST_SCALE, LARGEST_SCALE])
    assert torch.equal(round_scales(edge).half().float(), edge)


@pytest.mark.parametrize("wrong", [[0.1, 0.1], [1.0, 0.0], [1.0, -1.0], [1.0, 2.0**-16]])
def test_scales_that_no_byte_holds_are_an_error(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="scale"):
        pack_scales(torch.tensor([wrong]).half())
