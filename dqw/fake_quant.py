"""Fake quantization with a learned clip: the module that QAT layers hold for their weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqw import grids, ops, reference
from dqw.packing import LARGEST_SCALE, SMALLEST_SCALE
from dqw.recipe import QuantSpec

_CHUNK_ROWS = 4096  # the clip search works on slices, to bound its temporaries


class Rounded(torch.autograd.Function):
    """From weight and clip to the fake-quantized weight, and both gradients in closed form.

    One operator each way, since a step on a GPU waits for Python.
    """

    @staticmethod
    def forward(
        ctx: Any,
        matrix: Tensor,
        clip: Tensor,
        bucket: Tensor,
        window: Tensor | None,
        group_size: int,
        gradient_scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """matrix (rows, cols) → the same shape in ``dtype``; clip is float32."""
        ctx.save_for_backward(matrix, clip, bucket, window)
        ctx.group_size, ctx.gradient_scale = group_size, gradient_scale
        return ops.fake_quant_clip(matrix, clip, bucket, window, group_size, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dclip = ops.fake_quant_clip_backward(
            grad, *ctx.saved_tensors, ctx.group_size, ctx.gradient_scale
        )
        return dx, dclip if ctx.needs_input_grad[1] else None, None, None, None, None, None


class RoundedTogether(torch.autograd.Function):
    """``Rounded`` of several matrices, by one operator each way.

    quantizers: of the matrices; tensors: first these, then their clips.
    """

    @staticmethod
    def forward(
        ctx: Any, quantizers: "list[FakeQuantize]", dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(quantizers)
        ctx.save_for_backward(*tensors)
        # Tables and windows are constant, and no tensors of the graph: unpacking costs the host.
        ctx.rest = (
            [q.bucket for q in quantizers],
            [q._buffers["window"] for q in quantizers],
            [q.group_size for q in quantizers],
        )
        ctx.gradient_scales = [q.gradient_scale for q in quantizers]
        rounded = ops.fake_quant_clips(tensors[:count], tensors[count:], *ctx.rest, dtype)
        wanted = ctx.needs_input_grad[2:]
        fixed = [y for i, y in enumerate(rounded) if not wanted[i] and not wanted[count + i]]
        ctx.mark_non_differentiable(*fixed)  # their products have no gradient to work out
        ctx.set_materialize_grads(False)
        return tuple(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, count = ctx.saved_tensors, len(grads)
        used = [i for i, grad in enumerate(grads) if grad is not None]  # the others took no part

        def of_used(values: Any) -> list[Any]:
            return [values[i] for i in used]

        parts = [of_used(values) for values in (grads, tensors[:count], tensors[count:], *ctx.rest)]
        found = ops.fake_quant_clips_backward(*parts, of_used(ctx.gradient_scales))
        wanted = ctx.needs_input_grad[2:]
        result: list[Tensor | None] = [None] * (2 * count)
        for n, i in enumerate(used):
            result[i] = found[n] if wanted[i] else None
            result[count + i] = found[len(used) + n] if wanted[count + i] else None
        return None, None, *result


def fake_quant_together(
    weights: list[Tensor], quantizers: "list[FakeQuantize]", dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """``quantizer(weight, dtype=dtype)`` of each pair in one call, since a training step on a GPU
    waits for its host. weights: (rows, cols) each, all of one device; → tensors of their shapes in
    ``dtype``, with the gradients of ``Rounded``."""
    clips = [q._clip_of_weights() for q in quantizers]
    return RoundedTogether.apply(quantizers, dtype, *weights, *clips)


class FakeQuantize(nn.Module):
    """Rounds a weight to its grid; the gradient goes straight through and the clip learns.

    ``clip`` (float32, (1, 1) | (rows, 1) | (rows, groups)) is the weight that the top level stands
    for. It is learned by RCF (arXiv 1909.13144), which is LSQ's gradient (arXiv 1902.08153) with
    scale = clip / level_max, damped by LSQ's 1 / sqrt(weights per clip × level_max).

    Scales of groups are rounded here already, as they are stored (``dqw.packing``), so that a
    frozen layer holds bit for bit the weights it was trained with. ``window``: the smallest and
    the largest scale that the weight's groups may have, 16 octaves around those it began with.
    """

    table: Tensor
    window: Tensor
    deviation: Tensor | None

    def __init__(self, spec: QuantSpec, weight: Tensor) -> None:
        """``weight``: the latent weight, (rows, …), for the initial clip by least squared error."""
        super().__init__()
        self.spec = spec
        self.group_size = spec.group_size or 0
        self.level_max = grids.level_max(spec.grid, spec.bits)
        matrix = weight.detach().flatten(1)
        bucket = self._take_table(matrix)
        self.register_buffer("deviation", _deviation(matrix) if spec.weight_norm else None)
        scale = least_squares_scale(matrix, spec, bucket)
        self.register_buffer("window", scale_window(scale))
        clip = scale * self.level_max
        if self.deviation is not None:
            clip = clip / self.deviation
        self.clip = nn.Parameter(clip, requires_grad=spec.step is None)
        per_clip = matrix.numel() / clip.numel()
        self.gradient_scale = float((per_clip * self.level_max) ** -0.5)

    def _take_table(self, matrix: Tensor) -> Tensor:
        """Keep the rounding table for ``matrix``, and return it."""
        bucket = grids.bucket(self.spec.grid, self.spec.bits).to(matrix.device)
        # As bytes: DistributedDataParallel sends buffers around, and no collective takes int16.
        self.register_buffer("table", bucket.view(torch.uint8), persistent=False)
        return bucket

    @property
    def bucket(self) -> Tensor:
        """The rounding table, int16."""
        return self.table.view(torch.int16)

    def packed_spec(self) -> QuantSpec:
        """What a packed layer of the weights as they are now is."""
        return self.spec

    @torch.no_grad()
    def scale(self) -> Tensor:
        """The scale in use, float32, in ``clip``'s shape; only ``forward`` has gradients."""
        return self.stored(reference.exact_scale(self._clip_of_weights(), self.bucket))

    def stored(self, scale: Tensor) -> Tensor:
        """``scale`` as a packed layer would keep it."""
        return reference.stored_scale(scale, self.window if self.group_size else None)

    def _clip_of_weights(self, rows: Tensor | None = None) -> Tensor:
        """``clip`` in the weight's own units, float32."""
        clip: Tensor = self.clip
        deviation = self._buffers["deviation"]
        if rows is not None and clip.shape[0] > 1:
            clip = clip[rows]
        if clip.dtype != torch.float32:  # after model.half()
            clip = clip.float()
        return clip if deviation is None else clip * deviation

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Move the clips to where ``scale()`` gives ``scale``, which must be one it can store."""
        clip = scale * self.level_max
        self.clip.copy_(clip if self.deviation is None else clip / self.deviation)

    def forward(
        self, weight: Tensor, rows: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Fake-quantized ``weight``, same shape, in ``dtype`` or its own.

        rows: which rows these are. The values are those that a cast of the result would have;
        on a GPU float32 weights are written so at once.
        """
        rounded = Rounded.apply(
            weight.flatten(1),
            self._clip_of_weights(rows),
            self.bucket,
            self.window if self.group_size else None,
            self.group_size,
            self.gradient_scale,
            dtype or weight.dtype,
        )
        return rounded if weight.dim() == 2 else rounded.view_as(weight)  # a view is a node more

    def extra_repr(self) -> str:
        s = self.spec
        where = "tensor" if s.per_tensor else f"groups of {s.group_size}" if s.group_size else "row"
        return f"{s.bits} bits {s.grid}, per {where}"


