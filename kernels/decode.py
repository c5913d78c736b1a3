"""Packed codes to levels, for every Triton kernel that reads a packed weight.

The format is that of ``dqw.packing``: blocks of 64 codes, split into planes of 4, 2 and 1 bits. The
kernels work on half blocks, the columns 32 h + j with j = 0 … 31, because both halves of a 4-bit
plane lie in the same 32 bytes: one load serves two dot products of 32 columns.

Levels come out of the table in two ways. Any width: a gather from ``levels``, at most 512 bytes
that stay in L1. 4 bits to float16 or bfloat16: in registers, by PRMT, 15 instructions for 8 codes
(``PRMT_DECODE``). A level fits 16 bits exactly, as two bytes that are looked up apart: PRMT picks 4
of 8 bytes by 3-bit indices, and 8 is just the number of magnitudes that 4-bit codes have; their
signs are ORed in. It is exact because no arithmetic is done at all. It relies on
level[8 + i] = -level[i], which every grid of ``dqw.grids`` keeps.
"""

import triton
import triton.language as tl

# $4: four bytes of a 4-bit plane, so nibbles n0 … n7; n0 n2 n4 n6 are columns j … j+3 of the first
# half, n1 n3 n5 n7 of the second. $5, $9: the high bytes of magnitudes 0-3 and 4-7, $13, $17: the
# low bytes (each operand comes four times, once a byte). $0 $1: first half, $2 $3: second half.
PRMT_DECODE = tl.constexpr("""
{
.reg .b32 l, s, a, b, x, y;
shl.b32 l, $4, 4;
and.b32 s, $4, 0x77777777;
prmt.b32 a, $5, $9, s;
prmt.b32 x, $13, $17, s;
shr.u32 s, s, 16;
prmt.b32 b, $5, $9, s;
prmt.b32 y, $13, $17, s;
prmt.b32 s, l, $4, 0x5140;
lop3.b32 a, a, s, 0x80808080, 0xf8;
prmt.b32 s, l, $4, 0x7362;
lop3.b32 b, b, s, 0x80808080, 0xf8;
prmt.b32 $0, x, a, 0x6240;
prmt.b32 $1, y, b, 0x6240;
prmt.b32 $2, x, a, 0x7351;
prmt.b32 $3, y, b, 0x7351;
}
""")
_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 17))


@triton.jit
def load_codes(block, j, half: tl.constexpr, mask, BITS: tl.constexpr):
    """Codes, int32, of columns 32 × half + j of the blocks that start at pointers ``block``."""
    code = tl.zeros(mask.shape, tl.int32)
    if BITS == 8:
        code = tl.load(block + 32 * half + j, mask=mask, other=0).to(tl.int32)
    if BITS & 4:
        code = tl.load(block + j, mask=mask, other=0).to(tl.int32) >> 4 * half & 15
    if BITS & 2:
        two = tl.load(block + 8 * (BITS & 4) + j % 16, mask=mask, other=0).to(tl.int32)
        code |= (two >> (4 * half + 2 * (j // 16)) & 3) << (BITS & 4)
    if BITS & 1:
        one = tl.load(block + 8 * (BITS & 6) + 4 * half + j // 8, mask=mask, other=0).to(tl.int32)
        code |= (one >> j % 8 & 1) << (BITS & 6)
    return code


@triton.jit
def magnitude_bytes(levels, DTYPE: tl.constexpr):
    """The 8 magnitudes of a 4-bit grid as DTYPE: high bytes of 0-3, 4-7, low bytes of 0-3, 4-7."""
    i = tl.arange(0, 8)
    bits = tl.load(levels + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    high, low = bits >> 8 & 255, bits & 255
    shift = i % 4 * 8
    high, low = high << shift, low << shift
    return (tl.sum(tl.where(i < 4, high, 0)), tl.sum(tl.where(i < 4, 0, high)),
            tl.sum(tl.where(i < 4, low, 0)), tl.sum(tl.where(i < 4, 0, low)))  # fmt: skip


@triton.jit
def prmt_halves(plane, tables, DTYPE: tl.constexpr):
    """Levels as DTYPE of both halves, from bytes of a 4-bit plane and ``magnitude_bytes``."""
    first, second = tl.inline_asm_elementwise(
        PRMT_DECODE, _CONSTRAINTS, [plane, tables[0], tables[1], tables[2], tables[3]],
        dtype=(tl.int16, tl.int16), is_pure=True, pack=4)  # fmt: skip
    return first.to(DTYPE, bitcast=True), second.to(DTYPE, bitcast=True)
