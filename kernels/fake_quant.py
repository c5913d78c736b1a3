"""Fake quantization in Triton: rounding to a grid, and its straight-through gradients.

    y         = fake_quant(x, scale, bucket, group_size)
    dx, dscale = fake_quant_backward(grad, x, scale, bucket, group_size)

x (rows, cols) is float32, float16 or bfloat16; scale is float32 of shape (1, 1), (rows, 1) or
(rows, ceil(cols / group_size)); bucket is the int16 rounding table, 2 × level_max + 1 entries. For
t = |x| × (2 / scale), y = copysign(bucket[floor(min(t, 2 level_max))] × scale, x) and NaN stays.

One read and one write of x (the backward reads x and the gradient and recomputes the rest; no mask
is kept). A program owns whole segments, the columns of a row that share one scale, or one of the
``parts`` of a long segment, and sums in a fixed order; torch adds the parts, in a fixed order too.
So dscale is the same on every run: no atomics, and no host synchronization.

Every grid goes through its table: an H100's L1 caches answer about 7 lookups in the time in which
its memory moves one element of a float16 forward pass, so arithmetic would gain nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A product and a sum stay two operations, as in the reference.
_LAUNCH = {"enable_fp_fusion": False}


@triton.jit
def _segments(groups, segment, scale_stride, parts, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (row, group numbers, which exist, where scales lie, first column, end)."""
    per_row = tl.cdiv(groups, SEGMENTS)
    row = tl.program_id(0) // per_row
    group = tl.program_id(0) % per_row * SEGMENTS + tl.arange(0, SEGMENTS)
    length = tl.cdiv(tl.cdiv(segment, parts), BLOCK) * BLOCK
    first = tl.program_id(1) * length
    end = tl.minimum(first + length, segment)
    return row.to(tl.int64), group, group < groups, row * scale_stride + group, first, end


@triton.jit
def _double_level(x, inv):
    """t = |x| × (2 / scale); NaN becomes 0."""
    t = tl.abs(x) * inv
    return tl.where(t == t, t, 0.0)


@triton.jit
def _forward(x_ptr, y_ptr, scale_ptr, bucket_ptr, cols, groups, segment, scale_stride, parts,
             last, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, group, exists, at, first, end = _segments(groups, segment, scale_stride, parts, SEGMENTS,
                                                   BLOCK)  # fmt: skip
    scale = tl.load(scale_ptr + at, mask=exists, other=1.0)[:, None]
    inv = tl.div_rn(2.0, scale)
    for start in range(first, end, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        col = group[:, None] * segment + inner[None, :]
        mask = (inner < segment)[None, :] & (col < cols)
        x = tl.load(x_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
        k = tl.maximum(tl.minimum(_double_level(x, inv), last * 1.0), 0.0).to(tl.int32)
        y = tl.load(bucket_ptr + k).to(tl.float32) * scale
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        y = (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        y = tl.where(x == x, y, x)
        tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad_ptr, x_ptr, dx_ptr, dscale_ptr, scale_ptr, bucket_ptr, cols, groups, segment,
              scale_stride, parts, last, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, group, exists, at, first, end = _segments(groups, segment, scale_stride, parts, SEGMENTS,
                                                   BLOCK)  # fmt: skip
    scale = tl.load(scale_ptr + at, mask=exists, other=1.0)[:, None]
    inv = tl.div_rn(2.0, scale)
    total = tl.zeros((SEGMENTS, BLOCK), tl.float32)
    for start in range(first, end, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        col = group[:, None] * segment + inner[None, :]
        mask = (inner < segment)[None, :] & (col < cols)
        x = tl.load(x_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
        t = tl.abs(x) * inv
        k = tl.maximum(tl.minimum(_double_level(x, inv), last * 1.0), 0.0).to(tl.int32)
        level = tl.load(bucket_ptr + k).to(tl.float32)
        inside = t <= last * 1.0
        # Inside: level - |x| / scale, with the sign of x (t / 2 is that quotient). Outside: level.
        magnitude = tl.where(inside, level - 0.5 * t, level)
        signed = tl.where(x.to(tl.int32, bitcast=True) < 0, -magnitude, magnitude)  # of -0, too
        total += g * tl.where(x == x, signed, x)
        dx = tl.where(inside | (x != x), g, 0.0)
        tl.store(dx_ptr + row * cols + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = dscale_ptr + (row * groups + group) * parts + tl.program_id(1)
    tl.store(out, tl.sum(total, axis=1), mask=exists)


def _tiling(x: Tensor, scale: Tensor, group_size: int) -> tuple[tuple[int, int], list[int], dict]:
    """Launch grid, (cols, groups, segment, scale_stride, parts), block of segments × columns.

    A segment has parts of at least 4096 columns, and enough of them that 512 programs run.
    """
    rows, cols = x.shape
    groups = -(-cols // group_size) if group_size else 1
    segment = group_size or cols
    block = min(1024, triton.next_power_of_2(segment))
    segments = min(triton.next_power_of_2(groups), max(1, 1024 // block))
    programs = rows * triton.cdiv(groups, segments)
    parts = max(1, min(triton.cdiv(512, programs), segment // 4096))
    stride = 0 if scale.shape[0] == 1 and not group_size else groups
    tile = {"SEGMENTS": segments, "BLOCK": block}
    return (programs, parts), [cols, groups, segment, stride, parts], tile


def fake_quant(
    x: Tensor, scale: Tensor, bucket: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Round x (rows, cols) to the grid, in ``dtype`` or x's; the rest is as above."""
    x, scale = x.contiguous(), scale.float().contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        grid, sizes, block = _tiling(x, scale, group_size)
        with torch.cuda.device_of(x):
            _forward[grid](x, y, scale, bucket, *sizes, bucket.numel() - 1, **block, **_LAUNCH)
    return y


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, dscale in scale's shape and dtype; both as in ``dqw.reference``."""
    if x.dtype != torch.float32:  # the kernel's own widening to float32 is exact, and no launch
        grad = grad.to(x.dtype)
    x, grad = x.contiguous(), grad.contiguous()
    scales = scale.float().contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale)
    grid, sizes, block = _tiling(x, scales, group_size)
    groups, parts = sizes[1], sizes[4]
    sums = torch.empty((x.shape[0], groups, parts), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[grid](
            grad, x, dx, sums, scales, bucket, *sizes, bucket.numel() - 1, **block, **_LAUNCH
        )
    sums = sums.squeeze(-1) if parts == 1 else sums.sum(-1)
    if sums.shape != scale.shape:  # per tensor
        sums = sums.sum().reshape(1, 1)
    return dx, sums.to(scale.dtype)
