"""JSON Lines that grow while a run works: one object a line, on the disk before the next begins.

A line cut off by a kill is dropped when the file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dqw.errors import UserError


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one line each, all or none. Ids are file names, which need not be UTF-8: such bytes
    are written as JSON reads them back."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    with open(path, "ab", buffering=0) as file:  # a buffer would try once more as it is closed
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:  # a full disk: half a line would spoil the next
            os.truncate(path, before)
            raise


def cuts_beside(labels: Path) -> Path:
    """Where the cuts of recordings are whose texts are in ``labels``."""
    return labels.with_name("cuts.jsonl")


def read_rows(path: Path, keys: Iterable[str], what: str = "") -> Iterator[dict[str, Any]]:
    """The rows of ``path``, none where it is not there; a torn last line is cut off the file.
    Raises UserError for a row without ``keys``; ``what``: a row that it is not, and the cure. "":
    such rows are passed over."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    # Not splitlines(): a text may hold a line separator of Unicode's.
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            for key in keys:
                row[key]
        except (ValueError, KeyError, TypeError):  # the first: no JSON, or no UTF-8
            if what:
                raise UserError(f"{path} row {number} is not {what}") from None
            continue
        yield row
