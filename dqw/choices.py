"""The ways to store a layer, and what each takes and costs.

A layer may have bits on the recipe's grid, with scales that some columns share, or a step of the
uniform grid: one scale in all, where entropy coding makes bytes of it (``dqw.coding``). With steps
the error of base's weights is that of a Lloyd grid in groups of 16 at 0.4 to 0.8 bits a weight
less: likely codes are short, and there are no scales to store.

What a layer's rounding costs is measured: the layer alone is rounded, and the mean KL of the
next-token distributions from those of the float model is taken on speech. That is quadratic in
small errors, so for other choices it goes with the squared error of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dqw import grids, ops
from dqw.coding import LONG, encoded, encoded_codes, huffman_bits
from dqw.fake_quant import least_squares_scale, root_mean_square, scale_window
from dqw.packing import pack_scales, packed_bytes, packed_scale_bytes
from dqw.probe import Probe, changed, first_changed
from dqw.recipe import GROUP_SIZES, QuantSpec, stepped
from dqw.reference import stored_scale

WIDTHS = (2, 3, 4, 5, 6, 8)
# Larger groups take fewer scales. Base on lloyd, about 3 bits a weight in all: 2 bits in groups of
# 16 (2.5 bits) leave more error than 2 and 3 bits in groups of 64, mixed to the same size.
LARGEST_GROUP = 64
PROBE = 3  # bits at which a layer's KL is measured
# Rows of a matrix, evenly spaced, that stand for all where errors of other widths are compared:
# ratios of base are off by 0.6 % on average, 8 % at most. Of long columns more, as each one's codes
# are counted.
ROWS, LONG_ROWS = 128, 4096
TABLE = 48  # bytes of a long column's table that nothing pays for
# Of the weights' root mean square, a sixth of a bit apart: normal weights carry 1.1 to 6.4 bits.
STEPS = tuple(round(2 ** (k / 6), 4) for k in range(6, -27, -1))
PROBE_STEP = 0.5  # that a layer's KL is measured at
# Bits that hold a step's codes: the fewest with which clipping adds at most CLIPPED of the error of
# rounding; a step that 8 bits do not hold so is no choice. Few weights are clipped, but they are
# large, and a plan that took their error for rounding's made base at 39 MiB worse than at 33.
BOUNDS = (4, 5, 6, 8)
CLIPPED = 0.002


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: its spec, the bytes it takes, the KL it costs, and its rate, bits a
    weight in all."""

    spec: QuantSpec
    size: int
    cost: float
    rate: float


def candidates(spec: QuantSpec, widths: Sequence[int] = WIDTHS) -> list[QuantSpec]:
    """``spec`` at every width, and in groups of its size to ``LARGEST_GROUP``.

    From 5 bits on, with groups, uniform has less error than APoT and PoT (``bench.grids``); from 6
    on there is no lloyd.
    """
    good = (
        range(2, 5) if spec.group_size and spec.grid in ("apot", "pot") else grids.widths(spec.grid)
    )
    own = spec.group_size
    groups = [own, *(g for g in GROUP_SIZES if own and own < g <= LARGEST_GROUP)]
    return [
        replace(spec, bits=b, grid=spec.grid if b in good else "uniform", group_size=group)
        for b in widths
        for group in groups
    ]


