"""Entropy coding: small integers as a folder holds them, and back.

Codes are not equally likely. Those of a uniform grid whose step is half the weights' deviation have
5 bits and carry 3, and the 16 levels of a Lloyd grid carry 3.8. Huffman codes come within 1 to 2 %
of that. They are deflate's, from Python's own zlib, so that every machine reads them: a table
serves about 16,000 codes, and rows of other spreads get one of their own.

A weight whose blocks have one plane (2, 4 or 8 bits, ``dqw.packing``) is coded as its packed bytes
are, any other as one byte a code: its planes apart say less than all of a code together.
"""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dqw.errors import UserError
from dqw.packing import pack, packed_bytes, planes, unpack

PIECE = 2**21  # codes unpacked at once: of base's embedding all would take 115 MB more


def encoded(values: Tensor) -> Tensor:
    """``values`` (uint8, any shape) as flat uint8: a raw deflate stream of Huffman codes alone."""
    raw = values.detach().cpu().contiguous().numpy()
    coder = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    stream = coder.compress(raw.tobytes()) + coder.flush()
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def decoded(stream: Tensor, size: int) -> Tensor:
    """The ``size`` values, flat uint8 on the CPU, that ``encoded`` made ``stream`` of.

    Raises UserError for a stream that is damaged or holds another number.
    """
    parts = list(_pieces(stream, size, max(size, 1)))
    return parts[0] if parts else torch.empty(0, dtype=torch.uint8)


def _pieces(stream: Tensor, size: int, piece: int) -> Iterator[Tensor]:
    """The same in pieces of ``piece`` values, and what is left."""
    coder, rest, found = zlib.decompressobj(-zlib.MAX_WBITS), stream.cpu().numpy().tobytes(), 0
    while True:
        try:
            values = coder.decompress(rest, piece)
        except zlib.error as error:
            raise UserError(
                f"a coded tensor is damaged ({error}): copy the folder again."
            ) from error
        found, rest = found + len(values), coder.unconsumed_tail
        if found > size or (found < size and len(values) < piece):
            raise UserError(
                f"a coded tensor holds {found} values instead of {size}: copy the folder again."
            )
        if not values:
            return
        yield torch.frombuffer(bytearray(values), dtype=torch.uint8)


def encoded_weight(weight: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """A packed ``weight`` (flat uint8) as a flat stream."""
    return encoded(weight if len(planes(bits)) == 1 else unpack(weight, rows, cols, bits))


def decoded_weight(stream: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """The packed weight, flat uint8 on the CPU; the inverse of ``encoded_weight``."""
    if len(planes(bits)) == 1:
        return decoded(stream, packed_bytes(rows, cols, bits))
    piece = max(PIECE // max(cols, 1), 1) * cols
    parts = [pack(p.view(-1, cols), bits) for p in _pieces(stream, rows * cols, max(piece, 1))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
