"""Which device a model runs on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dqw.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")


def best_device() -> torch.device:
    """A GPU, where there is one (this process's own of several), for what takes long."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def move_to(model: Any, device: str, exact: bool = False) -> None:
    """``model`` to ``device``, ``cpu`` or ``cuda``, in place; on a GPU in float16, or in its
    own dtype where ``exact``. Raises UserError for another name, and where there is no GPU."""
    import torch

    if device not in DEVICES:
        raise UserError(f"the device {device!r} is not known: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU: leave out --device, or install a torch for CUDA.")
    model.to(best_device(), None if exact else torch.float16)
