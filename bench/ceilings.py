"""What this machine can do at most, measured here and now: the roof over every row.

Reading depends on where the data lie, so it is measured for a working set of the size asked for;
``COLD`` is far beyond the last level cache. Arithmetic peaks are loops over registers
(csrc/cpu/ceilings*.cpp); without the compiled library PyTorch's own sum and
matmul stand in for them. On a GPU: a copy, read and written, and cuBLAS (bench/cuda.py).
"""

import math
import time
from collections.abc import Callable
from functools import cache

import torch

from bench import cuda
from bench.timing import last_level_cache, local

KINDS = ("float32", "float16", "bfloat16", "int8")
COLD = 0  # a working set that no cache holds


def compiled() -> bool:
    from dqw import ops  # noqa: F401  loads the library

    return hasattr(torch.ops.dqw_cpu, "ceiling_read")


def best_rate(work: Callable[[], float], seconds: float = 0.03) -> float:
    """The highest of the rates of repeated ``work()``, which returns how much it did."""
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        done = work()
        now = time.perf_counter()
        best = max(best, done / (now - start))
        if now > end:
            return best


@cache
def peak_gops(kind: str, threads: int, device: str = "cpu") -> float:
    """Billions of operations a second for factors of ``kind``; a product and a sum are two.

    0.0 if the instruction set in use has no such instruction.
    """
    if device == "cpu" and kind == "float16":
        return 0.0
    if device == "cpu" and compiled():
        multiply = torch.ops.dqw_cpu.ceiling_multiply
        return best_rate(lambda: multiply(kind, threads, 100_000)) / 1e9
    if device == "cuda":
        return cuda.matmul_gops(kind)
    if kind == "int8":
        return 0.0
    size = 1024
    a = torch.randn(size, size, dtype=getattr(torch, kind))
    run = local(lambda: a @ a)
    return best_rate(lambda: 0 * run(1) + 2.0 * size**3) / 1e9


def read_gbps(size: int, threads: int, device: str = "cpu") -> float:
    """GB/s of reading a working set of ``size`` bytes again and again (``COLD``: from memory)."""
    if size == COLD:  # an H100 copies 200 MB at 3.0 TB/s, for its L2 has a quarter, and 1 GB at 2.4
        far = 20 * last_level_cache() if device == "cuda" else max(4 * last_level_cache(), 2**27)
        return _read_gbps(far, threads, device)
    # An eighth of an octave more at most: near the end of a cache, twice as much is in another.
    eighths = math.ceil(8 * math.log2(max(size, 2**14)))
    return _read_gbps(round(2 ** (eighths / 8)) // 64 * 64, threads, device)


@cache
def _read_gbps(size: int, threads: int, device: str) -> float:
    if device == "cuda":
        return cuda.copy_gbps(size)
    data = torch.zeros(size // 4)
    if device == "cpu" and compiled():
        rounds = max(1, 2**25 // size)
        read = torch.ops.dqw_cpu.ceiling_read
        return best_rate(lambda: read(data, threads, rounds)) / 1e9
    run = local(data.sum)
    return best_rate(lambda: 0 * run(1) + size) / 1e9


def measured(threads: int, device: str = "cpu") -> dict[str, float]:
    """The ceilings of the header: memory by thread count, and each peak that exists."""
    counts = (1, threads) if threads > 1 and device == "cpu" else (threads,)
    found = {f"memory_read_gbps_{n}_threads": read_gbps(COLD, n, device) for n in counts}
    peaks = {f"{kind}_gops": peak_gops(kind, threads, device) for kind in KINDS}
    return found | {name: peak for name, peak in peaks.items() if peak}
