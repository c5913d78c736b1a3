"""What libsndfile does not read of flacs.

One that states no length, as it was written to a pipe, is legal, but libsndfile cannot read it: its
length stands in the last frame, and goes into a copy's header. Of several in one file, as ``cat``
makes it, libsndfile reads the first.
"""

from __future__ import annotations

import io
import re
from functools import cache
from typing import BinaryIO

_BEGIN = b"fLaC"
_BLOCK = b"\x00\x00\x22"  # the size of STREAMINFO, which comes first; before it 0, or 128
_STEP = 1 << 24
_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_STATED = slice(18, 26)  # of the file; its low 36 bits are the samples
_SAMPLES = (1 << 36) - 1


def begins(file: BinaryIO) -> list[int]:
    """Where the flacs of a file begin; nearly always 0 alone."""
    found, at = list[int](), 0
    file.seek(0)
    kept = b""  # the end of what was read: a beginning may lie across
    while data := file.read(_STEP):
        block = kept + data
        place = block.find(_BEGIN)
        while place >= 0:
            head = block[place : place + 8]
            if len(head) == 8 and head[4] in (0, 128) and head[5:] == _BLOCK:
                found.append(at - len(kept) + place)
            place = block.find(_BEGIN, place + 4)
        at += len(data)
        kept = block[-7:]
    return found


def parts(file: BinaryIO) -> list[BinaryIO]:
    """The flacs of a file, one after another."""
    starts = begins(file)
    file.seek(0)
    if len(starts) < 2:
        return [file]
    data = file.read()
    return [io.BytesIO(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def states_length(head: bytes) -> bool:
    """Whether the header, the first 26 bytes of a flac, says how many samples follow; what has
    fewer is not ours to judge."""
    return len(head) < 26 or bool(int.from_bytes(head[_STATED], "big") & _SAMPLES)


def with_length(data: bytes) -> bytes | None:
    """``data`` with its number of samples in the header; None where no frame ends with it, so that
    it is cut off."""
    fixed = int.from_bytes(data[8:10], "big")  # samples of every block but the last
    last = max(len(data) - (1 << 20), 42)  # no frame has more bytes
    for sync in reversed(list(_SYNC.finditer(data, last))):
        end = _end(data[sync.start() : sync.start() + 16])
        if end is None:
            continue
        number, block = end
        if _crc(data[sync.start() :], 16, 0x8005):  # of a whole frame and its sum: 0
            continue
        samples = (number if sync[0][1] & 1 else number * fixed) + block
        stated = int.from_bytes(data[_STATED], "big") & ~_SAMPLES | samples
        return data[:18] + stated.to_bytes(8, "big") + data[26:]
    return None


def _end(head: bytes) -> tuple[int, int] | None:
    """The number of a frame, or of its first sample, and its samples; None: no frame begins so."""
    if len(head) < 6:
        return None
    size, rate = head[2] >> 4, head[2] & 15
    if not size or rate == 15 or head[3] & 1:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # in front, as in UTF-8: how many bytes the number has
    length = max(ones, 1)
    if ones in (1, 8) or any(byte >> 6 != 2 for byte in head[5 : 4 + length]):
        return None
    number = head[4] & 0xFF >> ones + 1
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 63
    at = 4 + length
    if size in (6, 7):
        block = int.from_bytes(head[at : at + size - 5], "big") + 1
        at += size - 5
    else:
        block = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    return None if _crc(head[: at + 1], 8, 0x07) else (number, block)


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    table, mask, value = _table(bits, polynomial), (1 << bits) - 1, 0
    for byte in data:
        value = value << 8 & mask ^ table[value >> bits - 8 ^ byte]
    return value


@cache
def _table(bits: int, polynomial: int) -> tuple[int, ...]:
    def of(byte: int) -> int:
        value = byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
        return value

    return tuple(map(of, range(256)))
