"""fake_quant, forward alone and with its gradients, against PyTorch's and other quantizers.

The ceiling is the ideal traffic at the speed of a copy of the same array, which takes its turn
among the candidates: forward 2 elements a weight, forward and backward 5.
"""

import torch

from bench.options import Options, Shape
from bench.peers import Data
from bench.rows import Problem, Work
from bench.timing import Call

# Weights: attention and MLP of whisper-base, MLP of whisper-large. M plays no part.
SHAPES: tuple[Shape, ...] = ((1, 512, 512), (1, 512, 2048), (1, 1280, 5120))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 512, 512), (1, 512, 2048))
VARIANTS = {"forward": 2, "forward+backward": 5}


def groups(shape: Shape, o: Options) -> list[list[Problem]]:
    return [
        [
            Problem(
                "fake_quant", *shape, bits, o.grid, dtype=o.dtype, device=o.device, variant=variant
            )
        ]
        for bits in o.bits
        for variant in VARIANTS
    ]


def work(p: Problem) -> Work:
    return Work(float(VARIANTS[p.variant] * p.N * p.K * getattr(torch, p.dtype).itemsize))


def data(p: Problem) -> Data:
    nothing = torch.empty(0)
    return nothing, nothing


def copy(p: Problem) -> Call:
    """One read and one write of the weight: 2 elements each."""
    x = torch.randn(p.N, p.K, device=p.device).to(getattr(torch, p.dtype))
    y = torch.empty_like(x)
    return lambda: y.copy_(x)
