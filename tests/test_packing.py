"""Packing: the byte layout written out once more, and the way back."""

import pytest
import torch

from dqw.packing import pack, packed_bytes, padded, unpack


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
