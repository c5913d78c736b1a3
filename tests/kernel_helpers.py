"""What the kernel tests share: instruction sets, scales and packed weights of every shape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dqw import grids, ops, packing
from dqw.linear import QuantModule

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
BF16_SETS = ("avx512_bf16", "amx")  # many rows of the native networks run in bfloat16
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


@contextmanager
def float_products() -> Iterator[None]:
    """The best tier that multiplies many rows in float32: equal texts need equal numbers."""
    sets = torch.ops.dqw_cpu.instruction_sets().split()
    with instruction_set(next(name for name in sets if name not in BF16_SETS)):
        yield


@contextmanager
def in_bfloat16(model: torch.nn.Module) -> Iterator[None]:
    """Round what goes into every packed layer and what comes out, as autocast does."""
    hooks = []
    for layer in model.modules():
        if isinstance(layer, QuantModule):
            hooks.append(
                layer.register_forward_pre_hook(lambda _, x: (x[0].bfloat16().float(), *x[1:]))
            )
            hooks.append(layer.register_forward_hook(lambda _, x, y: y.bfloat16().float()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tolerance(
    model: torch.nn.Module, run: Callable[[], Tensor], wanted: Tensor, share: float,
    bf16: bool = False,
) -> float:  # fmt: skip
    """How far native states may be from ``wanted = run()`` of the plain modules: ``share`` of the
    largest, and where products may be of bfloat16 and are on the tier in use, twice what that costs
    the plain ones."""
    limit = share * float(wanted.abs().max())
    if bf16 and torch.ops.dqw_cpu.instruction_set() in BF16_SETS:
        with in_bfloat16(model):
            limit += 2 * float((run() - wanted).abs().max())
    return limit


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int64 activations and their float32 scale, as ``fake_quant_activation`` rounds."""
    largest = x.float().abs().amax(-1, keepdim=True)
    return torch.round(x.float() * (largest.reciprocal() * 127.0)).long(), largest / 127.0


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor, where: object) -> None:
    """``got`` is at most twice as far from ``exact``, float64, as the plain product is."""
    error, limit = (got - exact).abs().max(), 2 * (plain - exact).abs().max()
    assert error <= limit + 1e-6 * exact.abs().max(), (where, float(error), float(limit))


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
