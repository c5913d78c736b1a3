"""Fake quantization in Triton: rounding to a grid, and its straight-through gradients.

    y         = fake_quant(x, scale, bucket, group_size)
    dx, dscale = fake_quant_backward(grad, x, scale, bucket, group_size)

x (rows, cols) is float32, float16 or bfloat16; scale is float32 of shape (1, 1), (rows, 1) or
(rows, ceil(cols / group_size)); bucket is the int16 rounding table, 2 × level_max + 1 entries. For
t = |x| × (2 / scale), y = copysign(bucket[floor(min(t, 2 level_max))] × scale, x) and NaN stays.

One read and one write of x (the backward reads x and the gradient and recomputes the rest; no mask
is kept). A segment is the columns of a row that share one scale. It is cut into PARTS units of
PIECES blocks of BLOCK columns, and a program takes UNITS consecutive units of the whole matrix,
wherever rows end. BLOCK divides the usual widths (768 = 3 × 256, 1280 = 5 × 256), so that no lane
idles. A program issues all its loads before the division of its scales, which would hold them up.

A unit is a whole segment if that is not long. The backward sums it in a fixed order; torch adds the
parts of a long one, in a fixed order too. So dscale is the same on every run: no atomics, and no
host synchronization.

Every grid goes through its table: an H100's L1 caches answer about 7 lookups in the time in which
its memory moves one element of a float16 forward pass, so arithmetic would gain nothing.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program and its warps, by bytes an element, as an H100 was fastest or nearly so with
# 768 x 768 and 3072 x 768 (2026-11-27, of 1024 to 4096 elements by 1 to 8 warps). A longer unit is
# a program of its own, with up to MOST_WARPS.
FORWARD = {4: (1024, 4), 2: (2048, 2)}
BACKWARD = {4: (1024, 4), 2: (1024, 4)}
MOST_WARPS = 8

BLOCKS = (1024, 512, 256, 128, 64, 32, 16, 8)
MOST_PIECES = 8  # of a segment that is one unit; all of a thread's loads are in flight together
LONG_PIECES = 4  # of a part of a longer segment
FORWARD_LONGEST = 2048  # columns; a unit of the forward that would be longer is one block instead

# A product and a sum stay two operations, as in the reference.
_LAUNCH = {"enable_fp_fusion": False}
# Whether 16 divides these would only make more variants of a kernel.
_PLAIN = ["count", "last"]


@triton.jit
def _units(scale_ptr, cols, groups, segment, scale_stride, count, UNITS: tl.constexpr,
           LENGTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """A program's units: where its elements begin, where each unit does after that, the unit's
    columns, whether it exists, and its scale, (UNITS, 1).

    64 bits only where it is once a program, or rare: RAGGED, if not every unit has LENGTH columns.
    """
    first = tl.program_id(0).to(tl.int64) * UNITS
    lane = tl.arange(0, UNITS)
    exists = lane < tl.minimum(count - first, UNITS).to(tl.int32)
    number = (first % PARTS).to(tl.int32) + lane
    segments = number // PARTS
    if RAGGED:
        group = (first // PARTS % groups).to(tl.int32) + segments
        skipped = number % PARTS * LENGTH
        col = (group % groups).to(tl.int64) * segment + skipped
        columns = tl.minimum(tl.minimum(segment - skipped, cols - col), LENGTH).to(tl.int32)
        begin = first // PARTS // groups * cols
        offset = (group // groups).to(tl.int64) * cols + col
    else:
        columns = tl.full((UNITS,), LENGTH, tl.int32)
        begin = first * LENGTH
        offset = lane * LENGTH
    scale_ptr += first // PARTS * scale_stride
    scale = tl.load(scale_ptr + segments * scale_stride, mask=exists, other=1.0)[:, None]
    return begin, offset, columns, exists, scale


@triton.jit
def _load(pointer, offset, columns, exists, START: tl.constexpr, BLOCK: tl.constexpr,
          RAGGED: tl.constexpr):  # fmt: skip
    """One block of every unit, with its place and mask; zeros where there is nothing."""
    inner = START + tl.arange(0, BLOCK)
    at = offset[:, None] + inner[None, :]
    mask = exists[:, None]
    if RAGGED:
        mask &= inner[None, :] < columns[:, None]
    return tl.load(pointer + at, mask=mask, other=0.0), at, mask


@triton.jit
def _level(x, inv, bucket_ptr, last):
    """t = |x| × (2 / scale), and the level nearest to x; a t of NaN counts as 0."""
    t = tl.abs(x.to(tl.float32)) * inv
    k = tl.minimum(tl.maximum(t, 0.0), last * 1.0).to(tl.int32)  # of NaN and 0 the maximum is 0
    # A level is not negative: as the lowest bits of the float 2^23 it adds itself. To convert an
    # int16 would be a second slow instruction for every element, beside that of k.
    level = tl.load(bucket_ptr + k).to(tl.uint16, bitcast=True).to(tl.int32) | 0x4B000000
    return t, level.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _sign(x):
    return x.to(tl.int32, bitcast=True) & -2147483648


@triton.jit(do_not_specialize=_PLAIN)
def _forward(x_ptr, y_ptr, scale_ptr, bucket_ptr, cols, groups, segment, scale_stride, count, last,
             UNITS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
             RAGGED: tl.constexpr):  # fmt: skip
    begin, offset, columns, exists, scale = _units(
        scale_ptr, cols, groups, segment, scale_stride, count, UNITS, PIECES * BLOCK, PARTS,
        RAGGED)  # fmt: skip
    loaded, levels = (), ()
    for piece in tl.static_range(PIECES):
        loaded += (_load(x_ptr + begin, offset, columns, exists, piece * BLOCK, BLOCK, RAGGED),)
    inv = tl.div_rn(2.0, scale)
    for piece in tl.static_range(PIECES):
        levels += (_level(loaded[piece][0], inv, bucket_ptr, last)[1],)
    for piece in tl.static_range(PIECES):
        x, at, mask = loaded[piece]
        x = x.to(tl.float32)
        y = (levels[piece] * scale).to(tl.int32, bitcast=True) | _sign(x)
        y = tl.where(x == x, y.to(tl.float32, bitcast=True), x)
        tl.store(y_ptr + begin + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def _backward(grad_ptr, x_ptr, dx_ptr, dscale_ptr, scale_ptr, bucket_ptr, cols, groups, segment,
              scale_stride, count, last, UNITS: tl.constexpr, BLOCK: tl.constexpr,
              PIECES: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    begin, offset, columns, exists, scale = _units(
        scale_ptr, cols, groups, segment, scale_stride, count, UNITS, PIECES * BLOCK, PARTS,
        RAGGED)  # fmt: skip
    loaded, levels = (), ()
    for piece in tl.static_range(PIECES):
        x = _load(x_ptr + begin, offset, columns, exists, piece * BLOCK, BLOCK, RAGGED)[0]
        g, at, mask = _load(grad_ptr + begin, offset, columns, exists, piece * BLOCK, BLOCK, RAGGED)
        loaded += ((x, g, at, mask),)
    inv = tl.div_rn(2.0, scale)
    for piece in tl.static_range(PIECES):
        levels += (_level(loaded[piece][0], inv, bucket_ptr, last),)
    total = tl.zeros((UNITS, BLOCK), tl.float32)
    for piece in tl.static_range(PIECES):
        x, g, at, mask = loaded[piece]
        x, g = x.to(tl.float32), g.to(tl.float32)
        t, level = levels[piece]
        inside = t <= last * 1.0
        # Inside: level - |x| / scale (t / 2 is that quotient). Outside: level. The sign of x, also
        # that of -0, goes to the gradient.
        magnitude = tl.where(x == x, level - tl.where(inside, 0.5 * t, 0.0), x)
        signed = (g.to(tl.int32, bitcast=True) ^ _sign(x)).to(tl.float32, bitcast=True)
        total += magnitude * signed
        dx = tl.where(inside | (x != x), g, 0.0)
        tl.store(dx_ptr + begin + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = dscale_ptr + tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    tl.store(out, tl.sum(total, axis=1), mask=exists)


def _ceiling(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes microseconds


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _tiling(rows: int, cols: int, group_size: int, element_bytes: int, summed: bool) -> dict:
    """The tile of a launch and num_warps, of the backward if ``summed``.

    The block is the widest one of those that need the least padding, in few pieces.
    """
    if element_bytes not in FORWARD:
        raise ValueError("x must be float32, float16 or bfloat16")
    elements, warps = (BACKWARD if summed else FORWARD)[element_bytes]
    segment = min(group_size or cols, cols)
    few = [b for b in BLOCKS if b * MOST_PIECES >= segment]
    block = min(few or BLOCKS[:1], key=lambda b: -segment % b)
    pieces = _ceiling(segment, block) if few else LONG_PIECES
    if not summed and pieces * block > FORWARD_LONGEST:
        pieces = 1
    length = pieces * block
    parts = _ceiling(segment, length)
    count = rows * _ceiling(cols, segment) * parts
    # The nearest power of two: of 1280 columns two units are nearer to 2048 elements than one.
    units = min(1 << max(0, round(math.log2(elements / length))), _power(count))
    warps *= _power(_ceiling(length, elements))
    # A warp with less than 16 bytes a thread of every block would load in narrower pieces.
    warps = max(1, min(warps, MOST_WARPS, units * block * element_bytes // 512))
    return {
        "UNITS": units,
        "BLOCK": block,
        "PIECES": pieces,
        "PARTS": parts,
        "RAGGED": cols % segment != 0 or segment % length != 0,
        "num_warps": warps,
    }


@functools.lru_cache(maxsize=4096)  # a training step waits for Python, and asks for each layer
def _launch(
    rows: int, cols: int, group_size: int, element_bytes: int, summed: bool, per_tensor: bool
) -> tuple[int, tuple[int, ...], dict]:
    """Programs; (cols, groups, segment, scale_stride, count); tile and options."""
    tile = _tiling(rows, cols, group_size, element_bytes, summed)
    segment = min(group_size or cols, cols)
    groups = _ceiling(cols, segment)
    count = rows * groups * tile["PARTS"]
    sizes = (cols, groups, segment, 0 if per_tensor else 1, count)
    return _ceiling(count, tile["UNITS"]), sizes, {**tile, **_LAUNCH}


def _launch_for(x: Tensor, scale: Tensor, group_size: int, summed: bool) -> tuple:
    per_tensor = scale.shape[0] == 1 and not group_size
    return _launch(*x.shape, group_size, x.element_size(), summed, per_tensor)


def fake_quant(
    x: Tensor, scale: Tensor, bucket: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Round x (rows, cols) to the grid, in ``dtype`` or x's; the rest is as above."""
    x, scale = x.contiguous(), scale.float().contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        programs, sizes, options = _launch_for(x, scale, group_size, False)
        with torch.cuda.device_of(x):
            _forward[(programs,)](x, y, scale, bucket, *sizes, bucket.numel() - 1, **options)
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
    programs, sizes, options = _launch_for(x, scales, group_size, True)
    parts = options["PARTS"]
    sums = torch.empty((x.shape[0], sizes[1], parts), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            grad, x, dx, sums, scales, bucket, *sizes, bucket.numel() - 1, **options
        )
    sums = sums.squeeze(-1) if parts == 1 else sums.sum(-1)
    if sums.shape != scale.shape:  # per tensor
        sums = sums.sum().reshape(1, 1)
    return dx, sums.to(scale.dtype)