def scale_window(scale: Tensor) -> Tensor:
    """From 12 octaves below the largest scale's to 3 above it, float32 (2,)."""
    largest = scale.amax() if scale.numel() else scale.new_ones(())
    octave = torch.exp2(largest.log2().floor())
    window = torch.stack([octave * 2.0**-12, octave * (8 * 31 / 16)])
    return window.clamp(SMALLEST_SCALE, LARGEST_SCALE)


def _deviation(matrix: Tensor) -> Tensor:
    """Standard deviation per tensor, (1, 1). APoT also subtracts the mean before quantizing; a
    Whisper layer's mean is under 1 % of its deviation, and a packed weight has no offset to put
    it back with, so only the deviation is divided out, and put back in the scale."""
    return matrix.float().std().clamp(min=1e-12).view(1, 1)


def root_mean_square(matrix: Tensor) -> Tensor:
    """The unit of ``QuantSpec.step``, float32 of no dimension, above 0."""
    total = matrix.float().square().sum() / max(matrix.numel(), 1)
    return total.sqrt().clamp(min=SMALLEST_SCALE)


@torch.no_grad()
def least_squares_scale(
    matrix: Tensor, spec: QuantSpec, bucket: Tensor, importance: Tensor | None = None
) -> Tensor:
    """The scale of least squared error, float32: (1, 1), (rows, 1) or (rows, groups); of a spec
    with a step, that step. importance (cols,) weighs the squared errors.

    Clips from 0.3 to 1.1 of the largest magnitude are tried, 4 % apart (APoT of 6 bits and more
    has few levels near its top and goes on to 4 times); then the best is refined twice by the
    closed form <w, level> / <level, level>, kept where it lowers the error.
    """
    if spec.step is not None:
        return (spec.step * root_mean_square(matrix)).view(1, 1)
    if spec.per_tensor:
        every = None if importance is None else importance.repeat(len(matrix))
        return _search(matrix.float().view(1, -1), 0, spec, bucket, every)
    size = spec.group_size or 0
    parts = [_search(m.float(), size, spec, bucket, importance) for m in matrix.split(_CHUNK_ROWS)]
    return torch.cat(parts) if parts else matrix.new_zeros((0, 1))


