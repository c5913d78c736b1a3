"""``python -m bench.attention``: the encoder's attention of one layer, every instruction set of
this machine against PyTorch's, in turns; and how far each is from float64.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.__main__ import exit_with_a_sentence
from bench.timing import Candidate, local, time_interleaved
from dqw.errors import UserError

HEAD = 64  # the width of a head in every Whisper
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(name: str) -> Attention:
    """The tier ``name``; it stays in use afterwards."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.ops.dqw_cpu.set_instruction_set(name)
        return torch.ops.dqw_cpu.attention(q, k, v, True)

    return run


def plain(dtype: torch.dtype) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v)), scale=1.0)

    return run


def compare(
    positions: int, width: int, quick: bool, queries: int = 0
) -> list[tuple[str, float, float, float]]:
    """(name, ms, GFLOP/s, relative error) of each; random q, k and v, scores about 1. queries: 0
    for as many as positions."""
    heads, queries = width // HEAD, queries or positions
    q, k, v = (torch.randn(1, heads, n, HEAD) for n in (queries, positions, positions))
    q = q / HEAD**0.5
    ways = {"torch float32": plain(torch.float32)}
    ways["torch bfloat16"] = plain(torch.bfloat16)
    before = torch.ops.dqw_cpu.instruction_set()
    for name in torch.ops.dqw_cpu.instruction_sets().split():
        ways[f"dqw {name}"] = native(name)
    exact = plain(torch.float64)(q, k, v)
    calls: dict[str, Candidate] = {
        name: local(lambda way=way: way(q, k, v)) for name, way in ways.items()
    }
    times = time_interleaved(calls, quick)
    found = []
    for name, way in ways.items():
        error = float((way(q, k, v).double() - exact).norm() / exact.norm())
        work = 4.0 * queries * positions * width
        found.append((name, times[name].p50 * 1e3, work / times[name].p50 / 1e9, error))
    torch.ops.dqw_cpu.set_instruction_set(before)
    return found


def main(
    positions: Annotated[str, typer.Option(help="Positions: 1500 are 30 s.")] = "1500,500",
    width: Annotated[int, typer.Option(help="Of the model: base 512, small 768.")] = 512,
    queries: Annotated[int, typer.Option(help="A decoder's tokens; 0: the positions.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
) -> None:
    """The encoder's attention of one layer on every instruction set, heads one after the other."""
    from dqw import ops  # noqa: F401  loads the library

    if not hasattr(torch.ops.dqw_cpu, "attention"):
        raise UserError("the C++ library is not loaded: see what `dqw info` says.")
    if width % HEAD or width <= 0:
        raise UserError(f"--width {width} is no multiple of {HEAD}, a head's width.")
    lengths = positions.split(",")
    if not all(n.isdecimal() and int(n) for n in lengths) or queries < 0 or threads < 1:
        raise UserError("--positions, --queries and --threads are whole numbers from 1 on.")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for n in lengths:
        table = Table("", "ms", "GFLOP/s", "error", title=f"{n} positions, width {width}")
        for name, ms, rate, error in compare(int(n), width, quick, queries):
            table.add_row(name, f"{ms:.2f}", f"{rate:.0f}", f"{error:.1e}")
        Console().print(table)


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
