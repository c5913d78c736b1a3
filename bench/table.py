"""What a person reads: the machine's header and one table for every operator, 100 columns wide."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import ceilings, cuda
from bench.options import Options
from bench.rows import Row

PACKAGES = (
    "torchao",
    "onnxruntime",
    "openvino",
    "openvino-genai",
    "faster-whisper",
    "pywhispercpp",
    "transformers",
    "triton",
    "bitsandbytes",
    "gemlite",
)
WIDTH = 100


def machine(o: Options, ceilings_too: bool = True) -> dict[str, str | int | float | dict]:
    """Where these numbers come from, and what the machine can do at most."""
    import dqw
    from dqw import ops

    sets = "none: the library is not loaded"
    if hasattr(torch.ops.dqw_cpu, "instruction_sets"):
        sets = torch.ops.dqw_cpu.instruction_sets()
    device = torch.cuda.get_device_name() if o.device == "cuda" else processor()
    found = {
        "processor": device,
        "cores": os.cpu_count() or 1,
        "threads": o.threads,
        "instruction_sets": sets,
        "kernels": ops.backend_info()["quant_linear"][o.device],
        "dqw": dqw.__version__,
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
    }
    if o.device == "cuda":
        found |= cuda.facts()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found |= {
        "load": f"{os.getloadavg()[0]:.1f} before the start",
        "date": time.strftime("%Y-%m-%d"),
    }
    return found | ({"ceilings": ceilings.measured(o.threads, o.device)} if ceilings_too else {})


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_header(console: Console, facts: dict) -> None:
    for name, value in facts.items():
        if name == "ceilings":
            value = ", ".join(f"{key.replace('_', ' ')} {rate:,.0f}" for key, rate in value.items())
        line = Text(f"{name.replace('_', ' '):>16}  ", "bold")
        console.print(line.append(str(value), "default not bold"))


def print_skipped(console: Console, skipped: dict[str, str]) -> None:
    for name, why in cuda.not_graphed.items():
        console.print(Text(f"timed without a CUDA graph: {name}, {why}", "yellow"))
    for name, why in skipped.items():
        console.print(Text(f"skipped {name}: {why}", "yellow"))


def print_rows(console: Console, op: str, rows: list[Row]) -> None:
    """A line a candidate. Ratios: how many times faster dqw is; below 1 it loses, in red.

    PyTorch's own operators are named without their "torch-".
    """
    table = Table(title=title(op, rows), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("M × K → N", justify="right", no_wrap=True)
    table.add_column("dqw", no_wrap=True)
    table.add_column("µs\np20–p80", justify="right", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("of\nroof", justify="right", no_wrap=True)
    table.add_column("extra\nMiB", justify="right", no_wrap=True)
    table.add_column("times as fast as …")
    before = None
    for row in rows:
        p, t = row.problem, row.timing
        problem = f"{p.M} × {p.K} → {p.N}"
        if problem != before and before:
            table.add_section()
        times = f"{micro(t.p50)}\n{micro(t.p20)}–{micro(t.p80)}"
        share = f"{100 * row.share:.0f} %" if row.ceiling else "-"
        label = p.label + (f" {p.bits} bits" if many_bits(rows) else "")
        table.add_row(
            "" if problem == before else problem,
            label,
            times,
            rate(row),
            share,
            f"{row.extra_bytes / 2**20:.2f}",
            against(row),
        )
        before = problem
    console.print(table)
    losing = sum(row.loses for row in rows)
    compared = sum(bool(row.peers) for row in rows)
    console.print(f"{losing} of {compared} compared rows lose to a peer.\n")


def title(op: str, rows: list[Row]) -> str:
    first = rows[0]
    bits = ", ".join(str(b) for b in dict.fromkeys(row.problem.bits for row in rows))
    caches = "weights from memory" if first.cold else "warm caches"
    if first.problem.device == "cuda":
        caches = "CUDA graphs, " + ("cold L2" if first.cold else "weights in L2 if they fit")
    return (
        f"{op}, {first.problem.grid}, {bits} bits, {first.problem.dtype}, "
        f"{first.threads} threads, {caches}"
    )


def many_bits(rows: list[Row]) -> bool:
    return len({row.problem.bits for row in rows}) > 1


def micro(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def rate(row: Row) -> str:
    if not row.ceiling:
        return "-"
    if row.bound == "memory":
        return f"{row.gbps:,.1f} GB/s"
    return f"{row.gops:,.0f} GOP/s"


def against(row: Row) -> Text:
    """Every peer, the hardest first."""
    text = Text()
    for name in sorted(row.peers, key=row.ratio):
        ratio = row.ratio(name)
        if text:
            text.append(" ")
        short = name.removeprefix("torch-")
        text.append(f"{ratio:.2f}×{short}", "bold red" if ratio < 1 else "green")
    return text or Text("-")