def stored_bytes(rows: int, cols: int, spec: QuantSpec) -> int:
    """Bytes of a packed layer, not entropy-coded: codes, scales and table."""
    groups = packed_scale_bytes(rows, -(-cols // spec.group_size)) if spec.group_size else 0
    return packed_bytes(rows, cols, spec.bits) + groups + _beside(rows, spec)


def rounded(matrix: Tensor, spec: QuantSpec) -> Tensor:
    """``matrix`` (rows, cols) on the grid of ``spec``, float32, with the clips of least error."""
    bucket = _bucket(spec, matrix.device)
    scale = least_squares_scale(matrix, spec, bucket)
    return ops.fake_quant(matrix.float(), scale, bucket, spec.group_size or 0)


def sensitivities(
    model: Any,
    plan: Mapping[str, QuantSpec],
    probe: Probe,
    steps: bool = False,
    progress: Callable[[str], object] | None = None,
    known: Mapping[str, list[Choice]] | None = None,
    keep: Callable[[str, QuantSpec, list[Choice]], object] | None = None,
) -> dict[str, list[Choice]]:
    """Layer name → its choices: the ``candidates`` of its spec, or with ``steps`` one for each of
    ``STEPS``. The float ``model`` stays as it is. known: layers that were measured before; keep is
    called with each of the others."""
    found = dict(known or {})
    for name, spec in plan.items():
        if progress is not None:
            progress(name)
        if name in found:
            continue
        layer = model.get_submodule(name)
        matrix = layer.weight.detach().flatten(1).float()
        some = _some(matrix)
        options = _stepped(matrix, some, spec) if steps else _searched(some, candidates(spec))
        probed = _probed(list(options), spec)
        row, cost = [], 0.0
        for option, scale in options.items():
            size, error = _tried(some, option, scale, len(matrix))
            if error and option == probed:  # weights of zeros cost nothing
                with changed(layer, rounded(matrix, option)):
                    cost = probe.kl(first_changed([name])) / error
            row.append((option, size, error))
        found[name] = [
            Choice(option, size, cost * error, 8 * size / max(matrix.numel(), 1))
            for option, size, error in row
        ]
        if keep is not None:
            keep(name, spec, found[name])
    return found


def told(matrix: Tensor, spec: QuantSpec) -> Choice:
    """The one choice of a weight (rows, cols) whose spec is given; its cost counts for nothing."""
    matrix = matrix.float()
    some = _some(matrix)
    known = matrix if spec.per_tensor else some  # one scale is that of all rows
    scale = least_squares_scale(known, spec, _bucket(spec, matrix.device))
    size, _ = _tried(some, spec, scale, len(matrix))
    return Choice(spec, size, 0.0, 8 * size / max(matrix.numel(), 1))


def _beside(rows: int, spec: QuantSpec) -> int:
    """Bytes of the table of levels, and of scales that are not a group's."""
    scales = 0 if spec.group_size else 1 if spec.per_tensor else rows
    return 2 * 2**spec.bits + 4 * scales


def _growth(rows: Tensor, spec: QuantSpec, scale: Tensor, count: int) -> float:
    """Bits that compensation adds to a code of ``count`` rows like these, as it makes what shares a
    table more spread, a long column or all: by about the variance of rounding, scale² / 12.

    base at 27 and 24 MiB grew by scale² / 11 of its layers' (0.6 and 1.0 % of all), and at 33 MiB
    on lloyd by 0.03 bits (a one-off program). Counted as scale² / 9, as budgets are to hold.
    """
    if spec.step is None:
        return 0.03
    squares = rows.square()
    spread = (squares.mean(0) if count >= LONG else squares.mean()).clamp(min=1e-30)
    return float(torch.log2(1 + scale.square() / 9 / spread).mean()) / 2


def _probed(options: Sequence[QuantSpec], spec: QuantSpec) -> QuantSpec:
    """The option that a layer of ``spec`` is rounded to, to measure its KL."""

    def distance(option: QuantSpec) -> float:
        if option.step is not None:
            return abs(math.log(option.step / PROBE_STEP))
        return abs(option.bits - PROBE) + (option.group_size != spec.group_size)

    return min(options, key=distance)


def _bucket(spec: QuantSpec, device: torch.device) -> Tensor:
    return grids.bucket(spec.grid, spec.bits).to(device)


def _searched(rows: Tensor, options: Sequence[QuantSpec]) -> dict[QuantSpec, Tensor]:
    """Option → the scales of least error."""
    return {o: least_squares_scale(rows, o, _bucket(o, rows.device)) for o in options}


def _stepped(matrix: Tensor, rows: Tensor, spec: QuantSpec) -> dict[QuantSpec, Tensor]:
    """Spec → scale for each of ``STEPS`` that some bits hold: the smaller the step, the more. rows:
    some of the matrix."""
    found = dict[QuantSpec, Tensor]()
    unit = root_mean_square(matrix)
    share, magnitude = len(matrix) / max(len(rows), 1), matrix.abs()
    bounds = list(BOUNDS)
    for step in STEPS:
        scale = (step * unit).view(1, 1)
        bucket = grids.bucket("uniform", BOUNDS[-1]).to(rows.device)
        error = ops.fake_quant(rows, scale, bucket, 0).sub_(rows).square_().sum() * share
        while bounds and _clipped(magnitude, scale, bounds[0]) > CLIPPED * error:
            del bounds[0]
        if found and not bounds:
            break
        found[stepped(spec, step, bounds[0] if bounds else BOUNDS[-1])] = scale
    return found


def _clipped(magnitude: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Squared error of what lies beyond the codes of ``bits``."""
    top = grids.level_max("uniform", bits) * scale
    return (magnitude - top - scale / 2).clamp_(min=0).square_().sum()


def _some(matrix: Tensor) -> Tensor:
    """Rows of ``matrix``, evenly spaced, that stand for all."""
    wanted = LONG_ROWS if len(matrix) >= LONG else ROWS
    return matrix[:: max(len(matrix) // wanted, 1)].contiguous()


def _tried(rows: Tensor, spec: QuantSpec, scale: Tensor, count: int) -> tuple[int, float]:
    """Bytes that a folder will hold a matrix of ``count`` rows in, of which these are some, and
    their squared error before compensation."""
    bucket, group = _bucket(spec, rows.device), spec.group_size or 0
    level = ops.quantize(rows, scale, bucket, group)
    codes = grids.codes(level, spec.grid, spec.bits)
    share = count / max(len(rows), 1)
    grown = share * codes.numel() * _growth(rows, spec, scale, count) / 8
    size = min(_coded_bytes(codes, count) + grown, packed_bytes(count, rows.shape[1], spec.bits))
    if group:
        stored = pack_scales(stored_scale(scale, scale_window(scale)).half())
        size += share * min(len(encoded(stored)), len(stored))
    error = ops.fake_quant(rows, scale, bucket, group).sub_(rows).square_().sum()
    return round(size) + _beside(count, spec), float(error)


def _coded_bytes(codes: Tensor, count: int) -> float:
    """Bytes of ``count`` rows like ``codes``, entropy-coded."""
    share = count / max(len(codes), 1)
    if count < LONG:
        return len(encoded_codes(codes)) * share
    places = codes.long() + 256 * torch.arange(codes.shape[1], device=codes.device)
    counts = torch.bincount(places.flatten(), minlength=256 * codes.shape[1]).view(-1, 256)
    # Most of a table is paid for by what the parts of a column differ in: base's embedding takes
    # 0.04 % less than its columns' codes at a step of 0.11, 0.3 less at 0.25, 0.23 more at 0.05.
    return sum(map(huffman_bits, counts.cpu())) * share / 8 + TABLE * codes.shape[1]
