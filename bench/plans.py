"""``python -m bench.plans``: how the CUDA C++ kernel should share a matrix's columns, on a GPU.

Times every plan, so many blocks of a cluster by so many warps, beside the one that ``plan_of`` in
csrc/cuda/gemv.h chooses and the float16 layer: weights in L2, and cold. The largest error of every
plan's result, beside the dequantized product, is written, too. What ``plan_of`` says of an H100 was
read off this table.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from bench import cuda, options, table, timing
from bench.__main__ import exit_with_a_sentence
from bench.calls import packed_matrix, size
from bench.rows import Problem
from dqw import ops, ops_cuda
from dqw.errors import UserError

SHAPES = (
    (512, 512), (512, 2048), (2048, 512), (768, 768), (768, 3072), (3072, 768), (1280, 1280),
    (1280, 5120), (5120, 1280), (4096, 4096), (1280, 51866),
)  # fmt: skip
STEP = 128  # columns


def plans(cols: int, most: int) -> Iterator[tuple[int, int]]:
    """(cluster_shift, warps) with work for every warp, and at most 8 rounds of it."""
    steps = -(-cols // STEP)
    for shift in range(4):
        own = -(-steps >> shift) if steps >= 1 << shift else 0
        for warps in (1, 2, 3, 4, 5, 6, 8, 10):
            if warps <= min(own, most) and own <= 8 * warps:
                yield shift, warps


def microseconds(make: timing.Call, weight_bytes: int, cold: bool) -> float:
    run = cuda.candidate(timing.rotated(make, weight_bytes, cold))
    run(20)
    return sorted(run(100) / 100 for _ in range(5))[2] * 1e6


def measure(rows: int, cols: int, out: int, group_size: int) -> Iterator[dict]:
    """A row for float16, then one for plan_of's choice (no plan), then one for every plan."""
    x = torch.randn(rows, cols, device="cuda", dtype=torch.float16)
    problem = Problem("quant_linear", rows, cols, out, 4, "apot", group_size, "float", "float16",
                      "cuda")  # fmt: skip
    weight, scale, levels = packed_matrix(problem)
    exact = ops.dequantize(weight, scale, levels, out, cols, 4, group_size)
    want, half = x.float() @ exact.T, exact.half()
    shape = {"M": rows, "K": cols, "N": out, "group_size": group_size}

    def timed(make: timing.Call, weight_bytes: int) -> dict:
        return {name: microseconds(make, weight_bytes, name == "cold") for name in ("hot", "cold")}

    def float16() -> timing.Call:
        own = half.clone()
        return lambda: F.linear(x, own)

    def packed() -> timing.Call:
        w, s = weight.clone(), scale.clone()
        return lambda: ops.quant_linear(x, w, s, levels, None, out, 4, group_size, False)

    yield {**shape, "plan": "float16", **timed(float16, size(half))}
    chosen = [(0, 0), *plans(cols, 8 if rows > 8 else 10)]
    try:
        for plan in chosen:
            torch.ops.dqw_cuda.force_plan(*plan)
            error = ((packed()() - want).abs().max() / want.abs().max()).item()
            name = f"{1 << plan[0]} x {plan[1]}" if plan[1] else "plan_of"
            yield {**shape, "plan": name, **timed(packed, size(weight, scale)), "error": error}
    finally:
        torch.ops.dqw_cuda.force_plan(0, 0)


def main(
    shapes: Annotated[str, typer.Option(help="whisper, or M,K,N;M,K,N.")] = "whisper",
    group_size: Annotated[int, typer.Option(help="0 (one scale a row), 16, 32, 64, 128.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows.")] = None,
) -> None:
    """Every plan of the CUDA C++ kernel at 4 bits, beside float16."""
    options.check_device("cuda")
    if ops_cuda.gemv_reason:
        raise UserError(f"The CUDA C++ kernel is not here: {ops_cuda.gemv_reason}.")
    options.check_writable(json_file, "--json")
    named = options.parse_shapes(shapes)
    rows: list[dict] = []
    console = Console()
    for m, k, n in named or [(m, k, n) for k, n in SHAPES for m in (1, 16)]:
        found = list(measure(m, k, n, group_size))
        rows += found
        view = Table("plan", "hot us", "cold us", title=f"{m} x {k} -> {n}, groups {group_size}")
        for row in (*found[:2], *sorted(found[2:], key=lambda r: r["hot"])[:5]):
            view.add_row(row["plan"], f"{row['hot']:.2f}", f"{row['cold']:.2f}")
        console.print(view)
        if json_file:
            o = options.Options(device="cuda")
            text = json.dumps({"machine": table.machine(o, False), "rows": rows}, indent=1)
            json_file.write_text(text + "\n")


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
