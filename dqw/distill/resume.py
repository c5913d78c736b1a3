"""Going on with a run: from which checkpoint, and whether it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dqw.distill import checkpoint as store
from dqw.distill.callbacks import cut_log
from dqw.errors import UserError


def found_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, after the remains of a killed save are gone."""
    store.clean(folder)
    found = store.newest(folder)
    if found is not None and not resume:
        raise UserError(
            f"{folder} holds the checkpoints of another run: pass resume (--resume) to go on with "
            "it, or choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return found


def resumed_step(
    found: Path | None, folder: Path, settings: dict[str, Any], owns_logs: bool
) -> int | None:
    """Check that a resumed run is the same run, and cut its logs back to the checkpoint."""
    logs = (folder / "log.jsonl", folder / "guidance.jsonl")
    if found is None:
        for path in logs if owns_logs else ():
            path.unlink(missing_ok=True)
        return None
    before = store.read_run(found)["settings"]
    for table in settings:
        if table not in before:
            continue  # of an earlier version, which did not note it
        for key, value in settings[table].items():
            old = before[table].get(key)
            if old != value:
                raise UserError(
                    f"the run in {folder} began with {table}.{key} = {old!r}, now it is {value!r}: "
                    "resume with the same settings and data, or choose another folder."
                )
    step = store.step_of(found)
    if owns_logs:
        cut_log(logs[0], step)
        cut_log(logs[1], step - 1)  # a choice is logged before the step that it is for
    return step
