"""Timing, the machine's header, and one printer for every table of ``python -m bench``."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and the 20th and 80th percentile of the rounds."""

    p50: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Row:
    """One problem and what each candidate took; ``work`` is operations or bytes a call."""

    problem: str
    work: float
    timings: dict[str, Timing]


def time_interleaved(candidates: Candidates, quick: bool) -> dict[str, Timing]:
    """Time candidates in turns, so that a slow moment of the machine hits all of them.

    A turn repeats its candidate for about 2 ms (quick: 0.5 ms), so that the clock's own cost
    vanishes, after one call that is not counted and brings back what the others threw out of the
    caches: numbers are for warm caches as far as the data fit.
    """
    rounds, span = (5, 0.5e-3) if quick else (21, 2e-3)
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(span / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            if repeats[name] > 1:
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    timings = {}
    for name, values in samples.items():
        fifths = statistics.quantiles(values, n=5)
        timings[name] = Timing(statistics.median(values), fifths[0], fifths[3])
    return timings


def machine() -> dict[str, str]:
    """Where these numbers come from."""
    import dqw
    from dqw import ops

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "dqw": f"{dqw.__version__}, CPU kernels: {ops.backend_info()['quant_linear']['cpu']}",
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before the start",
        "date": time.strftime("%Y-%m-%d"),
    }


def print_header(console: Console) -> None:
    for name, value in machine().items():
        console.print(f"[bold]{name:>10}[/bold]  {value}", highlight=False)


def print_table(console: Console, title: str, rows: list[Row], baseline: str, unit: str) -> None:
    """A line a problem: time of each candidate and how many times faster than ``baseline``.

    ``unit`` names what ``work`` counts, in billions a second of the fastest dqw candidate. The
    last column compares that candidate with the fastest of the others; below 1.00 dqw loses.
    """
    names = list(rows[0].timings)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("problem", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column(f"dqw {unit}", justify="right")
    table.add_column("dqw against best", justify="right")
    for row in rows:
        base = row.timings[baseline].p50
        cells = [
            f"{row.timings[name].p50 * 1e6:,.0f} µs\n×{base / row.timings[name].p50:.2f}"
            for name in names
        ]
        ours = min(t.p50 for name, t in row.timings.items() if name.startswith("dqw"))
        rivals = [t.p50 for name, t in row.timings.items() if is_rival(name)]
        against = f"×{min(rivals) / ours:.2f}" if rivals else "-"
        table.add_row(row.problem, *cells, f"{row.work / ours / 1e9:,.0f}", against)
    console.print(table)


def is_rival(name: str) -> bool:
    """A copy is the machine's limit, not a rival."""
    return not name.startswith("dqw") and name != "copy"


def as_json(rows: list[Row]) -> list[dict]:
    return [asdict(row) for row in rows]
