"""Linear layers with packed weights in Triton: y = x Wᵀ + bias.

    y = quant_linear(x, weight, scale, levels, bias, rows, bits, group_size, int8_activations)

x (M, cols) float32, float16 or bfloat16, contiguous; weight as in ``dqw.packing``, 2 to 8 bits;
scale (1, 1), (rows, 1) or (rows, groups) float32 or float16; y (M, rows) in x's dtype.
group_size is 0 or a multiple of 16 (``supports``). int8_activations: x was rounded by
``quantize_rows`` and comes as int8 with its row scales.

Levels, not weights, are multiplied: they are exact in float16 and int8, and in bfloat16 up to 6
bits; from 7 bits on bfloat16 takes level = high + low in two products, as int8 does from 5 bits on
(level = low + 256 high). Sums are float32, or integers, and the float32 scale comes after them, so
a weight is rounded once, in y. float32 x uses float32 products, not TF32.

One kernel for all M: a program has BLOCK_N rows of W and BLOCK_M rows of x, and computes
y[BLOCK_N, BLOCK_M] = W xᵀ, so that tensor cores take W, which is always many rows, as their first
operand and x may have as few as 16 columns. Where few programs would run, the columns are split:
SPLIT programs write partial sums and a second kernel adds them in a fixed order. No atomics, no
host synchronization, no gaps in which shapes serve.
"""

import torch
import triton
import triton.language as tl
from dqw_kernels.decode import load_codes, magnitude_bytes, prmt_halves
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# The interpreter has no bfloat16 products; float32 holds them exactly.
FLOAT_DOT = tl.constexpr(INTERPRETED)
_UNKNOWN_PROCESSORS = 132


