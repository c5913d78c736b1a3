"""The processes of one run, as torchrun starts them: one for each GPU, or several on CPUs.

One process alone, the usual case, is the main one, and nothing here costs it anything.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# How long a process waits for another: the main one may write labels for hours.
PATIENCE = timedelta(days=7)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Go on when all processes have come here."""
    if _several():
        _joined().wait_for_everyone()


def agreed(value: T) -> T:
    """The main process's ``value``, in all."""
    if not _several():
        return value
    import torch.distributed

    _joined()
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def alike(value: Any) -> bool:
    """Whether all processes have the same ``value``; all hear the same."""
    if not _several():
        return True
    import torch.distributed

    values: list[Any] = [None] * _joined().num_processes
    torch.distributed.all_gather_object(values, value)
    return all(other == value for other in values)


def mean(values: Tensor) -> Tensor:
    """The mean of all processes' ``values``, in all."""
    if not _several():
        return values
    import torch.distributed

    state = _joined()
    values = values.to(state.device)
    torch.distributed.all_reduce(values)
    return values / state.num_processes


def share(module: Any) -> None:
    """Give all processes the main one's weights: what each has worked out may differ in a bit."""
    if not _several():
        return
    import torch.distributed

    _joined()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            torch.distributed.broadcast(tensor.data, src=0)


def leave() -> None:
    """Go on when all processes have come here, and end their group: its threads, alive while
    Python ends, abort one run in 25 (torch 2.13, gloo; the run of tests/test_processes.py)."""
    import torch.distributed

    if not _several() or not torch.distributed.is_initialized():  # nothing was shared
        return
    wait()
    gc.collect()  # what training left behind still holds the group
    _joined().destroy_process_group()


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _joined() -> Any:
    """accelerate's state, which joins the processes (NCCL, or gloo on CPUs) when first made."""
    from accelerate import PartialState

    from dqw.devices import has_gpu

    return PartialState(cpu=not has_gpu(), timeout=PATIENCE)
