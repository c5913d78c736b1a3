"""Memory that is freed stays with the process: for long work on a CPU that frees and takes the same
sizes again, step after step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to hand nothing back to the system; False where there is another malloc.

    It maps every allocation of 32 MiB and more anew and unmaps it when it is freed, and the system
    fills each with zeros, page by page. A training step of whisper-base (batch 2, float32, two
    cores; docs/results.md) takes 3.10 s with that and 2.54 s without, the float step 3.00 and 2.40.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
