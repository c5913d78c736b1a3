"""The tables that `dqw eval` and `dqw info` print."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dqw.whisper.evaluate import Evaluation
from dqw.whisper.report import Report, architecture
from dqw.whisper.scoring import Rate


def print_scores(result: Evaluation, spelling: bool, size: int | None = None) -> None:
    """Rates with counts and intervals, by language and over all.

    `spelling`: whether British spellings were mapped to American ones before English was scored.
    `size`: bytes of the model without its tokenizer.
    """
    scores = result.scores
    table = _table("Error rates (S substitutions, D deletions, I insertions)")
    table.add_column("language")
    columns = ("clips", "metric", "%", "95 % interval", "errors", "of", "S", "D", "I")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, rate: Rate) -> None:
        figures = ("-", "-")
        if rate.units:
            between = f"{100 * rate.low:.2f} to {100 * rate.high:.2f}"
            figures = f"{100 * rate.rate:.2f}", between if rate.clips > 1 else "-"
        counts = (rate.errors, rate.units, rate.substitutions, rate.deletions, rate.insertions)
        table.add_row(name, str(rate.clips), rate.metric, *figures, *map(str, counts))

    for code, rate in scores.languages.items():
        row(code, rate)
    table.add_section()
    if scores.wer:
        row("all words", scores.wer)
    if scores.cer:
        row("all characters", scores.cer)
    console = _console()
    console.print(table)
    speed = result.audio_seconds / max(result.wall_seconds, 1e-9)
    console.print(
        f"{result.audio_seconds:.1f} s of audio in {result.wall_seconds:.1f} s "
        f"({speed:.1f} × real time)"
    )
    if result.divergence is not None:
        far = result.divergence
        between = f"{far.low:.5f} to {far.high:.5f}" if far.clips > 1 else "one clip: no interval"
        console.print(
            f"KL from the teacher: {far.kl:.5f} nats a token ({between}; "
            f"{far.tokens} tokens of {far.clips} clips)",
            soft_wrap=True,
        )
    if size is not None:
        console.print(f"The model takes {size / 2**20:.2f} MiB without its tokenizer.")
    empty = sum(rate.empty for rate in scores.languages.values())
    if empty:
        console.print(f"{empty} clips dropped: nothing is left of their reference text")
    if not spelling and "en" in scores.languages:
        console.print(
            "There is no normalizer.json beside the model: British spellings count as errors. "
            "--normalizer names one.",
            soft_wrap=True,
        )


def print_sizes(report: Report, folder: Path) -> None:
    """Bytes by kind of layer."""
    mib = 2**20
    console = _console()
    name = escape(str(folder))
    console.print(f"[bold]{name}[/]: {report.format}{architecture(report)}", soft_wrap=True)
    table = _table("Sizes in MiB, M million parameters")
    table.add_column("weights", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    for column in ("M", "codes", "scales", "float", "total", "bits"):
        table.add_column(column, justify="right")
    total = report.total
    for part in [*report.parts, total]:
        if part is total:
            table.add_section()
        stored = "\n".join(name for name, _ in part.formats.most_common())
        sizes = (part.codes, part.scales, part.floats, part.bytes)
        figures = (f"{part.parameters / 1e6:.2f}", *(f"{size / mib:.2f}" for size in sizes))
        table.add_row(part.kind, stored, *figures, f"{part.bits:.2f}")
    console.print(table)
    console.print(
        f"{2 * total.parameters / max(total.bytes, 1):.2f} × smaller than float16. On disk "
        f"{report.model_bytes / mib:.2f} MiB of weights and config, "
        f"{report.all_bytes / mib:.2f} MiB with the tokenizer.",
        soft_wrap=True,
    )


def print_layers(report: Report) -> None:
    """Every packed layer with its grid, bits and what shares a scale."""
    table = _table("Layers")
    table.add_column("layer", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    for name, words in report.layers.items():
        table.add_row(name, words)
    _console().print(table)


def print_kernels(kernels: dict[str, dict[str, str]]) -> None:
    """Which kernel serves each operator, from `dqw.backend_info()`."""
    import torch

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    operators: dict[tuple[str, ...], list[str]] = {}  # those served alike share a row
    for name, served in kernels.items():
        operators.setdefault(tuple(served[device] for device in devices), []).append(name)
    table = _table("Kernels")
    for column in ("operators", *devices):
        table.add_column(column)
    for reasons, names in operators.items():
        table.add_row("\n".join(names), *reasons)
    _console().print(table)


def _console() -> Console:
    """On stdout; where that is no terminal rich's 80 columns are too few for counts of 5 digits."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
