"""dqw's own calls for a ``Problem``, in this process or in that of another revision.

``build(problem)`` gives a function that makes a call with weights of its own, and the bytes of
those weights. Only torch, dqw's operators and the problem are needed.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.rows import Problem
from bench.timing import Call, last_level_cache

Builder = Callable[[], Call]


def build(problem: Problem) -> tuple[Builder, int]:
    return {
        "quant_linear": quant_linear,
        "fake_quant": fake_quant,
        "embedding": embedding,
    }[problem.op](problem)


def packed_matrix(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes (N, K), scales and levels, as ``dqw.ops`` takes them."""
    from dqw import grids, packing

    p = problem
    codes = torch.randint(0, 2**p.bits, (p.N, p.K), dtype=torch.uint8)
    groups = -(-p.K // p.group_size) if p.group_size else 1
    scale = (0.5 + torch.rand(p.N, groups)) / grids.level_max(p.grid, p.bits)
    if p.group_size:
        scale = packing.round_scales(scale).half()
    tensors = packing.pack(codes, p.bits), scale, grids.levels(p.grid, p.bits)
    a, b, c = (t.to(p.device) for t in tensors)
    return a, b, c


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def quant_linear(p: Problem) -> tuple[Builder, int]:
    from dqw import ops

    x = torch.randn(p.M, p.K, device=p.device).to(getattr(torch, p.dtype))
    packed, scale, levels = packed_matrix(p)
    int8 = p.activations == "int8"

    def make() -> Call:
        w, s = packed.clone(), scale.clone()
        return lambda: ops.quant_linear(x, w, s, levels, None, p.N, p.bits, p.group_size, int8)

    return make, size(packed, scale)


def embedding(p: Problem) -> tuple[Builder, int]:
    from dqw import ops

    packed, scale, levels = packed_matrix(p)

    def make(many: int = 1) -> Call:
        w, s = packed.clone(), scale.clone()
        turns = tokens(p, many)

        def call() -> object:
            return ops.quant_embedding(next(turns), w, s, levels, p.N, p.K, p.bits, p.group_size)

        call.turns = many  # type: ignore[attr-defined]
        return call

    whole = size(packed, scale)
    make.cold = partial(make, cold_calls(whole * p.M // p.N))  # type: ignore[attr-defined]
    return make, whole


def tokens(p: Problem, many: int) -> Iterator[Tensor]:
    """ids (M) of ``many`` calls, over and over."""
    return itertools.cycle(torch.randint(0, p.N, (many, p.M), device=p.device).unbind())


def cold_calls(touched: int) -> int:
    """Lookups, of ``touched`` bytes each, after which the first one's rows have left the caches. At
    most 4096: of one row they still fit the last cache."""
    return max(1, min(4096, 2 * last_level_cache() // max(touched, 1)))


def fake_quant(p: Problem) -> tuple[Builder, int]:
    """What a learning layer runs, from the clip."""
    from dqw import grids
    from dqw.fake_quant import Rounded

    bucket = grids.bucket(p.grid, p.bits).to(p.device)

    def rounded(x: Tensor, clip: Tensor) -> Tensor:
        result: Tensor = Rounded.apply(x, clip, bucket, None, p.group_size, 1.0, x.dtype)
        return result

    def make() -> Call:
        call, _ = fake_quant_call(p, 1, rounded)
        return call

    return make, p.N * p.K * getattr(torch, p.dtype).itemsize


def fake_quant_call(
    p: Problem, level_max: int, function: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Call, Tensor]:
    """``function(x, scale)``, forward or with gradients of both, and the x it works on; with a
    level_max of 1 the scale is the clip."""
    backward = p.variant != "forward"
    dtype = getattr(torch, p.dtype)
    x = torch.randn(p.N, p.K, device=p.device).to(dtype).requires_grad_(backward)
    grad = torch.randn(p.N, p.K, device=p.device).to(dtype)
    scale = (torch.full((p.N, 1), 2.5, device=p.device) / level_max).requires_grad_(backward)
    if not backward:
        return lambda: function(x, scale), x

    def step() -> None:
        x.grad = scale.grad = None
        function(x, scale).backward(grad)
        x.grad = scale.grad = None  # no memory that the next call gives back counts for it

    return step, x
