"""``python -m bench``: dqw's operators timed against PyTorch's, on this machine."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

Op = Enum("Op", {name: name for name in ("all", "quant_linear", "fake_quant")})


def parse_shapes(text: str | None, count: int, form: str) -> list[tuple[int, ...]] | None:
    if not text:
        return None
    try:
        shapes = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
        if any(len(shape) != count or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of shapes such as {form}") from None
    return shapes


def main(
    op: Annotated[Op, typer.Option(help="The operator to time.")] = Op.all,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="quant_linear: 1x512x2048,1500x512x512 (x's rows, in, out). "
            "fake_quant: 512x2048 (out, in)."
        ),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Width of a weight's code.")] = 4,
    grid: Annotated[str, typer.Option(help="apot, pot or uniform.")] = "apot",
    threads: Annotated[
        int | None, typer.Option(help="Threads; PyTorch's choice if not given.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write all timings, in seconds, to this file."),
    ] = None,
) -> None:
    """Time dqw's kernels against PyTorch's own.

    Candidates take turns and medians are shown; × is how many times faster than the first column,
    and rows that lose stay. Example: python -m bench --op quant_linear --bits 4 --quick
    """
    from bench import fake_quant, quant_linear, table
    from dqw.errors import UserError
    from dqw.grids import check_grid

    if shapes and op is Op.all:
        raise typer.BadParameter("--shapes needs --op quant_linear or --op fake_quant")
    try:
        check_grid(grid, bits)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    table.print_header(console)
    results: dict[str, list[table.Row]] = {}
    if op in (Op.all, Op.quant_linear):
        rows = quant_linear.run(parse_shapes(shapes, 3, "1x512x2048"), bits, grid, quick)
        title = f"quant_linear, {grid} {bits} bits"
        table.print_table(console, title, rows, "F.linear float32", "GOP/s")
        results[title] = rows
    if op in (Op.all, Op.fake_quant):
        tables = fake_quant.run(parse_shapes(shapes, 2, "512x2048"), bits, grid, quick)
        for part, rows in tables.items():
            title = f"fake_quant {part}, {bits} bits, per channel"
            table.print_table(console, title, rows, "learnable_per_channel", "GB/s")
            results[title] = rows
    if json_file:
        report = {"machine": table.machine(), **{t: table.as_json(r) for t, r in results.items()}}
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
