"""quant_embedding, rows of a packed table by id, against PyTorch's float tables."""

import torch

from bench.options import Options, Shape
from bench.peers import Data
from bench.rows import Problem, Work

# (ids, width, vocabulary): one token, a beam of five, a prompt; whisper-base.
SHAPES: tuple[Shape, ...] = tuple((m, 512, 51865) for m in (1, 5, 224, 4096))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 512, 51865), (224, 512, 51865))


def groups(shape: Shape, o: Options) -> list[list[Problem]]:
    return [
        [
            Problem("embedding", *shape, bits, o.grid, group, "float", "float32", o.device)
            for group in (0, *o.group_sizes)
        ]
        for bits in o.bits
    ]


def work(p: Problem) -> Work:
    """Packed rows and their scales read, float32 rows written."""
    from dqw.packing import packed_bytes

    scales = 2 * -(-p.K // p.group_size) if p.group_size else 4
    return Work(float(packed_bytes(p.M, p.K, p.bits) + p.M * scales + p.M * p.K * 4))


def data(p: Problem) -> Data:
    nothing = torch.empty(0)
    return nothing, nothing
