"""What the kernel tests share: instruction sets, scales and packed weights of every shape."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dqw import grids, ops, packing

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
BITS = range(2, 9)

needs_library = pytest.mark.skipif(
    not hasattr(torch.ops.dqw_cpu, "instruction_set"), reason="the C++ library is not loaded"
)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels of one tier; skips the test where the machine lacks it."""
    assert ops is not None  # importing it loads the library
    if name not in torch.ops.dqw_cpu.instruction_sets().split():
        pytest.skip(f"this machine has no {name}")
    before = torch.ops.dqw_cpu.set_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.dqw_cpu.set_instruction_set(before)


def random_scale(rows: int, cols: int, granularity: str, size: float = 1.0) -> tuple[Tensor, int]:
    """A scale around ``size``, shaped for ``tensor``, ``channel`` or a group size."""
    group = int(granularity) if granularity.isdigit() else 0
    groups = -(-cols // group) if group else 1
    return (torch.rand(1 if granularity == "tensor" else rows, groups) + 0.5) * size, group


def random_weight(rows: int, cols: int, bits: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Random packed codes and the int64 levels (rows, cols) that they stand for."""
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    return packing.pack(codes, bits), levels[codes.long()].long()


def wildest_levels(bits: int) -> Tensor:
    """A table that no grid has: anything that the format allows."""
    table = torch.randint(-32639, 32640, (2**bits,), dtype=torch.int16)
    table[1], table[-1] = -32639, 32639
    return table


def all_grids() -> list[tuple[str, int]]:
    return [(grid, bits) for grid in grids.GRIDS for bits in grids.widths(grid)]
