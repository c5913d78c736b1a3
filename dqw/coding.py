"""Entropy coding: small integers as a folder holds them, and back.

Codes are not equally likely. Those of a uniform grid whose step is half the weights' deviation have
5 bits and carry 3, and the 16 levels of a Lloyd grid carry 3.8. Huffman codes come within 2 % of
that, at a step of one deviation, 2.1 bits, within 5 %. They are deflate's, from Python's own zlib,
so that every machine reads them.

A weight is coded column by column, one byte a code: columns have spreads of their own, an
embedding's above all (in base from 0.2 to 5 times its mean), and a table of codes serves what
follows each other. Long columns each begin a table. Base's embedding takes 12.35 MB so at a step of
0.11 deviations, 15.47 row by row; the entropies of its columns are 12.27.
"""

import heapq
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dqw.errors import UserError
from dqw.packing import pack, padded, unpack

CHUNK = 2**16  # bytes of a stream read at once: at most eight times as many codes
PIECE = 2**21  # codes packed at once: of base's embedding all would take 115 MB more
# Rows from which each column begins a table of its own, some 70 bytes. At 2,048 rows that costs
# 0.7 % more than it saves (base's fc1), at 51,865 it saves 4 %.
LONG = 8192


def encoded(values: Tensor) -> Tensor:
    """``values`` (uint8, any shape) as flat uint8: a raw deflate stream of Huffman codes alone."""
    return _stream([values.detach().cpu().flatten()])


def _stream(parts: Iterable[Tensor]) -> Tensor:
    """One stream of all parts, flat uint8 on the CPU; each begins a table."""
    coder = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    made = []
    for part in parts:
        made += [coder.compress(part.numpy().tobytes()), coder.flush(zlib.Z_BLOCK)]
    return torch.frombuffer(bytearray(b"".join([*made, coder.flush()])), dtype=torch.uint8)


def decoded(stream: Tensor, size: int) -> Tensor:
    """The ``size`` values, flat uint8 on the CPU, that ``encoded`` made ``stream`` of.

    Raises UserError for a stream that is damaged or holds another number.
    """
    values, found = torch.empty(size, dtype=torch.uint8), 0
    coder, raw = zlib.decompressobj(-zlib.MAX_WBITS), stream.cpu().numpy()
    for start in range(0, len(raw), CHUNK):
        try:
            piece = coder.decompress(raw[start : start + CHUNK].tobytes())
        except zlib.error as error:
            raise UserError(
                f"a coded tensor is damaged ({error}): copy the folder again."
            ) from error
        begin, found = found, found + len(piece)
        if found > size:
            break
        values.numpy()[begin:found] = np.frombuffer(piece, np.uint8)
    if found != size:
        raise UserError(
            f"a coded tensor holds {found} values instead of {size}: copy the folder again."
        )
    return values


def encoded_weight(weight: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """A packed ``weight`` (flat uint8) as a flat stream of its columns' codes."""
    return encoded_codes(unpack(weight, rows, cols, bits))


def encoded_codes(codes: Tensor) -> Tensor:
    """The same of its codes (rows, cols), uint8."""
    columns = codes.detach().cpu().T.contiguous()
    return _stream(columns if len(codes) >= LONG else [columns.flatten()])


def decoded_weight(stream: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """The packed weight, flat uint8 on the CPU; the inverse of ``encoded_weight``. Raises UserError
    as ``decoded`` does."""
    codes = decoded(stream, rows * cols).view(cols, rows).T
    packed = torch.empty(rows, padded(cols) // 8 * bits, dtype=torch.uint8)
    some = max(PIECE // max(cols, 1), 1)
    for start in range(0, rows, some):
        part = packed[start : start + some]
        part.copy_(pack(codes[start : start + some], bits).view_as(part))
    return packed.flatten()


def huffman_bits(counts: Tensor) -> int:
    """Bits of Huffman codes, without the table, of values that occur ``counts`` (values,) times
    each, integers."""
    heap = sorted(count for count in counts.tolist() if count)
    if len(heap) == 1:
        return heap[0]
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, both)
        total += both
    return total