def _search(
    w: Tensor, group_size: int, spec: QuantSpec, bucket: Tensor, importance: Tensor | None
) -> Tensor:
    top = bucket.numel() // 2

    def grouped(x: Tensor) -> Tensor:
        if not group_size:
            return x.unsqueeze(1)
        pad = -x.shape[1] % group_size
        return nn.functional.pad(x, (0, pad)).unflatten(1, (-1, group_size))

    def weighed(x: Tensor) -> Tensor:
        return x if importance is None else x * importance

    def error(scale: Tensor) -> Tensor:
        squares = ops.fake_quant(w, scale, bucket, group_size).sub_(w).square_()
        return grouped(weighed(squares)).sum(-1)

    largest = grouped(w.abs()).amax(-1)
    best = (largest / top).clamp(min=SMALLEST_SCALE)
    best_error = error(best)
    widest = 4.0 if spec.grid == "apot" and spec.bits >= 6 else 1.1
    fraction = 0.3
    while fraction < widest:
        scale = (largest * (fraction / top)).clamp(min=SMALLEST_SCALE)
        best, best_error = _keep_better(best, best_error, scale, error(scale))
        fraction *= 1.04
    for _ in range(2):
        level = ops.quantize(w, best, bucket, group_size).float()
        power = grouped(weighed(level.square())).sum(-1)
        fitted = grouped(weighed(w * level)).sum(-1) / power.clamp(min=1e-12)
        scale = torch.where(power > 0, fitted, best).clamp(min=SMALLEST_SCALE)
        best, best_error = _keep_better(best, best_error, scale, error(scale))
    return best


@torch.no_grad()
def search_near(part: Tensor, scale: Tensor, quantizer: FakeQuantize, importance: Tensor) -> Tensor:
    """The best of 11 scales from 0.8 to 1.2 times ``scale`` (rows, 1) for one group, (rows, 1).

    part: the group's weights (rows, columns); importance (columns,) weighs their squared errors.
    """
    part = part.contiguous()
    best, best_error = scale, torch.full_like(scale, torch.inf)
    for step in (0, *range(-5, 0), *range(1, 6)):  # the old one first: it wins ties
        tried = quantizer.stored(scale * (1 + 0.04 * step))
        error = ops.fake_quant(part, tried, quantizer.bucket, 0).sub_(part).square_()
        best, best_error = _keep_better(best, best_error, tried, (error @ importance)[:, None])
    return best


def _keep_better(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> tuple[Tensor, Tensor]:
    better = b_error < a_error
    return torch.where(better, b, a), torch.where(better, b_error, a_error)
