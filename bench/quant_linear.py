"""quant_linear against PyTorch's linear layers, on the shapes of Whisper's layers."""

import torch

from bench import peers
from bench.table import Candidates, Row, time_interleaved
from dqw import grids, ops, packing

# (rows of x, in, out): one decoder step, small batches, a prompt, an encoder pass; whisper-base's
# attention, its MLP, and the tied output projection.
SHAPES = [
    *[(m, 512, n) for m in (1, 4, 8, 16, 64, 1500) for n in (512, 2048)],
    (1, 2048, 512),
    (1500, 2048, 512),
    (1, 512, 51865),
]
QUICK_SHAPES = [(1, 512, 2048), (8, 512, 2048), (1500, 512, 512)]


def candidates(m: int, k: int, n: int, bits: int, grid: str) -> Candidates:
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    found = {name: build(x, w) for name, build in peers.LINEAR.items()}
    levels, top = grids.levels(grid, bits), grids.level_max(grid, bits)
    packed = packing.pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    channel, groups = torch.rand(n, 1) / top, torch.rand(n, -(-k // 64)) / top
    xb = x.bfloat16()

    def call(x: torch.Tensor, scale: torch.Tensor, group: int, int8: bool):
        return lambda: ops.quant_linear(x, packed, scale, levels, None, n, bits, group, int8)

    return found | {
        "dqw int8": call(x, channel, 0, True),
        "dqw int8 groups of 64": call(x, groups, 64, True),
        "dqw float": call(x, channel, 0, False),
        "dqw float bfloat16": call(xb, channel, 0, False),
    }


def run(shapes: list[tuple[int, ...]] | None, bits: int, grid: str, quick: bool) -> list[Row]:
    rows = []
    for shape in shapes or (QUICK_SHAPES if quick else SHAPES):
        m, k, n = shape
        timings = time_interleaved(candidates(m, k, n, bits, grid), quick)
        rows.append(Row(f"{m} × {k} → {n}", 2.0 * m * k * n, timings))
    return rows
