"""Ogg files by their pages: whether the last one is there, and the recordings in a chain.

libsndfile reads the first recording alone where several stand one after another (Icecast writes
such files, and so does joining them), and takes an end that was cut off at a page for the end.
"""

from __future__ import annotations

import re

_PAGE = re.compile(rb"OggS\0[\0-\7]")  # version 0, flags
_BEGINS, _ENDS = 2, 4


def links(data: bytes) -> list[bytes]:
    """The recordings of a file, each an Ogg file; `data` itself where it is one alone."""
    starts: list[int] = []
    begun = False
    for page in _PAGE.finditer(data):
        begins = bool(page[0][5] & _BEGINS)  # several at once where streams run side by side
        if begins and not begun:
            starts.append(page.start())
        begun = begins
    if len(starts) < 2:
        return [data]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def missing(data: bytes) -> str:
    """What a file lacks at its end, in words, or ""."""
    pages = list(_PAGE.finditer(data))
    if not pages or not pages[-1][0][5] & _ENDS:
        return "its last page is missing"
    page = data[pages[-1].start() :]
    count = page[26] if len(page) > 26 else 0  # of the page's pieces; their lengths follow
    if len(page) < 27 + count + sum(page[27 : 27 + count]):
        return "its last page is not whole"
    return ""
