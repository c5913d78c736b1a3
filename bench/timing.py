"""Clock, memory and caches: how a call is timed and what else it costs.

A ``Call`` runs an operator once. A ``Candidate`` runs it some times over and says how long that
took, so that a call in another process (bench/base.py) takes its turn like the others.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Candidate = Callable[[int], float]  # repeats → seconds of all of them
# OpenVINO's and libgomp's threads spin for some milliseconds after their last call; a call whose
# package does so for longer has a ``rest`` of its own.
REST = 5e-3  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and the 20th and 80th percentile of the rounds."""

    p50: float
    p20: float
    p80: float


def local(call: Call, device: str = "cpu", name: str = "a call", graphed: bool = True) -> Candidate:
    """``graphed``: on a GPU, whether a CUDA graph can hold the call."""
    if device == "cuda":
        from bench.cuda import candidate

        return candidate(call, name, graphed)

    def run(repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return time.perf_counter() - start

    run.rest = getattr(call, "rest", REST)  # type: ignore[attr-defined]
    return run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_interleaved(
    candidates: dict[str, Candidate], quick: bool, rounds: int | None = None
) -> dict[str, Timing]:
    """Time candidates in turns, so that a slow moment of the machine hits all of them.

    A turn repeats its candidate for about 2 ms (quick: 0.5 ms), so that the clock's own cost
    vanishes, after one call that is not counted and brings back what the others threw out of the
    caches, and the threads that they put to sleep. Before it the machine rests: threads of another
    package that still spin would take the cores of the next in turn.
    """
    rounds = rounds or (7 if quick else 21)
    span = 0.5e-3 if quick else 2e-3
    repeats, slow = {}, {}
    for name, run in candidates.items():
        run(1)
        seconds = run(1)
        repeats[name] = max(1, int(span / max(seconds, 1e-7)))
        slow[name] = seconds > 0.2  # what was thrown out of the caches is no part of such a call
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    rest = max((getattr(run, "rest", REST) for run in candidates.values()), default=REST)
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(rest)
            if not slow[name]:
                run(1)
            samples[name].append(run(repeats[name]) / repeats[name])
            rest = getattr(run, "rest", REST)
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: list[float]) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3])


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 32 MiB where the system does not say."""
    sizes = [32 * 2**20]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    if torch.cuda.is_initialized():
        sizes.append(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(sizes)


def rotated(build: Callable[[], Call], weight_bytes: int, cold: bool) -> Call:
    """One call; if ``cold`` as many with weights of their own as exceed the caches, in turns."""
    if not cold:
        return build()
    build = getattr(build, "cold", build)
    copies = max(2, -(-3 * last_level_cache() // (2 * max(weight_bytes, 1))))
    made = [build() for _ in range(copies)]
    calls = itertools.cycle(made)

    def turn() -> object:
        return next(calls)()

    turn.copies = max(copies, getattr(made[0], "turns", 1))  # type: ignore[attr-defined]
    turn.rest = getattr(made[0], "rest", REST)  # type: ignore[attr-defined]
    return turn


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr, from C++ either: profiler and packages talk about themselves there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def extra_bytes(call: Call, device: str = "cpu") -> int:
    """The most memory a call holds beyond what was held before it, its result included.

    On the CPU from the profiler's record of torch's allocator; memory that a kernel keeps for
    itself between calls is not in it.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
        del result
    events = record.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = itertools.accumulate((size for _, size in sizes), initial=0)
    return max(held)
