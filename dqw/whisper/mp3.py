"""An mp3 as libsndfile reads it to its end.

libsndfile decodes as many frames as the Xing or Info header in front states, and without one as
many as it guesses from the first frames' bit rate. So it stops early in mp3s that were joined
(podcasts with advertisements put in, speech synthesized in chunks) and in those of a variable bit
rate without a header. Here the frames are counted, and every part gets a header that is true.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

_KBPS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1, layer III
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
)
_HERTZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_FRAME_OR_TAG = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]|ID3")
_HEADERS = (b"Xing", b"Info")
# Headers are off by a frame or two, as their writers count the header's own frame or not.
_SLACK = 2


@dataclass
class Part:
    """Frames of one sampling rate and channel count that one encoder wrote, and no tags.

    `stated`: the frames that their Xing or Info header claims, 0 where it leaves that open; None
    where there is none. `frames`: those that are there, without the one that holds the header.
    """

    first: bytes  # the header of the first frame, 4 bytes
    stated: int | None
    pieces: list[bytes] = field(default_factory=list)
    frames: int = 0

    @property
    def is_cut(self) -> bool:
        return (self.stated or 0) > self.frames + _SLACK

    def encoded(self) -> bytes:
        """An mp3 of this part alone; its header states at least the frames that are there."""
        data = b"".join(self.pieces)
        if self.stated is None:
            return _counting_frame(self.first, self.frames) + data
        if self.stated + _SLACK < self.frames:  # a header that no longer leads is silence
            return _counting_frame(self.first, self.frames + 1) + data
        return data


def parts(data: bytes) -> list[Part]:
    """The parts of an mp3, in order; none where it holds no frames of layer III."""
    found: list[Part] = []
    at = _next_frame(data, 0)
    while at >= 0:
        first, stated = data[at : at + 4], _stated(data, at)
        kind = _kind(first)
        if not found or stated is not None or kind != _kind(found[-1].first):
            found.append(Part(first, stated))
        part = found[-1]
        part.frames -= stated is not None
        start, sizes, place = at, _sizes(first[1]), _header_place(first)
        while True:
            at += sizes[data[at + 2]]
            part.frames += 1
            if not _follows(data[at : at + 4], first):
                break
            if data[at + place : at + place + 4] in _HEADERS:
                break
        part.pieces.append(data[start:at])
        at = _next_frame(data, at)
    return [part for part in found if part.frames > 0]


def _kind(head: bytes) -> tuple[int, int, bool]:
    """What does not change within a part: version and layer, sampling rate, whether mono."""
    return head[1] | 1, head[2] & 0x0C, head[3] >= 0xC0


@cache
def _sizes(second: int) -> Sequence[int]:
    """Bytes of a frame for each value of its third byte, 0 where no frame has that value.

    `second`: the second byte of a layer III frame.
    """
    version = second >> 3 & 3
    sizes = [0] * 256
    eighth = 144 if version == 3 else 72  # of a frame's samples
    for third in range(16, 240):  # bit rates 1 to 14
        rate = third >> 2 & 3
        if rate < 3:
            bits = _KBPS[version != 3][third >> 4] * 1000
            sizes[third] = eighth * bits // _HERTZ[version][rate] + (third >> 1 & 1)
    return sizes


def _next_frame(data: bytes, at: int) -> int:
    """Where, from `at` on, a frame begins that another one of its kind or the end of the data
    follows; -1: nowhere. What lies in a tag is no frame."""
    while (found := _FRAME_OR_TAG.search(data, at)) and found.end() + 7 <= len(data):
        at = found.start()
        if found[0] == b"ID3":
            a, b, c, d = data[at + 6 : at + 10]
            at += 10 + (a << 21 | b << 14 | c << 7 | d) if max(a, b, c, d) < 128 else 3
            continue
        sizes = _sizes(data[at + 1])
        size = sizes[data[at + 2]]
        after = data[at + size : at + size + 4]
        if size and (at + size == len(data) or _follows(after, data[at : at + 4])):
            return at
        at += 1
    return -1


def _follows(head: bytes, before: bytes) -> bool:
    """Whether `head` begins a frame of the kind of `before`."""
    whole = len(head) == 4 and head[0] == 255
    return whole and _kind(head) == _kind(before) and _sizes(head[1])[head[2]] > 0


def _header_place(head: bytes) -> int:
    """Where in a frame its Xing or Info header begins: behind the side information."""
    mono = head[3] >= 0xC0
    if head[1] >> 3 & 3 == 3:
        return 4 + (17 if mono else 32)
    return 4 + (9 if mono else 17)


def _stated(data: bytes, at: int) -> int | None:
    """The frames that the Xing or Info header of the frame states; None: it has no such header."""
    at += _header_place(data[at : at + 4])
    if data[at : at + 4] not in _HEADERS or at + 12 > len(data):
        return None
    flags, frames = struct.unpack(">II", data[at + 4 : at + 12])
    return frames if flags & 1 else 0


def _counting_frame(first: bytes, frames: int) -> bytes:
    """A frame of the kind of `first` that holds no sound, but a Xing header with this count."""
    head = bytearray(first)
    head[1] |= 1  # no checksum
    head[2] = head[2] & 0x0C | 0x90  # a bit rate with room for the header, no padding
    size = _sizes(head[1])[head[2]]
    frame = bytes(head).ljust(_header_place(bytes(head)), b"\0")
    return (frame + b"Xing" + struct.pack(">II", 1, frames)).ljust(size, b"\0")
