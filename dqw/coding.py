"""Entropy coding: small integers as a folder holds them, and back.

Codes are not equally likely. Those of a uniform grid whose step is half the weights' deviation have
5 bits and carry 3, and the 16 levels of a Lloyd grid carry 3.8. Huffman codes come within 1 to 2 %
of that. They are deflate's, from Python's own zlib, so that every machine reads them: a table
serves about 16,000 codes, and rows of other spreads get one of their own.

A weight whose blocks have one plane (2, 4 or 8 bits, ``dqw.packing``) is coded as its packed bytes
are, any other as one byte a code: its planes apart say less than all of a code together.
"""

import zlib

import torch
from torch import Tensor

from dqw.errors import UserError
from dqw.packing import pack, packed_bytes, unpack

ONE_PLANE = (2, 4, 8)


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
    try:
        values = zlib.decompress(stream.cpu().numpy().tobytes(), -zlib.MAX_WBITS, bufsize=size or 1)
    except zlib.error as error:
        raise UserError(f"a coded tensor is damaged ({error}): copy the folder again.") from error
    if len(values) != size:
        raise UserError(
            f"a coded tensor holds {len(values)} values instead of {size}: copy the folder again."
        )
    return torch.frombuffer(bytearray(values), dtype=torch.uint8) if size else stream.new_empty(0)


def encoded_weight(weight: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """A packed ``weight`` (flat uint8) as a flat stream."""
    return encoded(weight if bits in ONE_PLANE else unpack(weight, rows, cols, bits))


def decoded_weight(stream: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """The packed weight, flat uint8 on the CPU; the inverse of ``encoded_weight``."""
    if bits in ONE_PLANE:
        return decoded(stream, packed_bytes(rows, cols, bits))
    return pack(decoded(stream, rows * cols).view(rows, cols), bits)
