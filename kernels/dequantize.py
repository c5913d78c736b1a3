"""Packed codes back to a matrix in Triton, and rows of a packed table by id.

    w = dequantize(weight, scale, levels, rows, cols, bits, group_size, dtype)     (rows, cols)
    y = gather(ids, weight, scale, levels, rows, cols, bits, group_size, dtype)    (ids, cols)

level × scale in float32, rounded once to ``dtype``: exactly the reference's weights. Any group
size. Codes are read once, the matrix is written once. A program has one block of ROWS rows and
64 × BLOCKS columns; the halves of a block of 64 columns are contiguous 32 elements each.
"""

import torch
import triton
import triton.language as tl
from dqw_kernels.decode import load_codes
from torch import Tensor


@triton.jit(do_not_specialize=["count"])  # one kernel for any number of tokens
def _dequantize(ids_ptr, weight_ptr, scale_ptr, levels_ptr, y_ptr, count, rows, cols, blocks,
                group, scale_stride, BITS: tl.constexpr, GATHER: tl.constexpr,
                ROWS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 32 * BLOCKS)
    j = (column % 32)[None, :]
    b = tl.program_id(1) * BLOCKS + column // 32
    if GATHER:
        row = tl.load(ids_ptr + i, mask=i < count, other=0).to(tl.int64)
    else:
        row = i.to(tl.int64)
    known = (row >= 0) & (row < rows)
    mask = ((i < count) & known)[:, None] & (b < blocks)[None, :]
    at = weight_ptr + row[:, None] * (blocks * 8 * BITS) + (b * (8 * BITS))[None, :]
    for half in tl.static_range(2):
        k = (b * 64 + 32 * half)[None, :] + j
        code = load_codes(at, j, half, mask, BITS)
        level = tl.load(levels_ptr + code).to(tl.float32)
        where = scale_ptr + row[:, None] * scale_stride + k // group
        scale = tl.load(where, mask=mask & (k < cols), other=0.0).to(tl.float32)
        y = tl.where(known[:, None], level * scale, float("nan"))
        out = y_ptr + i.to(tl.int64)[:, None] * cols + k
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(i < count)[:, None] & (k < cols))


def _launch(
    ids: Tensor | None, weight: Tensor, scale: Tensor, levels: Tensor, count: int, rows: int,
    cols: int, bits: int, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = torch.empty((count, cols), dtype=dtype, device=weight.device)
    if y.numel():
        scale = scale.contiguous()
        stride = 0 if scale.shape[0] == 1 and not group_size else scale.shape[1]
        blocks = triton.cdiv(cols, 64)
        tile = {"ROWS": 1 if count < 64 else 8, "BLOCKS": min(8, triton.next_power_of_2(blocks))}
        grid = (triton.cdiv(count, tile["ROWS"]), triton.cdiv(blocks, tile["BLOCKS"]))
        with torch.cuda.device_of(weight):
            _dequantize[grid](levels if ids is None else ids, weight, scale, levels, y, count, rows,
                              cols, blocks, group_size or 64 * blocks, stride, BITS=bits,
                              GATHER=ids is not None, **tile, enable_fp_fusion=False)  # fmt: skip
    return y


def dequantize(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The matrix (rows, cols) that a packed weight stands for, rounded once to ``dtype``."""
    return _launch(None, weight, scale, levels, rows, rows, cols, bits, group_size, dtype)


def gather(
    ids: Tensor, weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int,
    group_size: int, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Rows ``ids`` (any shape, int32 or int64) → (number of ids, cols).

    A GPU cannot raise IndexError without stopping: the row of an id outside the table is NaN.
    """
    flat = ids.reshape(-1).contiguous()
    count = flat.numel()
    return _launch(flat, weight, scale, levels, count, rows, cols, bits, group_size, dtype)
