"""Whether the samples that the header of a wav, AIFF or AU file promises are there.

libsndfile adjusts the header's number to what it finds, and says nothing.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

# Sizes that writers to a pipe state, who can't know: all ones, or a little below 2 GiB (SoX,
# arecord, espeak).
_UNKNOWN = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
_NEARLY_2_GIB = range(0x7EFFF000, 0x80001000)
_LITTLE = 1 << 16  # bytes behind the samples that are none: a tag, or padding to a sector


def missing(file: BinaryIO) -> str:
    """What a wav (RIFF, RIFX, RF64), AIFF or AU file lacks, in words; "" for others as well."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b".snd":
        offset, length = struct.unpack(">II", head[4:].ljust(8, b"\0"))
        return _lacks(length, size - offset, False)
    wav = head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE"
    if not wav and not (head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC")):
        return ""
    order = "<" if head[:4] in (b"RIFF", b"RF64") else ">"
    long = None  # the number of bytes that 32 bits don't hold
    at = 12
    while at + 8 <= size:
        file.seek(at)
        name, length = struct.unpack(order + "4sI", file.read(8))
        if name == b"ds64":
            long = struct.unpack(order + "Q", file.read(16)[8:].ljust(8, b"\0"))[0]
        if name in (b"data", b"SSND"):
            if length == 0xFFFFFFFF and long is not None:
                length = long
            file.seek(at + 8 + length + length % 2)
            return _lacks(length, size - at - 8, _is_chunk(file.read(8), order, size - file.tell()))
        at += 8 + length + length % 2
    return "it has no samples after its header"


def _is_chunk(head: bytes, order: str, left: int) -> bool:
    if len(head) < 8:
        return False
    name, length = struct.unpack(order + "4sI", head)
    return all(32 <= byte < 127 for byte in name) and length <= left


def _lacks(length: int, there: int, chunk: bool) -> str:
    """chunk: whether one follows the samples. Where none does, the header was not written to the
    end, or counts no further than 4 GiB, and libsndfile would read as far as it says."""
    unknown = length in _UNKNOWN or length in _NEARLY_2_GIB
    if unknown and there <= length:
        return ""
    if there == length or (0 < length < there and (chunk or there - length < _LITTLE)):
        return ""
    return f"its header says {length} bytes of samples, but {there} are there"
