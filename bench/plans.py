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

from bench import options, table, timing
from bench.__main__ import exit_with_a_sentence
from bench.calls import packed_matrix, size
from bench.rows import Problem, write
from dqw import ops, ops_cuda
from dqw.errors import UserError
from dqw.recipe import GROUP_SIZES

SHAPES = (
    (512, 512), (512, 2048), (2048, 512), (768, 768), (768, 3072), (3072, 768), (1280, 1280),
    (1280, 5120), (5120, 1280), (4096, 4096), (1280, 51866),
)  # fmt: skip
STEP = 128  # columns
# Of 4 bits in csrc/cuda/gemv.h, by rows of x: warps of a block, and log2 of a cluster's blocks.
MOST = {8: (10, 3), 16: (8, 3), 32: (4, 2)}


def plans(cols: int, most: int, shifts: int = 3) -> Iterator[tuple[int, int]]:
    """(cluster_shift, warps) with work for every warp, and at most 8 rounds of it."""
    steps = -(-cols // STEP)
    for shift in range(shifts + 1):
        own = -(-steps >> shift) if steps >= 1 << shift else 0
        for warps in (1, 2, 3, 4, 5, 6, 8, 10):
            if warps <= min(own, most) and own <= 8 * warps:
                yield shift, warps


def measure(rows: int, cols: int, out: int, group_size: int, device: str = "cuda") -> list[dict]:
    """float16, then plan_of's choice, then every plan: seconds, hot and cold, timed in turns."""
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    problem = Problem("quant_linear", rows, cols, out, 4, "apot", group_size, "float", "float16",
                      device)  # fmt: skip
    _check(rows, cols, group_size)
    weight, scale, levels = packed_matrix(problem)
    exact = ops.dequantize(weight, scale, levels, out, cols, 4, group_size)
    want, half = x.float() @ exact.T, exact.half()

    def float16() -> timing.Call:
        own = half.clone()
        return lambda: F.linear(x, own)

    def packed() -> timing.Call:
        w, s = weight.clone(), scale.clone()
        if device == "cpu":
            return lambda: ops.quant_linear(x, w, s, levels, None, out, 4, group_size, False)
        # Directly: quant_linear gives to Triton what that is faster at.
        given, gemv = (x, [w], [s], levels, [x.new_empty(0)]), torch.ops.dqw_cuda.gemv
        return lambda: gemv(*given, [out], 4, group_size, False)[0]

    errors: dict[str, float] = {}
    timings: dict[str, dict[str, float]] = {}
    for where in ("hot", "cold"):
        call = timing.rotated(float16, size(half), where == "cold")
        candidates = {"float16": timing.local(call, device, "float16")}
        try:  # a graph holds the plan that it was captured with
            most = next(MOST[n] for n in MOST if rows <= n)
            if device != "cpu" and torch.cuda.get_device_capability() < (9, 0):
                most = most[0], 0  # without clusters
            for plan in [(0, 0), *plans(cols, *most)]:
                name = f"{1 << plan[0]} x {plan[1]}" if plan[1] else "plan_of"
                torch.ops.dqw_cuda.force_plan(*plan)
                errors[name] = ((packed()() - want).abs().max() / want.abs().max()).item()
                call = timing.rotated(packed, size(weight, scale), where == "cold")
                candidates[name] = timing.local(call, device, name)
        finally:
            torch.ops.dqw_cuda.force_plan(0, 0)
        for name, found in timing.time_interleaved(candidates, quick=True).items():
            timings.setdefault(name, {})[where] = found.p50
    shape = {"M": rows, "K": cols, "N": out, "group_size": group_size}
    return [{**shape, "plan": n, **t, "error": errors.get(n)} for n, t in timings.items()]


def _check(rows: int, cols: int, group_size: int) -> None:
    if rows > max(MOST) or cols % 8 or group_size not in (0, *GROUP_SIZES):
        raise UserError(
            f"{rows} rows of {cols} columns in groups of {group_size} are not the kernel's: give "
            f"up to {max(MOST)} rows, columns in eights, and groups of 0 or "
            f"{', '.join(map(str, GROUP_SIZES))}."
        )


def main(
    shapes: Annotated[str, typer.Option(help="whisper, or M,K,N;M,K,N.")] = "whisper",
    group_size: Annotated[int, typer.Option(help="0 (one scale a row), 16, 32, 64, 128.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows.")] = None,
) -> None:
    """Every plan of the CUDA C++ kernel at 4 bits, beside float16."""
    if not torch.cuda.is_available():
        raise UserError("Plans are of a kernel that needs an NVIDIA GPU, and torch finds none.")
    if ops_cuda.library_reason:
        raise UserError(f"The CUDA C++ kernel is not here: {ops_cuda.library_reason}.")
    options.check_writable(json_file, "--json")
    named = options.parse_shapes(shapes)
    for m, k, _ in named or []:
        _check(m, k, group_size)
    rows: list[dict] = []
    console = Console()
    machine = table.machine(options.Options(device="cuda"), False)
    for m, k, n in named or [(m, k, n) for k, n in SHAPES for m in (1, 16)]:
        found = measure(m, k, n, group_size)
        rows += found
        view = Table("plan", "hot us", "cold us", title=f"{m} x {k} -> {n}, groups {group_size}")
        for row in (*found[:2], *sorted(found[2:], key=lambda r: r["hot"])[:5]):
            view.add_row(row["plan"], *(f"{row[where] * 1e6:.2f}" for where in ("hot", "cold")))
        console.print(view)
        if json_file:  # at every shape: a run that is cut off has lost nothing
            write(json_file, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
