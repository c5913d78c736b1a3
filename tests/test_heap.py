"""Memory that is freed is taken again without the system filling it anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dqw.heap import keep_freed_memory

LOOP = """
import ctypes, resource
from dqw.heap import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        start = libc.malloc(64 << 20)
        ctypes.memset(start, 1, 64 << 20)
        libc.free(start)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, kept = faults(), keep_freed_memory()
faults()
print(first, int(kept), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_not_handed_back() -> None:
    found = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    first, kept, after = map(int, found.stdout.split())
    if not kept:
        pytest.skip("this malloc has no mallopt")
    assert first > 4 * 16 and after <= first // 16


def test_another_system_has_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
