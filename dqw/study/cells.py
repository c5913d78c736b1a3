"""The cells of a study on disk: measured once, by one process each, and read for the page."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dqw.bars import Bar, progress_bar
from dqw.errors import UserError
from dqw.locks import is_locked, locked
from dqw.probe import Changed, first_changed
from dqw.study.lab import Lab, Say, cell_name, forget_checkpoints
from dqw.study.table import Setting
from dqw.whisper.files import write_atomic

LOOK_SECONDS = 0.2  # another may only have looked whether a cell is held


def cells_of(settings: list[Setting], seeds: int) -> list[tuple[Setting, int]]:
    """Each setting that trains with every seed, the others with one."""
    return [(s, seed) for s in settings for seed in range(seeds if s.phases else 1)]


def run_cells(lab: Lab, cells: list[tuple[Setting, int]], say: Callable[[str], object]) -> None:
    """Measure the cells that ``lab.out`` lacks, each written whole when it is done."""
    todo = [cell for cell in cells if not cell_path(lab.out, *cell).exists()]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    if not todo:
        return
    # One after the other where the model is changed alike: the states before that layer are kept.
    todo.sort(key=lambda cell: _place(first_changed(cell[0].layers)))
    with progress_bar("", len(todo), "cells") as bar:
        for setting, seed in todo:
            with claimed(cell_path(lab.out, setting, seed)) as free:
                if free:
                    bar.say(setting.name)
                    row = run_cell(lab, setting, seed, _within(bar, setting.name))
                    if not setting.layers:
                        say(one_line(setting, seed, row))
            if cell_path(lab.out, setting, seed).exists():  # else another process is at it
                bar()


def _place(first: Changed) -> tuple[int, int]:
    return -1 if first.encoder is None else first.encoder, first.decoder


def measuring(out: Path) -> bool:
    """Whether another process holds a cell of the study in ``out``, with more seeds perhaps."""
    return any(is_locked(path) for path in (out / "cells").glob("*.lock"))


def forget_states(states: Path) -> None:
    """Delete them: renamed first, so that none are half there."""
    gone = states.with_name(f"{states.name}.{os.getpid()}.gone")
    with suppress(OSError):
        states.rename(gone)
    for old in states.parent.glob(f"{states.name}.*.gone"):  # and of a process that was killed
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the cell ``path`` is this process's to measure: neither there nor another's. The lock
    ends with the block, or with the process."""
    with locked(path.with_suffix(".lock"), LOOK_SECONDS) as ours:
        yield ours and not path.exists()


def run_cell(lab: Lab, setting: Setting, seed: int, status: Say) -> dict[str, Any]:
    """Measure one cell and write it."""
    from dqw.study.report import machine

    start = time.monotonic()
    made = lab.measure(setting, seed, status)
    row = {"setting": setting.name, "seed": seed, **made, "settings": digest_of(setting)}
    row["made"] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    row["seconds"] = round(time.monotonic() - start, 1)
    write_atomic(cell_path(lab.out, setting, seed), json.dumps(row) + "\n")
    forget_checkpoints(lab, setting, seed)
    return row


def digest_of(setting: Setting) -> str:
    """Of what is measured in a setting, but for its name."""
    phases = [(phase.share, phase.quantized, phase.changes) for phase in setting.phases]
    bits = setting.factors.get("bits") if setting.layers else None
    what = setting.model, setting.changes, phases, setting.ratio, setting.layers, bits
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def check_cells(out: Path, cells: list[tuple[Setting, int]]) -> None:
    """Raise UserError where cells are there that were measured by other settings of one name."""
    stale = []
    for setting, seed in cells:
        path = cell_path(out, setting, seed)
        with suppress(OSError, ValueError, AttributeError):  # not there, or damaged: said later
            row = json.loads(path.read_text(encoding="utf-8"))
            if row.get("settings", digest_of(setting)) != digest_of(setting):
                stale.append(path.name)
    if stale:
        some = textwrap.shorten(", ".join(stale), 200)
        raise UserError(
            f"{len(stale)} cells in {out / 'cells'} were measured when their settings meant "
            f"something else ({some}): remove them, and they are measured again."
        )


def _within(bar: Bar, name: str) -> Callable[[str], None]:
    return lambda where: bar.say(f"{name}: {where}")


def cell_path(out: Path, setting: Setting, seed: int) -> Path:
    return out / "cells" / f"{cell_name(setting, seed)}.json"


def read_cells(out: Path, cells: list[tuple[Setting, int]]) -> dict[str, list[dict[str, Any]]]:
    """Setting's name → its cells, by seed. Raises UserError for a file that is no cell."""
    found: dict[str, list[dict[str, Any]]] = {}
    for setting, seed in cells:
        path = cell_path(out, setting, seed)
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            row["kl"], row["clips"], row["mib"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: remove it, and it is measured again.") from None
        found.setdefault(setting.name, []).append(row)
    return found


def one_line(setting: Setting, seed: int, row: dict[str, Any]) -> str:
    from dqw.whisper.stats import counts

    parts = [f"{setting.name}, seed {seed}" if setting.phases else setting.name]
    for metric in ("KL", "WER", "CER"):
        total, units = counts(row, metric).sum(0)
        if units and metric == "KL":
            parts.append(f"KL {total / units:.4f}")
        elif units:
            parts.append(f"{metric} {100 * total / units:.2f} % ({total:.0f}/{units:.0f})")
    return "  ".join([*parts, f"{row['mib']:.1f} MiB", f"{row['seconds']:.0f} s"])
