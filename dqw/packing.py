"""Codes to bytes and back: the packed format, as weights lie in memory and, coded or not, on disk.

Rows follow each other; a row is padded with code 0 to a multiple of 64 codes, and every block of
64 codes takes 8 × bits bytes, with no bit unused. Inside a block the code's bits are split into
planes, lowest bits first, so that a kernel can widen a whole block with shifts and masks:

    4-bit plane, if bits & 4   32 bytes   byte j = code[j] | code[j+32] << 4
    2-bit plane, if bits & 2   16 bytes   byte j = code[j] | code[j+16] << 2 | … | code[j+48] << 6
    1-bit plane, if bits & 1    8 bytes   bit k  = code[k], little endian
    8 bits                     64 bytes   byte j = code[j]

The tensor is flat. That is on purpose: no loader that does not know the format can take it for a
matrix of floats, so opening a packed folder without dqw stops with a size mismatch.

Scales of groups are positive floats of 4 exponent and 4 mantissa bits, a byte each: byte 0 of the
flat tensor is the float32 exponent field of the smallest, the others, row by row, are what the
upper 12 bits of the float32 exceed those of 2^(byte 0 - 127) by. Modules hold them as float16,
which is exact; the CPU's operators take either. Against exact scales the squared error of normal
weights at 4 bits in groups of 16 grows by 3 %; groups of 32, which take as many bytes with float16
scales, would add 25 %.

Format 4 holds a tensor entropy-coded (``dqw.coding``) where that takes fewer bytes; the name and
the bytes of such a tensor are listed in ``quantization_config.coded``. Format 2 had none; format 3,
of a day, coded weights row by row and is not read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqw.errors import UserError

FORMAT_VERSION = 4
READABLE: Sequence[int] = (2, 4)
BLOCK = 64  # codes


def check_format(version: int) -> None:
    """Raise UserError for a format that this version of dqw does not read."""
    if version not in READABLE:
        raise UserError(
            f"the folder is in packed format {version}, and this dqw reads format "
            f"{' and '.join(map(str, READABLE))}: install the dqw that wrote it, or compress again."
        )


def padded(cols: int) -> int:
    """``cols`` rounded up to whole blocks."""
    return -(-cols // BLOCK) * BLOCK


def packed_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of a packed (rows, cols) matrix."""
    return rows * padded(cols) // 8 * bits


def _planes(bits: int) -> list[int]:
    """Widths of a block's planes, in the order they lie in memory."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` (rows, cols), uint8 below 2**bits, into flat uint8 of ``packed_bytes``."""
    rows, cols = codes.shape
    codes = torch.nn.functional.pad(codes, (0, padded(cols) - cols))
    blocks = codes.view(rows, padded(cols) // BLOCK, BLOCK)
    out, shift = [], 0
    for width in _planes(bits):
        plane = blocks >> shift & (1 << width) - 1
        parts = 8 // width
        if width == 1:  # bit k of byte j is code 8j + k
            plane = plane.unflatten(-1, (8, 8)).transpose(-1, -2)
        else:  # part i of byte j is code j + i × 64/parts
            plane = plane.unflatten(-1, (parts, BLOCK // parts))
        packed = torch.zeros_like(plane[..., 0, :])
        for i in range(parts):
            packed |= plane[..., i, :] << i * width
        out.append(packed)
        shift += width
    return torch.cat(out, dim=-1).flatten()


def unpack(weight: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """The codes (rows, cols), uint8, of a packed ``weight``; the inverse of ``pack``.

    Raises ValueError if ``weight`` has not the size that (rows, cols) at ``bits`` takes.
    """
    if weight.numel() != packed_bytes(rows, cols, bits):
        raise ValueError(
            f"packed weight has {weight.numel()} bytes, "
            f"but ({rows}, {cols}) at {bits} bits takes {packed_bytes(rows, cols, bits)}"
        )
    blocks = weight.view(rows, padded(cols) // BLOCK, 8 * bits)
    codes = torch.zeros(rows, padded(cols) // BLOCK, BLOCK, dtype=torch.uint8, device=weight.device)
    start = shift = 0
    for width in _planes(bits):
        plane = blocks[..., start : start + 8 * width]
        parts = 8 // width
        fields = torch.stack([plane >> i * width & (1 << width) - 1 for i in range(parts)], dim=-2)
        if width == 1:
            fields = fields.transpose(-1, -2)
        codes |= fields.flatten(-2) << shift
        start, shift = start + 8 * width, shift + width
    return codes.view(rows, padded(cols))[:, :cols].contiguous()


# ---- scales of groups ----

_DROPPED = 23 - 4  # mantissa bits of a float32 that a scale has not
SMALLEST_SCALE = 2.0**-20  # the smallest that float16 holds with 4 bits of mantissa
LARGEST_SCALE = 31 * 2.0**11  # the largest that float16 holds


def round_scales(scale: Tensor) -> Tensor:
    """Positive float32 ``scale`` to the nearest with 4 bits of mantissa; ties go up."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + (1 << _DROPPED - 1)) & -(1 << _DROPPED)).view(torch.float32)


def packed_scale_bytes(rows: int, groups: int) -> int:
    """Bytes of the packed scales of (rows, groups)."""
    return 1 + rows * groups


def pack_scales(scale: Tensor) -> Tensor:
    """Scales (rows, groups), float16, to flat uint8.

    Raises ValueError for one that is not positive, has more than 4 bits of mantissa, or lies 16
    octaves or more above the smallest.
    """
    bits = scale.float().flatten().view(torch.int32)
    upper = bits >> _DROPPED
    lowest = upper.min() >> 4 if bits.numel() else upper.new_tensor(127)
    code = upper - (lowest << 4)
    if bits.numel() and (bool((bits <= 0).any()) or bool((upper << _DROPPED != bits).any())):
        raise ValueError("a scale is not positive, or has more than 4 bits of mantissa")
    if bits.numel() and int(code.max()) > 255:
        raise ValueError("the scales of a weight span more than 16 octaves")
    return torch.cat([lowest.view(1), code]).to(torch.uint8)


def unpack_scales(packed: Tensor, rows: int, groups: int) -> Tensor:
    """The scales (rows, groups), float16, of flat uint8; the inverse of ``pack_scales``."""
    code = packed.to(torch.int32)
    bits = (code[1:] + (code[:1] << 4)) << _DROPPED
    return bits.view(torch.float32).half().view(rows, groups)
