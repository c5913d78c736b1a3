"""Training checkpoints: safetensors and JSON, written whole or not at all.

    checkpoint-120/
      model.safetensors       student (latent weights, clips) and projections
      optimizer.safetensors   the optimizer's tensors, STATE.INDEX
      run.json                scheduler, scaler, guidance, matching, settings, file sizes
      trainer_state.json      transformers' own state: step, epoch, log history

A folder is written under a hidden name, every file is synced, then it is renamed. There are no
random states to keep: each micro-step seeds the generators from its own number.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from dqw.errors import UserError
from dqw.locks import locked

PREFIX = "checkpoint-"
_UNFINISHED = ".unfinished-"
_LOCK = ".lock"
LOCK_SECONDS = 8  # workers of a killed run look for it every 5 s, and hold its lock until then
_RUN = "run.json"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run's folder for this process alone, until the block, or the process and those that read
    clips for it, end; it may be deleted meanwhile. Raises UserError where another one has it."""
    with locked(folder / _LOCK, LOCK_SECONDS) as ours:
        if not ours:
            raise UserError(
                f"another process is training in {folder}: wait for it to end, or choose another "
                "folder."
            )
        yield


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    A folder counts when `run.json` can be read and every file has the size noted there.
    """
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        step = path.name.removeprefix(PREFIX)
        if step.isdigit() and _complete(path):
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The contents of `run.json`."""
    run: dict[str, Any] = json.loads((checkpoint / _RUN).read_text(encoding="utf-8"))
    return run


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: str,
    run: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-STEP` and delete all but the newest `keep`.

    Raises UserError when the disk is full; what was there before stays.
    """
    target, work = folder / f"{PREFIX}{step}", folder / f"{_UNFINISHED}{step}"
    try:
        clean(folder)
        work.mkdir(parents=True)
        save_model(model, str(work / "model.safetensors"))
        tensors, plain = _optimizer_state(optimizer)
        save_file(tensors, str(work / "optimizer.safetensors"))
        (work / "trainer_state.json").write_text(trainer_state, encoding="utf-8")
        run = {**run, "step": step, "optimizer": plain}
        run["files"] = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        (work / _RUN).write_text(json.dumps(run), encoding="utf-8")
        for path in [*work.iterdir(), work]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        if _is_full(error):
            raise UserError(
                f"no space left for a checkpoint in {folder}: free some space or choose another "
                "folder, then resume; the checkpoints before it are whole."
            ) from error
        raise
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        gone = folder / f"{_UNFINISHED}{old.name}"
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def _is_full(error: Exception) -> bool:
    """safetensors says it in words alone, "… (os error 28)"."""
    codes = errno.ENOSPC, errno.EDQUOT
    said = any(f"(os error {code})" in str(error) for code in codes)
    return said or getattr(error, "errno", None) in codes


def clean(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fill `model` from a checkpoint. Raises UserError if it is another model's."""
    try:
        missing, unexpected = load_model(model, str(checkpoint / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise _other_model(checkpoint) from error
    if missing or unexpected:
        raise _other_model(checkpoint)


def load_optimizer(checkpoint: Path, optimizer: Any) -> None:
    """Fill `optimizer`, which has the same parameter groups, from a checkpoint."""
    plain = read_run(checkpoint)["optimizer"]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(str(checkpoint / "optimizer.safetensors")).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(path: Path) -> bool:
    try:
        files = read_run(path)["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _optimizer_state(optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _other_model(checkpoint: Path) -> UserError:
    return UserError(
        f"{checkpoint} was written for another student or recipe: resume with the settings of the "
        "first run, or choose another output folder."
    )
