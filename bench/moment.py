"""``python -m bench.moment``: the sums of products that calibration takes of a layer's inputs,
dqw's kernel of bfloat16 against PyTorch's product, in turns.
"""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.__main__ import exit_with_a_sentence
from bench.timing import Candidate, local, time_interleaved
from dqw.errors import UserError


def compare(rows: int, cols: int, quick: bool) -> list[tuple[str, float, float]]:
    """(name, ms, GFLOP/s) of each; x and y (rows, cols) random bfloat16. X^T X counts as if it
    were not symmetric. torch's bfloat16 has sums of float32 that it rounds to bfloat16."""
    x, y = (torch.randn(rows, cols).bfloat16() for _ in range(2))
    total = torch.zeros(cols, cols)
    wide_x, wide_y = x.float(), y.float()
    calls: dict[str, Candidate] = {
        "dqw X^T X": local(lambda: torch.ops.dqw_cpu.add_moment(total, x)),
        "dqw Y^T X": local(lambda: torch.ops.dqw_cpu.add_moment(total, x, y)),
        "torch float32": local(lambda: total.addmm_(wide_y.T, wide_x)),
        "torch bfloat16": local(lambda: torch.mm(y.T, x)),
    }
    work = 2.0 * rows * cols**2
    times = time_interleaved(calls, quick)
    return [(name, times[name].p50 * 1e3, work / times[name].p50 / 1e9) for name in calls]


def main(
    rows: Annotated[int, typer.Option(help="Rows: calibration takes up to 4096 at once.")] = 3000,
    cols: Annotated[str, typer.Option(help="Columns: a layer's inputs.")] = "512,768,2048",
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
) -> None:
    """Moments of a layer's inputs, dqw against torch."""
    from dqw import ops  # noqa: F401  loads the library

    if not hasattr(torch.ops.dqw_cpu, "add_moment"):
        raise UserError("the C++ library is not loaded: see what `dqw info` says.")
    one = torch.ones(1, 1)
    if not torch.ops.dqw_cpu.add_moment(one, one.bfloat16()):
        name = torch.ops.dqw_cpu.instruction_set()
        raise UserError(f"on {name} there is no such kernel: torch's product serves.")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for n in cols.split(","):
        table = Table("", "ms", "GFLOP/s", title=f"{rows} rows, {n} columns")
        for name, ms, rate in compare(rows, int(n), quick):
            table.add_row(name, f"{ms:.2f}", f"{rate:.0f}")
        Console().print(table)


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
