"""``python -m bench.grids``: how well each grid holds a model's weights; where Lloyd's come from.

Printed: relative squared error in %, each row or group with its best scale, as it is stored, over
some rows of every quantized Linear layer and the embedding, each layer weighing alike.
``--search 4`` looks for the integer levels of least error instead: one level moved by one at a
time, from those of ``dqw.grids`` as far apart as ``--top`` allows, until none helps.
"""

from fnmatch import fnmatchcase
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.__main__ import exit_with_a_sentence
from dqw import grids, ops
from dqw.errors import UserError
from dqw.fake_quant import FakeQuantize, least_squares_scale
from dqw.recipe import QuantSpec, Recipe

COLUMNS = 384  # of a layer, so that layers of all widths make one matrix; divisible by all groups


def sample(model: torch.nn.Module, rows: int, layers: str = "*") -> Tensor:
    """(layers × rows, up to 384): random rows of each layer over the layer's deviation.

    layers: a glob of names. Raises UserError if it matches no Linear layer and no embedding.
    """
    draw = torch.Generator().manual_seed(0)
    names = [name for name in Recipe().plan(model) if fnmatchcase(name, layers)]
    weights = [model.get_submodule(name).weight.detach() for name in names]
    weights = [w.float() for w in weights if w.dim() == 2]  # convolutions are stored otherwise
    if not weights:
        raise UserError(f"--layers {layers!r} matches no layer: try '*.decoder.layers.2.fc1'.")
    columns = min(COLUMNS, *(w.shape[1] for w in weights))
    parts = [w[torch.randperm(len(w), generator=draw)[:rows], :columns] for w in weights]
    return torch.cat([part / part.std() for part in parts]).contiguous()


def error(weight: Tensor, spec: QuantSpec) -> float:
    """Relative squared error of ``weight`` in %, with scales as a folder holds them."""
    return _share(weight, FakeQuantize(spec, weight)(weight).detach())


def _share(weight: Tensor, rounded: Tensor) -> float:
    return 100 * float((rounded - weight).square().sum() / weight.square().sum())


def search(weight: Tensor, magnitudes: tuple[int, ...], top: int, group_size: int) -> list[int]:
    """Magnitudes up to ``top`` that no step of one makes better."""
    spec = QuantSpec(bits=2, grid="uniform", group_size=group_size)  # for the group size alone

    def error_of(values: list[int]) -> float:
        bucket = grids.rounding_table(tuple(values))
        scale = least_squares_scale(weight, spec, bucket)
        return _share(weight, ops.fake_quant(weight, scale, bucket, group_size))

    best, least, moved = list(magnitudes), error_of(list(magnitudes)), True
    while moved:
        moved = False
        for place in range(len(best)):
            for step in (-1, 1):
                tried = [*best[:place], best[place] + step, *best[place + 1 :]]
                if tried != sorted(set(tried)) or tried[0] < 1 or tried[-1] > top:
                    continue
                now = error_of(tried)
                if now < least - 1e-6:
                    best, least, moved = tried, now, True
    print(f"{least:.4f} % with {best}")
    return best


def main(
    model: Annotated[str, typer.Option(help="A float Whisper: hub id or folder.")],
    groups: Annotated[str, typer.Option(help="Group sizes; 0: one scale a row.")] = "0,64,32,16",
    rows: Annotated[int, typer.Option(help="Rows taken of each layer.")] = 32,
    layers: Annotated[str, typer.Option(help="Glob of the layers' names.")] = "*",
    search_bits: Annotated[
        int | None, typer.Option("--search", help="Search Lloyd levels of so many bits.")
    ] = None,
    top: Annotated[int, typer.Option(help="The largest level that --search may take.")] = 31,
) -> None:
    """Squared error of every grid on a model's own weights."""
    from dqw.whisper.checkpoint import load_whisper

    weight = sample(load_whisper(model)[0], rows, layers)
    sizes = [int(g) for g in groups.split(",")]
    if search_bits:
        known = grids.magnitudes("lloyd", search_bits)
        finer = max(top // known[-1], 1)
        search(weight, tuple(finer * value for value in known), top, sizes[-1])
        return
    for size in sizes:
        title = f"groups of {size}" if size else "one scale a row"
        table = Table("bits", *grids.GRIDS, title=f"relative squared error in %, {title}")
        for bits in range(2, 9):
            row = [
                f"{error(weight, QuantSpec(bits=bits, grid=grid, group_size=size or None)):.3f}"
                if bits in grids.widths(grid)
                else "-"
                for grid in grids.GRIDS
            ]
            table.add_row(str(bits), *row)
        Console().print(table)


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
