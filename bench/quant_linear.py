"""quant_linear against other linear layers, on the shapes of Whisper's."""

import torch

from bench.options import Options, Shape
from bench.peers import Data
from bench.rows import Problem, Work

# (rows of x, in, out): one decoder step, small batches, a prompt, an encoder pass; whisper-base's
# attention, its MLP, and the tied output projection.
SHAPES: tuple[Shape, ...] = (
    *((m, 512, n) for m in (1, 4, 8, 16, 64, 1500) for n in (512, 2048)),
    (1, 2048, 512),
    (1500, 2048, 512),
    (1, 512, 51865),
)
# On a GPU every Whisper: attention, both halves of the MLP, the vocabulary; batches of 8 clips; and
# two matrices that 4-bit kernels are usually measured on.
WIDTHS = (384, 512, 768, 1024, 1280)
CUDA_SHAPES: tuple[Shape, ...] = (
    *(
        (m, k * d, n * d)
        for d in WIDTHS
        for k, n in ((1, 1), (1, 4), (4, 1))
        for m in (1, 2, 4, 8, 16, 64, 1500, 12000)
    ),
    *((m, d, 51866) for d in WIDTHS for m in (1, 8)),
    (1, 4096, 4096),
    (1, 5120, 1280),
)
QUICK_SHAPES: tuple[Shape, ...] = ((1, 512, 2048), (8, 512, 2048), (1500, 512, 512))


def groups(shape: Shape, o: Options) -> list[list[Problem]]:
    """Candidates of one shape, all timed beside the same peers."""
    found = []
    for bits in o.bits:
        kinds = [(a, group) for a in ("int8", "float") for group in (0, *o.group_sizes)]
        found.append(
            [
                Problem("quant_linear", *shape, bits, o.grid, group, activations, o.dtype, o.device)
                for activations, group in kinds
            ]
        )
    return found


def work(p: Problem) -> Work:
    """Packed weights and scales read once, x read, y written."""
    from dqw.packing import packed_bytes

    element = getattr(torch, p.dtype).itemsize
    scales = p.N * -(-p.K // p.group_size) * 2 if p.group_size else p.N * 4
    moved = packed_bytes(p.N, p.K, p.bits) + scales + (p.M * p.K + p.M * p.N) * element
    kind = "int8" if p.activations == "int8" else p.dtype
    return Work(moved, 2.0 * p.M * p.K * p.N, kind)


def data(p: Problem) -> Data:
    x, w = torch.randn(p.M, p.K), torch.randn(p.N, p.K) / p.K**0.5
    return x.to(p.device), w.to(p.device)
