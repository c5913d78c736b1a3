"""Learned grids: every layer has levels of its own, int8, and goes on learning them in training.

The levels are a codebook of 2^(bits-1) magnitudes beside a sign. They are found by Lloyd's rule
(Lloyd 1982, "Least squares quantization in PCM"), which is k-means on weights over their scales,
from the grid ``lloyd`` on; where calibration knows the layer's inputs, errors count by what they do
to its outputs (``dqw.compensate``). The largest level is 127 and stays: the scales say what it
stands for. Training moves the others, each by the sum of what its weights are pulled by.

They cost some speed where kernels like small integers. int8 products on AVX2 add pairs in 16 bits:
4 bits against lloyd, 1500 rows of 512 → 2048, 17.0 and 14.4 ms per row, 21.8 and 20.1 in groups of
16 (`DQW_CPU_ISA=avx2 python -m bench --op quant_linear --grid learned --group-sizes 16 --shapes
1500,512,2048`, a Zen 4). On a GPU, by reading and not measured: in float16 a level times a group's
scale is rounded, and query, key and value take three launches, as their tables differ.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqw import grids, ops
from dqw.fake_quant import FakeQuantize, least_squares_scale
from dqw.grids import CODEBOOK_TOP, LEARNED
from dqw.recipe import QuantSpec
from dqw.reference import per_column

ROWS = 512  # of a weight, evenly spaced, that levels are found on
ROUNDS = 12  # of Lloyd's rule, at most


class _Taught(torch.autograd.Function):
    """Passes a rounded weight on, and gives the codebook its gradient: with w = clip × level, that
    of a level is the sum, over the weights that it stands for, of gradient × sign × clip."""

    @staticmethod
    def forward(
        ctx: Any,
        rounded: Tensor,
        codebook: Tensor,
        matrix: Tensor,
        scale: Tensor,
        magnitudes: Tensor,
        bucket: Tensor,
        group_size: int,
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(matrix, scale, magnitudes, bucket)
        ctx.group_size, ctx.gradient_scale = group_size, gradient_scale
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, scale, magnitudes, bucket = ctx.saved_tensors
        level = ops.quantize(matrix.detach(), scale, bucket, ctx.group_size)
        clips = CODEBOOK_TOP * per_column(scale, matrix.shape[1], ctx.group_size)
        pulled = grad.float() * level.sign() * clips
        size = level.abs()
        # A pass for each level: sums in a fixed order, on a GPU too.
        sums = [pulled.masked_fill(size != m, 0).sum() for m in magnitudes[:-1]]
        return grad, torch.stack(sums) * ctx.gradient_scale, *[None] * 6


class CodebookQuantize(FakeQuantize):
    """``FakeQuantize`` on a learned grid.

    codebook: the magnitudes but for the largest, as shares of it, float32 (2^(bits-1) - 1,); the
    levels in use are its nearest integers of 127, kept apart. It learns like a clip.
    """

    codebook: nn.Parameter

    def _take_table(self, matrix: Tensor) -> Tensor:
        start = torch.tensor(grids.magnitudes(LEARNED, self.spec.bits), device=matrix.device)
        self.codebook = nn.Parameter(_shares(found_levels(matrix, self.spec, start)))
        # As of a clip (LSQ, arXiv 1902.08153), so that the norm of all gradients is not its. Of the
        # whole weight, though an embedding rounds some rows of it.
        self.codebook_scale = float((max(matrix.numel(), 1) * CODEBOOK_TOP) ** -0.5)
        return self.bucket

    @property
    def bucket(self) -> Tensor:
        """The rounding table of the levels as they are now."""
        return grids.rounding_table(self.magnitudes())

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """The levels in use, int64 (2^(bits-1),), rising to 127."""
        shares = self.codebook.float()
        return rounded_levels(torch.cat([shares, shares.new_ones(1)]))

    def packed_spec(self) -> QuantSpec:
        return replace(self.spec, grid=grids.spelled_out(self.magnitudes().tolist()))

    @torch.no_grad()
    def fit(self, matrix: Tensor, importance: Tensor) -> None:
        """Find levels and clips for ``matrix`` (rows, cols) anew; importance (cols,) weighs the
        squared errors."""
        levels = found_levels(matrix, self.spec, self.magnitudes(), importance)
        self.set_levels(levels)
        scale = least_squares_scale(matrix, self.spec, self.bucket, importance)
        self.set_scale(self.stored(scale))

    @torch.no_grad()
    def set_levels(self, levels: Tensor) -> None:
        """Take ``levels``, any positive multiple of the shares."""
        self.codebook.copy_(_shares(levels))

    def forward(
        self, weight: Tensor, rows: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        rounded = super().forward(weight, rows, dtype)
        if not (torch.is_grad_enabled() and self.codebook.requires_grad):
            return rounded
        magnitudes = self.magnitudes()
        scale = self.scale()
        taught = _Taught.apply(
            rounded.flatten(1),
            self.codebook,
            weight.flatten(1),
            scale if rows is None or len(scale) == 1 else scale[rows],
            magnitudes,
            grids.rounding_table(magnitudes),
            self.group_size,
            self.codebook_scale,
        )
        return taught.view_as(rounded)


def fake_quantizer(spec: QuantSpec, weight: Tensor) -> FakeQuantize:
    """What rounds ``weight``, (rows, …), as ``spec`` says."""
    kind = CodebookQuantize if spec.grid == LEARNED else FakeQuantize
    return kind(spec, weight)


def _shares(levels: Tensor) -> Tensor:
    return (levels[:-1] / levels[-1]).float()


@torch.no_grad()
def found_levels(
    matrix: Tensor, spec: QuantSpec, start: Tensor, importance: Tensor | None = None
) -> Tensor:
    """Levels of least squared error, float32 of ``start``'s shape, rising.

    matrix: (rows, cols); start: int64, the last 127. Scales are searched for the levels, levels
    moved to the mean of the weights they stand for, over their scales, in turns.
    """
    rows = matrix[:: max(len(matrix) // ROWS, 1)].float().contiguous()
    group = spec.group_size or 0
    levels, integers = start.float(), start
    for _ in range(ROUNDS if rows.numel() else 0):
        bucket = grids.rounding_table(integers)
        scale = least_squares_scale(rows, spec, bucket, importance)
        level = ops.quantize(rows, scale, bucket, group).abs().long()
        place = torch.searchsorted(integers, level).flatten()
        unit = per_column(scale, rows.shape[1], group).expand_as(rows)
        weigh = unit if importance is None else unit * importance
        total = torch.bincount(place, (weigh * rows.abs()).double().flatten(), len(start))
        power = torch.bincount(place, (weigh * unit).double().flatten(), len(start))
        levels = torch.where(power > 0, total / power, integers.double()).float()
        before, integers = integers, rounded_levels(levels)
        if torch.equal(before, integers):
            break
    return levels


def rounded_levels(levels: Tensor) -> Tensor:
    """The integers nearest to ``levels`` over the last × 127, int64, kept apart and above 0."""
    wanted = (levels * (CODEBOOK_TOP / levels[-1])).round().long().clamp(min=1)
    place = torch.arange(len(wanted), device=wanted.device)
    apart = (wanted - place).cummax(0).values + place
    return apart.minimum(CODEBOOK_TOP + 1 - len(wanted) + place)