@triton.jit
def _finish(total, scale_ptr, bias_ptr, row_scale_ptr, n, i, rows, m, scale_stride,
            GROUP: tl.constexpr, INT8: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Scales and bias: (BLOCK_N, BLOCK_M) sums to y, in the reference's order of operations."""
    y = total.to(tl.float32)
    if GROUP == 0:
        scale = tl.load(scale_ptr + n * scale_stride, mask=n < rows, other=0.0).to(tl.float32)
        if INT8:
            row_scale = tl.load(row_scale_ptr + i, mask=i < m, other=0.0)
            y = y * (row_scale[None, :] * scale[:, None])
        else:
            y = y * scale[:, None]
    elif INT8:
        y = y * tl.load(row_scale_ptr + i, mask=i < m, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _planes(level, DTYPE: tl.constexpr, INT8: tl.constexpr):
    """level = low + high × (256 if INT8 else 1), both exact in DTYPE."""
    if INT8:
        low = (level + 128 & 255) - 128
        return low.to(tl.int8), (level - low >> 8).to(tl.int8)
    else:
        high = level.to(tl.float32).to(DTYPE)
        return (level.to(tl.float32) - high.to(tl.float32)).to(DTYPE), high


@triton.jit
def _dot(w, x, total):
    if FLOAT_DOT and x.dtype == tl.bfloat16:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _multiply(level, x, low, high, INT8: tl.constexpr, PLANES: tl.constexpr):
    """low, high += level xᵀ; level int32 or already x's dtype, (BLOCK_N, K); x (K, BLOCK_M)."""
    if PLANES == 2:
        w_low, w_high = _planes(level, x.dtype, INT8)
        low = _dot(w_low, x, low)
        high = _dot(w_high, x, high)
    else:
        if x.dtype == tl.bfloat16:
            level = level.to(tl.float32)
        low = _dot(level.to(x.dtype), x, low)
    return low, high


@triton.jit
def _sum(low, high, INT8: tl.constexpr, PLANES: tl.constexpr):
    if PLANES == 1:
        return low
    elif INT8:
        return low.to(tl.int64) + high.to(tl.int64) * 256
    else:
        return low + high


@triton.jit(do_not_specialize=["m"])
def _linear(x_ptr, weight_ptr, scale_ptr, levels_ptr, bias_ptr, row_scale_ptr, y_ptr,
            m, rows, cols, blocks, scale_stride, steps,
            BITS: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr, PLANES: tl.constexpr,
            HAS_BIAS: tl.constexpr, PRMT: tl.constexpr, SPLIT: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """``steps``: of BLOCKS blocks of 64 columns, for each of the SPLIT programs of a tile."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 32 * BLOCKS)
    j = (column % 32)[None, :]
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    low = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    high = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PRMT:
        tables = magnitude_bytes(levels_ptr, x_ptr.dtype.element_ty)
    row_start = weight_ptr + n.to(tl.int64)[:, None] * (blocks * 8 * BITS)
    x_start = x_ptr + i.to(tl.int64)[None, :] * cols
    start = tl.program_id(2) * steps * BLOCKS
    for step in range(0, steps):
        b = start + step * BLOCKS + column // 32
        at = row_start + (b * (8 * BITS))[None, :]
        mask = (n < rows)[:, None] & (b < blocks)[None, :]
        if PRMT:
            halves = prmt_halves(tl.load(at + j, mask=mask, other=0), tables,
                                 x_ptr.dtype.element_ty)  # fmt: skip
        for half in tl.static_range(2):
            k = (b * 64 + 32 * half + column % 32)[:, None]
            x = tl.load(x_start + k, mask=(i < m)[None, :] & (k < cols), other=0.0)
            if PRMT:
                level = halves[half]
            else:
                level = tl.load(levels_ptr + load_codes(at, j, half, mask, BITS))
                if INT8 or PLANES == 2:
                    level = level.to(tl.int32)
            # A group that ends inside 32 columns: one product for each 16, beside zeros, because
            # int8 products take no fewer columns.
            for quarter in tl.static_range(2 if GROUP % 32 != 0 else 1):
                own = x
                if GROUP % 32 != 0:
                    own = tl.where((column // 16 == quarter)[:, None], x, tl.zeros_like(x))
                low, high = _multiply(level, own, low, high, INT8, PLANES)
                if GROUP != 0 and (GROUP % 64 != 0 or half == 1):
                    # BLOCKS is 1 here, and the sums so far lie in one group.
                    first = (start + step) * 64
                    if GROUP % 64 != 0:
                        first += 32 * half + 16 * quarter
                    mask_n = n < tl.where(first < cols, rows, 0)
                    at_n = scale_ptr + n * scale_stride + first // GROUP
                    scale = tl.load(at_n, mask=mask_n, other=0.0)
                    part = _sum(low, high, INT8, PLANES).to(tl.float32)
                    total += part * scale.to(tl.float32)[:, None]
                    low = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
                    high = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    if GROUP == 0:
        result = _sum(low, high, INT8, PLANES)
    else:
        result = total
    if SPLIT == 1:
        y = _finish(result, scale_ptr, bias_ptr, row_scale_ptr, n, i, rows, m, scale_stride,
                    GROUP, INT8, HAS_BIAS)  # fmt: skip
        out = y_ptr + i.to(tl.int64)[None, :] * rows + n[:, None]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (i < m)[None, :])
    else:
        slot = tl.program_id(2).to(tl.int64) * m + i
        out = y_ptr + slot[None, :] * rows + n[:, None]
        tl.store(out, result.to(y_ptr.dtype.element_ty),
                 mask=(n < rows)[:, None] & (i < m)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def _add_parts(parts_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, m, rows, scale_stride,
               GROUP: tl.constexpr, INT8: tl.constexpr, HAS_BIAS: tl.constexpr,
               SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(1) + tl.arange(0, 1)
    mask = (n < rows)[:, None] & (i < m)[None, :]
    total = tl.zeros((BLOCK_N, 1), parts_ptr.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        slot = part * m.to(tl.int64) + i
        total += tl.load(parts_ptr + slot[None, :] * rows + n[:, None], mask=mask, other=0)
    y = _finish(total, scale_ptr, bias_ptr, row_scale_ptr, n, i, rows, m, scale_stride, GROUP,
                INT8, HAS_BIAS)  # fmt: skip
    out = y_ptr + i.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows(x_ptr, q_ptr, scale_ptr, cols, BLOCK: tl.constexpr):
    """A row to int8: the operations of ``dqw.reference._quantize_rows``, one by one."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, cols, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(x_ptr + row * cols + k, mask=k < cols, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, x)
        bad |= (x == x) & (x < float("inf")) == 0
    top = tl.max(largest)
    finite = tl.max(bad.to(tl.int32)) == 0
    factor = tl.div_rn(1.0, top) * 127.0  # how torch divides a number by a tensor
    factor = tl.where(factor < float("inf"), factor, 127.0)
    for start in range(0, cols, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * cols + k, mask=k < cols, other=0.0).to(tl.float32)
        # 1.5 × 2^23 has a unit of 1 in its last place: the sum rounds ties to even, as torch does.
        t = tl.where(finite, x, 0.0) * factor
        q = (t + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(q, -127.0), 127.0)
        tl.store(q_ptr + row * cols + k, q.to(tl.int8), mask=k < cols)
    tl.store(scale_ptr + row, tl.where(finite, tl.div_rn(top, 127.0), float("nan")))


def supports(cols: int, group_size: int, int8_activations: bool) -> bool:
    """Whether this kernel serves; if not, dequantize and multiply (or the reference) does.

    Groups must not end inside 16 columns, and int32 sums hold 65536 products of 127 × 128.
    """
    return group_size % 16 == 0 and not (int8_activations and cols > 65536)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, cols) → int8 of the same shape and float32 row scales (M)."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        block = min(2048, triton.next_power_of_2(max(x.shape[1], 1)))
        with torch.cuda.device_of(x):
            _quantize_rows[(x.shape[0],)](x, q, scale, x.shape[1], BLOCK=block,
                                          enable_fp_fusion=False)  # fmt: skip
    return q, scale


def tiling(
    m: int, rows: int, cols: int, group_size: int, planes: int, processors: int, wide: bool = False
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCKS and SPLIT.

    Splitting goes on until every processor has two programs or a program has two steps left. Two
    planes have two sums, which at 128 × 128 would spill, and so would a tile of two blocks where x
    is ``wide``, float32: 6 KB a thread. Of 404 tiles on an H100 (2026-11-27, 16 and 64 rows,
    1280 → 1280, 1280 → 5120 and back) these were the best or within 10 % of it: at 64 rows two
    blocks a step took 12.3 us for 9.2 (1280 → 5120), but 12.6 for 13.7 where columns are many.
    """
    block_m = min(128 // planes, max(16, triton.next_power_of_2(m)))
    block_n = 128 if block_m == 128 else 64
    some = block_m == 64 and cols <= 2048
    blocks = 1 if group_size or block_m == 128 or wide or some else 2
    tiles = triton.cdiv(rows, block_n) * triton.cdiv(m, block_m)
    steps = triton.cdiv(cols, 64 * blocks)
    split = 1
    while m <= 64 and split < 16 and tiles * split < 2 * processors and steps >= 4 * split:
        split *= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCKS": blocks, "SPLIT": split}


def launch(tile: dict[str, int], int8: bool) -> dict[str, int | bool]:
    """Warps and pipeline stages. A product and a sum stay two operations in the integer path, so
    that it agrees with the reference bit for bit."""
    large = tile["BLOCK_M"] == 128
    return {"num_warps": 8 if large else 4, "num_stages": 3 if large else 4,
            "enable_fp_fusion": not int8}  # fmt: skip


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _UNKNOWN_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def constants(bits: int, dtype: torch.dtype, group_size: int, int8: bool, bias: bool) -> dict:
    """The kernel's constants that follow from the problem's kind."""
    if int8:
        planes = 2 if bits >= 5 else 1
    else:
        planes = 2 if bits >= 7 and dtype == torch.bfloat16 else 1
    prmt = bits == 4 and not int8 and dtype != torch.float32 and not INTERPRETED
    # Groups of 64, 128, … all end with a block: scaling every block serves them alike.
    return {"BITS": bits, "GROUP": group_size, "INT8": int8, "PLANES": planes,
            "HAS_BIAS": bias, "PRMT": prmt}  # fmt: skip


def quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    """As in the module's docstring, for any M; x's last dimension may have no columns."""
    x, scale = x.contiguous(), scale.contiguous()
    m, cols = x.shape
    y = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    row_scale = x
    kind = constants(bits, x.dtype, group_size, int8_activations, bias is not None)
    if int8_activations:
        x, row_scale = quantize_rows(x)
    wide = x.dtype == torch.float32
    tile = tiling(m, rows, cols, group_size, kind["PLANES"], processors(x.device), wide)
    split, block_m, block_n = tile["SPLIT"], tile["BLOCK_M"], tile["BLOCK_N"]
    blocks = triton.cdiv(cols, 64)
    steps = triton.cdiv(blocks, tile["BLOCKS"] * split)
    stride = 0 if scale.shape[0] == 1 and not group_size else scale.shape[1]
    bias_or_any = scale if bias is None else bias.contiguous()
    out = y
    if split > 1:
        kept = torch.int64 if int8_activations and not group_size else torch.float32
        out = torch.empty((split, m, rows), dtype=kept, device=x.device)
    grid = (triton.cdiv(rows, block_n), triton.cdiv(m, block_m), split)
    with torch.cuda.device_of(x):
        _linear[grid](x, weight, scale, levels, bias_or_any, row_scale, out, m, rows, cols, blocks,
                      stride, steps, **kind, **tile, **launch(tile, int8_activations))  # fmt: skip
        if split > 1:
            names = ("GROUP", "INT8", "HAS_BIAS")
            _add_parts[(triton.cdiv(rows, 256), m)](
                out, scale, bias_or_any, row_scale, y, m, rows, stride,
                **{name: kind[name] for name in names}, SPLIT=split, BLOCK_N=256,
                enable_fp_fusion=not int8_activations)  # fmt: skip
    return y
