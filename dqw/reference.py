"""The operators in plain PyTorch: what every kernel must compute, on any device.

Argument shapes are those of ``dqw.ops``. Clear before fast: temporaries are as large as the data.
The float32 operations and their order are the contract; the compiled kernels repeat them, so
fake quantization and the integer paths agree bit for bit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dqw.packing import SMALLEST_SCALE, round_scales, unpack

_BELOW_SMALLEST = SMALLEST_SCALE * (1 - 2.0**-24)  # the float32 before SMALLEST_SCALE


def per_column(scale: Tensor, cols: int, group_size: int) -> Tensor:
    """``scale`` so that it broadcasts over (rows, cols)."""
    if group_size:
        return scale.repeat_interleave(group_size, dim=1)[:, :cols]
    return scale


def _doubled(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    """t = |x| × (2 / scale): twice the level that x would be, before rounding and clipping."""
    return x.float().abs() * per_column(2.0 / scale.float(), x.shape[1], group_size)


def quantize(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    """The signed level nearest to each x (rows, cols) → int16. NaN gives the level of 0."""
    t = _doubled(x, scale, bucket, group_size)
    index = t.nan_to_num(0.0).clamp(max=bucket.numel() - 1).floor().long()
    level = bucket[index]
    return torch.where(torch.signbit(x), -level, level)


def fake_quant(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    """Round x (rows, cols) to the grid and give it back as weights, in x's dtype. NaN stays."""
    level = quantize(x, scale, bucket, group_size).float()
    y = level.abs() * per_column(scale.float(), x.shape[1], group_size)
    y = torch.copysign(y, x.float())
    return torch.where(x.isnan(), x.float(), y).to(x.dtype)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients of ``fake_quant``: dx in x's dtype, dscale in scale's shape.

    grad is cast to x's dtype first.

    Inside the clip dx = g and dscale gets g (level - x/scale); outside dx = 0 and dscale gets
    g × sign(x) × level_max. That is LSQ (arXiv 1902.08153); times 1/level_max it is the gradient
    of the clip in RCF (arXiv 1909.13144).
    """
    rows, cols = x.shape
    t = _doubled(x, scale, bucket, group_size)
    inside = t <= bucket.numel() - 1
    level = quantize(x, scale, bucket, group_size).float()
    g, xf = grad.to(x.dtype).float(), x.float()
    per_weight = torch.where(
        inside, level - xf / per_column(scale.float(), cols, group_size), level
    )
    per_weight = torch.where(x.isnan(), xf, per_weight) * g
    if group_size:
        per_weight = F.pad(per_weight, (0, scale.shape[1] * group_size - cols))
        dscale = per_weight.view(rows, scale.shape[1], group_size).sum(-1)
    elif scale.shape[0] == 1:
        dscale = per_weight.sum().view(1, 1)
    else:
        dscale = per_weight.sum(1, keepdim=True)
    dx = torch.where(inside | x.isnan(), g, torch.zeros_like(g)).to(x.dtype)
    return dx, dscale.to(scale.dtype)


def exact_scale(clip: Tensor, bucket: Tensor) -> Tensor:
    """clip / level_max, before it is rounded and clamped.

    By the table's last entry, which is that level: by a number of Python's, a GPU would multiply by
    the reciprocal, and end a bit away from a CPU that freezes what was trained there.
    """
    return clip / bucket[-1:]


def stored_scale(exact: Tensor, window: Tensor | None) -> Tensor:
    """``exact`` as a packed layer would keep it; groups have a ``window``."""
    if window is None:
        return exact.clamp(min=SMALLEST_SCALE)
    # A GPU's NaN, 0x7fffffff, would be rounded to -0, and a diverged layer to zeros: add it back
    # (as infinity times 0 does, too).
    return round_scales(exact.clamp(*window.unbind())).add(exact, alpha=0)


def clip_gradient(dscale: Tensor, exact: Tensor, bucket: Tensor, gradient_scale: float) -> Tensor:
    """From the gradient of the scale to the damped one of the clip; none flows where
    SMALLEST_SCALE stands in for the exact scale."""
    dclip = dscale * (gradient_scale / (bucket.numel() // 2))
    return torch.ops.aten.threshold_backward(dclip, exact, _BELOW_SMALLEST)


def fake_quant_clip(
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``fake_quant`` by the scale that is stored for ``clip`` (float32), then a cast to ``dtype``.

    By the operators, so that a CPU's kernels serve here; no gradient of its own.
    """
    scale = stored_scale(exact_scale(clip, bucket), window)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dqw.fake_quant(x, scale, bucket, group_size).to(dtype)


