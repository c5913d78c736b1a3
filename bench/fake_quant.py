"""fake_quant, forward and with its gradients, against PyTorch's and an eager argmin quantizer."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench import peers
from bench.table import Candidates, Row, time_interleaved
from dqw import grids, ops

# Weights (out, in): attention and MLP of whisper-base, MLP of whisper-large.
SHAPES = [(512, 512), (2048, 512), (5120, 1280)]
QUICK_SHAPES = [(512, 512), (2048, 512)]


def candidates(rows: int, cols: int, bits: int, grid: str, backward: bool) -> Candidates:
    x = torch.randn(rows, cols, requires_grad=backward)
    grad = torch.randn(rows, cols)
    top = grids.level_max(grid, bits)
    uniform_top = grids.level_max("uniform", bits)
    levels = torch.tensor(grids.magnitudes(grid, bits)).float()

    def scale(level_max: int) -> Tensor:
        return (torch.full((rows, 1), 2.5) / level_max).requires_grad_(backward)

    def call(function: Callable[[Tensor], Tensor], s: Tensor) -> Callable[[], object]:
        if not backward:
            return lambda: function(s)

        def step() -> None:
            x.grad = s.grad = None
            function(s).backward(grad)

        return step

    bucket, uniform = grids.bucket(grid, bits), grids.bucket("uniform", bits)
    copy = torch.empty(rows, cols)
    found: Candidates = {} if backward else {"copy": lambda: copy.copy_(x)}
    if not backward:
        found["per_channel_affine"] = call(
            lambda s: peers.per_channel_affine(x, s, uniform_top), scale(uniform_top)
        )
    return found | {
        "learnable_per_channel": call(
            lambda s: peers.learnable_per_channel_affine(x, s, uniform_top), scale(uniform_top)
        ),
        f"argmin {grid}": call(lambda s: peers.argmin_over_levels(x, s, levels), scale(top)),
        "dqw uniform": call(lambda s: ops.fake_quant(x, s, uniform, 0), scale(uniform_top)),
        f"dqw {grid}": call(lambda s: ops.fake_quant(x, s, bucket, 0), scale(top)),
    }


def run(
    shapes: list[tuple[int, ...]] | None, bits: int, grid: str, quick: bool
) -> dict[str, list[Row]]:
    """Two tables; ``work`` is the least traffic: 2 floats a weight forward, 5 with gradients."""
    tables: dict[str, list[Row]] = {"forward": [], "forward and backward": []}
    for rows, cols in shapes or (QUICK_SHAPES if quick else SHAPES):
        for title, floats in (("forward", 2), ("forward and backward", 5)):
            timings = time_interleaved(
                candidates(rows, cols, bits, grid, backward=floats == 5), quick
            )
            tables[title].append(Row(f"{rows} × {cols}", 4.0 * floats * rows * cols, timings))
    return tables
