"""Files as locks between processes, on one machine or on a file system that several share.

A lock ends with its process, however that ends, and those that it started and left behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: float) -> Iterator[bool]:
    """Whether ``path`` could be had within ``wait`` seconds; it is this process's alone until the
    block ends, and is deleted then. Its folder is made, and may be deleted meanwhile. On a file
    system without locks everyone has it."""
    until = time.monotonic() + wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file, for writing: between machines NFS has no locks on folders.
        with open(path, "w") as file:
            ours = _taken(file.fileno(), until)
            if ours and not _is_at(file.fileno(), path):
                continue  # deleted by the one that had it
            try:
                yield ours
            finally:
                if ours:
                    path.unlink(missing_ok=True)
            return


def is_locked(path: Path) -> bool:
    """Whether another process has it now."""
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # gone meanwhile, or a file system without locks
    return False


def _taken(file: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        except OSError:
            return True  # a file system without locks
        else:
            return True


def _is_at(file: int, path: Path) -> bool:
    """Whether ``path`` is still what was opened."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