def fake_quant_clip_backward(
    grad: Tensor,
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype and dclip, float32: straight through the cast and the scale's rounding."""
    exact = exact_scale(clip, bucket)
    scale = stored_scale(exact, window)
    dx, dscale = torch.ops.dqw.fake_quant_backward(grad, x, scale, bucket, group_size)
    return dx, clip_gradient(dscale, exact, bucket, gradient_scale)


def fake_quant_clips(
    x: list[Tensor],
    clip: list[Tensor],
    bucket: list[Tensor],
    window: list[Tensor],
    group_size: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """``fake_quant_clip`` of several matrices. Each has a window, used where it has groups."""
    return [
        torch.ops.dqw.fake_quant_clip(a, c, b, w if size else None, size, dtype)
        for a, c, b, w, size in zip(x, clip, bucket, window, group_size, strict=True)
    ]


def fake_quant_clips_backward(
    grad: list[Tensor],
    x: list[Tensor],
    clip: list[Tensor],
    bucket: list[Tensor],
    window: list[Tensor],
    group_size: list[int],
    gradient_scale: list[float],
) -> list[Tensor]:
    """``fake_quant_clip_backward`` of several matrices: dx of each, then dclip of each."""
    pairs = [
        torch.ops.dqw.fake_quant_clip_backward(g, a, c, b, w if size else None, size, factor)
        for g, a, c, b, w, size, factor in zip(
            grad, x, clip, bucket, window, group_size, gradient_scale, strict=True
        )
    ]
    return [dx for dx, _ in pairs] + [dclip for _, dclip in pairs]


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic int8 per row of the last dimension: float32 integers in -127…127, and their scale.

    A row of zeros stays zero, and so does one so small that 127 / largest overflows. A row with
    NaN or infinity has scale NaN, so all of its results are.
    """
    xf = x.float()
    if x.shape[-1] == 0:
        return xf, xf.new_zeros((*x.shape[:-1], 1))
    largest = xf.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(largest)
    counts = finite & torch.isfinite(127.0 / largest)
    safe = torch.where(counts, largest, torch.ones_like(largest))
    q = torch.round(torch.where(finite, xf, torch.zeros_like(xf)) * (127.0 / safe))
    q = q.clamp(-127, 127)
    scale = torch.where(finite, largest / 127.0, torch.full_like(largest, torch.nan))
    return q, scale


def fake_quant_activation(x: Tensor) -> Tensor:
    """Round each row of x (…, K) to 255 levels of its own largest magnitude, in x's dtype."""
    q, scale = _quantize_rows(x)
    return (q * scale).to(x.dtype)


def round_columns(
    state: Tensor,
    base: Tensor | None,
    divisor: Tensor,
    coefficient: Tensor,
    scale: Tensor,
    bucket: Tensor,
) -> tuple[Tensor, Tensor]:
    """Columns rounded one after the other, each passing on what its rounding changed: the inner
    loop of GPTQ (arXiv 2210.17323), and with ``base`` one of coordinate descent.

    state, base, scale: (cols, rows) float32, a column of the weight a row; divisor: (cols,);
    coefficient: (cols, cols). Column i of x = ``state``, or ``base`` + ``state`` / ``divisor``, is
    rounded to y; delta = (x - y) / divisor, or y - base; then every state[j] behind it becomes
    state[j] - coefficient[i, j] × delta. → y and delta, (cols, rows) float32.
    The compiled kernel raises RuntimeError for more than 64 columns.
    """
    state = state.float().clone(memory_format=torch.contiguous_format)
    rounded, delta = torch.empty_like(state), torch.empty_like(state)
    for i in range(len(state)):
        x = state[i] if base is None else base[i] + state[i] / divisor[i]
        rounded[i] = fake_quant(x[:, None], scale[i][:, None], bucket, 0)[:, 0]
        delta[i] = (x - rounded[i]) / divisor[i] if base is None else rounded[i] - base[i]
        state[i + 1 :] -= torch.outer(coefficient[i, i + 1 :], delta[i])
    return rounded, delta


def _unpack_levels(weight: Tensor, levels: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    return levels[unpack(weight, rows, cols, bits).long()]


def dequantize(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int
) -> Tensor:
    """The float32 matrix (rows, cols) that a packed weight stands for: level × scale."""
    level = _unpack_levels(weight, levels, rows, cols, bits).float()
    return level * per_column(scale.float(), cols, group_size)


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
    """y = x Wᵀ + bias for x (…, K), packed W (rows, K) → (…, rows) in x's dtype.

    Float activations: float32 products with the dequantized matrix; for bfloat16 x, and on a GPU
    for float16, a kernel may round the matrix to x's dtype too, as ``torch.nn.functional.linear``
    would have it, with float32 sums. x itself is never rounded. Int8 activations: x is rounded
    as in ``fake_quant_activation``; sums of integers are exact (here in float64), then
    float(sum) × (row scale × weight scale) per channel, or per group
    row scale × Σ_g float(sum_g) × scale_g.
    """
    cols = x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), cols)  # not -1: there may be no columns
    if not int8_activations:
        w = dequantize(weight, scale, levels, rows, cols, bits, group_size)
        y = flat.float() @ w.T
    else:
        q, row_scale = _quantize_rows(flat)
        level = _unpack_levels(weight, levels, rows, cols, bits).double()
        q, s = q.double(), scale.float()
        if group_size:
            y = flat.new_zeros(flat.shape[0], rows, dtype=torch.float32)
            for g in range(s.shape[1]):
                part = slice(g * group_size, (g + 1) * group_size)
                y += (q[:, part] @ level[:, part].T).float() * s[:, g]
            y *= row_scale
        else:
            y = (q @ level.T).float() * (row_scale * s.T)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)


def quant_linears(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    levels: Tensor,
    biases: list[Tensor | None],
    rows: list[int],
    bits: int,
    group_size: int,
    gelu: bool,
) -> list[Tensor]:
    """One product a layer, each by whatever serves ``quant_linear`` on the device; with ``gelu``
    the exact one after it. x (..., cols) → (..., rows[i]) of each layer."""
    ys = [
        torch.ops.dqw.quant_linear(x, w, s, levels, b, n, bits, group_size, False)
        for w, s, b, n in zip(weights, scales, biases, rows, strict=True)
    ]
    return [torch.nn.functional.gelu(y) for y in ys] if gelu else ys


def quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Rows ``ids`` of a packed (rows, cols) table, float32 of shape ids.shape + (cols,).

    Raises IndexError for an id outside the table.
    """
    flat = ids.reshape(-1).long()
    if flat.numel() and (flat.min() < 0 or flat.max() >= rows):
        raise IndexError(f"an id lies outside the embedding's {rows} rows")
    taken = weight.view(rows, -1)[flat].flatten()
    s = scale if scale.shape[0] == 1 else scale[flat]
    return dequantize(taken, s, levels, flat.numel(), cols, bits, group_size).view(*ids.shape, cols)
