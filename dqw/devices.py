"""Which device a model runs on, and how exactly it multiplies there."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqw.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")


def has_gpu() -> bool:
    """Whether torch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def best_device() -> torch.device:
    """A GPU, where there is one (this process's own of several), for what takes long."""
    import torch

    if has_gpu():
        # Where each process sees one GPU alone, that is its first, whatever the process's number.
        own = int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)
        return torch.device("cuda", own)
    return torch.device("cpu")


def fast_precision(device: str = "") -> str:
    """``bf16`` where ``device`` multiplies it in hardware, else ``float32``: ``cpu``, ``cuda``, or
    what models are trained on here."""
    import torch

    if device != "cpu" and has_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "float32"


def multiplied(x: torch.Tensor) -> torch.Tensor:
    """``x`` as matrix products take it: in autocast's dtype, where that is on."""
    import torch

    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@contextmanager
def lowered(model: Any, *others: Any) -> Iterator[None]:
    """bfloat16 matrix products within the block, where the model's device has them in hardware;
    on a CPU attention of ``model`` and ``others`` runs on dqw's kernel. LayerNorms of their layers
    then give bfloat16, as each product would round for itself; not where some are packed or have
    int8 activations, which take float32.

    Weights may change within it: autocast's own copies, which would be those of the first use, are
    switched off.
    """
    import torch

    from dqw.attention import native_attention

    lowers = fast_precision(model.device.type) == "bf16"
    norms = [norm for one in (model, *others) if lowers for norm in _norms(one)]
    with ExitStack() as stack:
        stack.enter_context(
            torch.autocast(model.device.type, torch.bfloat16, enabled=lowers, cache_enabled=False)
        )
        stack.enter_context(native_attention(model, *others))
        for norm in norms:
            stack.callback(norm.register_forward_hook(lambda _, __, y: multiplied(y)).remove)
        yield


def _norms(model: Any) -> set[Any]:
    """LayerNorms of the layers of ``model`` whose outputs autocast's products alone take."""
    from torch.nn import LayerNorm, ModuleList

    from dqw.linear import QuantModule

    packed = [m for m in model.modules() if isinstance(m, QuantModule)]
    if any(m.frozen or m.spec.activations == "int8" for m in packed):
        return set()
    layers = [m for m in model.modules() if isinstance(m, ModuleList)]
    return {m for some in layers for m in some.modules() if isinstance(m, LayerNorm)}


def move_to(model: Any, device: str, exact: bool = False) -> None:
    """``model`` to ``device``, ``cpu`` or ``cuda``, in place; on a GPU in float16, or in its
    own dtype where ``exact``. Raises UserError for another name, and where there is no GPU."""
    import torch

    if device not in DEVICES:
        raise UserError(f"the device {device!r} is not known: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return
    if not has_gpu():
        raise UserError("torch finds no CUDA GPU: leave out --device, or install a torch for CUDA.")
    warn_of_triton()
    model.to(best_device(), None if exact else torch.float16)


def warn_of_triton() -> None:
    """Warn, where there is a GPU, of what its kernels will want of the system."""
    if has_gpu() and (lacking := lacks_for_triton()):
        warnings.warn(
            f"Triton builds its launcher at the first kernel, and this machine lacks {lacking}: "
            "install gcc and Python's headers (python3-dev) where that fails.",
            stacklevel=3,
        )


def lacks_for_triton() -> str:
    """What Triton needs of the system and does not find: "a C compiler", "Python.h" or ""."""
    named = os.environ.get("CC")
    if not any(shutil.which(compiler) for compiler in ((named,) if named else ("gcc", "clang"))):
        return "a C compiler"
    return "" if (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file() else "Python.h"
