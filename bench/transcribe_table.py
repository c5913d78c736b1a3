"""What ``--op transcribe`` prints and writes: tables, rows for JSON and CSV.

A row is an engine on a clip (measure "clip"), or on all files (measure "files"). ``ratio``: its
seconds over those of dqw's best, so that above 1 dqw is faster.
"""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.processes import Engine
from bench.rows import write, write_cells
from bench.table import print_skipped
from bench.timing import summary
from bench.transcribe import TURN

GROWN = 1.02  # a peak this many times the one of the first turn has grown


def lengths(engines: list[Engine]) -> list[int]:
    return sorted({length for engine in engines for length in engine.seconds})


def best_clip(engines: list[Engine], length: int) -> float:
    return min(e.clip(length) for e in engines if e.name == "dqw")


def best_files(engines: list[Engine]) -> float:
    return min(e.files.seconds for e in engines if e.name == "dqw" and e.files)


def print_tables(console: Console, engines: list[Engine], skipped: dict[str, str]) -> None:
    if any(engine.seconds for engine in engines):
        console.print(clips_table(engines))
    if any(engine.files for engine in engines):
        console.print(files_table(engines))
    print_skipped(console, skipped)


def clips_table(engines: list[Engine]) -> Table:
    """A line an engine; the ratio is its time on the longest clip over dqw's best."""
    found = lengths(engines)
    longest = found[-1]
    best = best_clip(engines, longest)
    table = Table(title="transcribe, greedy, no timestamps: seconds by length of the clip",
                  title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("engine", no_wrap=True)
    for name in (*(f"{length} s" for length in found), f"{longest} s,\ntokens", "once,\nms",
                 "token,\nms", "peak\nMB", "first\ntext, s", f"{longest} s,\n× dqw"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for e in engines:
        once = "-" if e.once is None else f"{e.once * 1e3:.0f}"
        token = "-" if e.per_token is None else f"{e.per_token * 1e3:.2f}"
        first = "-" if e.first_text is None else f"{e.first_text:.1f}"
        times = [f"{e.clip(length):.3f}" for length in found]
        table.add_row(e.label, *times, str(e.tokens[longest]), once, token, f"{e.megabytes:.0f}",
                      first, f"{e.clip(longest) / best:.2f}")  # fmt: skip
    return table


def files_table(engines: list[Engine]) -> Table:
    timed = [engine for engine in engines if engine.files]
    best = best_files(engines)
    first = timed[0].files
    assert first
    title = f"{first.count} files, {first.audio_seconds:.0f} s, up to {first.batch_size} at once"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("engine", no_wrap=True)
    for name in ("seconds", "× real time", "× dqw", f"peak MB after\n{TURN} files", "after all",
                 "grows"):  # fmt: skip
        table.add_column(name, justify="right")
    for e in timed:
        f = e.files
        assert f
        table.add_row(e.label, f"{f.seconds:.1f}", f"{f.speed:.1f}", f"{f.seconds / best:.2f}",
                      f"{f.megabytes_first:.0f}", f"{f.megabytes:.0f}", grows(e))  # fmt: skip
    return table


def grows(engine: Engine) -> str:
    """Whether more files took more memory; "-" where there was but one turn."""
    f = engine.files
    if f is None or f.count <= TURN:
        return "-"
    return "YES" if f.megabytes > GROWN * f.megabytes_first else "no"


def rows(engines: list[Engine], threads: int) -> list[dict[str, Any]]:
    found = []
    for e in engines:
        own = {"op": "transcribe", "engine": e.name, "kind": e.kind, "model": e.model}
        own["threads"] = threads
        of_engine = {
            "load_seconds": min(e.load, default=None),
            "first_text_seconds": e.first_text,
            "once_seconds": e.once,
            "token_seconds": e.per_token,
            "peak_megabytes": e.megabytes or None,
        }
        for length in sorted(e.seconds):
            timing = summary(e.seconds[length])
            found.append(own | {
                "measure": "clip", "audio_seconds": length, "files": 1, "batch_size": 1,
                "seconds": timing.p50, "seconds_p20": timing.p20, "seconds_p80": timing.p80,
                "ratio": timing.p50 / best_clip(engines, length), "tokens": e.tokens[length],
                **of_engine,
            })  # fmt: skip
        if e.files:
            found.append(own | {
                "measure": "files", "audio_seconds": e.files.audio_seconds,
                "files": e.files.count, "batch_size": e.files.batch_size,
                "seconds": e.files.seconds, "ratio": e.files.seconds / best_files(engines),
                "peak_megabytes_first": e.files.megabytes_first,
                "peak_megabytes": e.files.megabytes,
            })  # fmt: skip
    return found


def write_json(
    file: Path, facts: dict, engines: list[Engine], threads: int, skipped: dict[str, str]
) -> None:
    texts = {e.label: {str(k): text for k, text in e.text.items()} for e in engines}
    report = {"machine": facts, "skipped": skipped, "rows": rows(engines, threads), "texts": texts}
    write(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def write_csv(file: Path, engines: list[Engine], threads: int) -> None:
    write_cells(file, rows(engines, threads))
