"""Who computes an operator's CUDA tensors: CUDA C++, Triton, Triton and cuBLAS, or the reference.

The functions have the schemas of ``dqw.ops``, which registers ``KERNELS``. Each kernel is imported
when the first tensor comes for it. Triton serves all. Where the CUDA C++ library was built, it has
``IN_LIBRARY`` to itself, with no Python in between, and products where ``gemv_serves``.
"""

import functools
import os
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dqw import reference
from dqw.packing import packed_bytes

# Rows of x up to which the float layers' kernels serve; above, the weight is dequantized to x's
# dtype and cuBLAS multiplies. H100, 2026-11-27, us of 512 -> 2048, 1280 -> 5120 and 5120 -> 1280:
#                    CUDA C++           Triton             dequantized        float16
#   16 rows, 4 bits  2.6, 4.8, 5.2      4.3, 7.0, 7.1      7.2, 21, 22        3.2, 4.7, 7.1
#   32 rows, 4 bits  4.1, 13.5, 9.5     5.0, 8.5, 8.2      7.2, 22, 22        3.2, 5.0, 7.1
#   32 rows, 8 bits  3.8, 13.6, 9.8     7.0, 13.5, 13.4    7.6, 21, 22        3.4, 4.9, 7.3
#   64 rows, 4 bits  two calls          5.3, 9.7, 12.7     7.4, 22, 24        3.3, 5.3, 8.5
ROWS = {"CUDA C++": 16, "Triton": 64}
# Of CUDA C++ where it is no slower than Triton: small matrices, and from 5 bits on (8 were timed).
MORE_ROWS = 32
SMALL = 2**20  # weights
_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=3)


def _check_packed(
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
    *others: Tensor | None,
) -> None:
    """A kernel must not read beyond a tensor, or on another device than that of ``others``; the
    reference would raise by itself."""
    for t in (scale, levels, *others):
        if t is not None and t.device != weight.device:
            raise ValueError(
                f"packed weight is on {weight.device}, but another tensor on {t.device}: "
                "move the model and its input to one device"
            )
    if weight.numel() != packed_bytes(rows, cols, bits) or not weight.is_contiguous():
        raise ValueError(
            f"packed weight has {weight.numel()} bytes, "
            f"but ({rows}, {cols}) at {bits} bits takes {packed_bytes(rows, cols, bits)}"
        )
    _check_scale(scale, rows, cols, group_size)
    if levels.dtype != torch.int16 or levels.numel() != 2**bits or not levels.is_contiguous():
        raise ValueError(f"levels must be contiguous int16 of {2**bits} entries")


def _check_scale(scale: Tensor, rows: int, cols: int, group_size: int) -> None:
    groups = -(-cols // group_size) if group_size else 1
    shapes = [(rows, groups)] if group_size else [(rows, 1), (1, 1)]
    if tuple(scale.shape) not in shapes:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, but {shapes[0]} is needed")


def _check_rounding(
    x: Tensor, scale: Tensor, bucket: Tensor, group_size: int, *like: Tensor
) -> None:
    """The same of fake quantization; ``like``: tensors of the shape of ``x``."""
    if x.dim() != 2 or any(t.shape != x.shape for t in like):
        found = ", ".join(str(tuple(t.shape)) for t in (x, *like))
        raise ValueError(f"fake quantization takes matrices of one shape (rows, cols), not {found}")
    _check_scale(scale, len(x), x.shape[1], group_size)
    for t in (scale, bucket, *like):
        if t.device != x.device:
            raise ValueError(f"x is on {x.device}, and what rounds it on {t.device}")


def fake_quant(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    from dqw_kernels import fake_quant as kernel

    _check_rounding(x, scale, bucket, group_size)
    return kernel.fake_quant(x, scale, bucket, group_size)


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    from dqw_kernels import fake_quant as kernel

    _check_rounding(x, scale, bucket, group_size, grad)
    return kernel.fake_quant_backward(grad, x, scale, bucket, group_size)


def fake_quant_clip(
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    from dqw_kernels import fake_quant as kernel

    scale = reference.stored_scale(reference.exact_scale(clip, bucket), window)
    _check_rounding(x, scale, bucket, group_size)
    # Other than float32 is rounded twice: to x's dtype, and to the one asked for.
    written = dtype if x.dtype == torch.float32 else x.dtype
    return kernel.fake_quant(x, scale, bucket, group_size, written).to(dtype)


def fake_quant_clip_backward(
    grad: Tensor,
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    from dqw_kernels import fake_quant as kernel

    exact = reference.exact_scale(clip, bucket)
    scale = reference.stored_scale(exact, window)
    _check_rounding(x, scale, bucket, group_size, grad)
    dx, dscale = kernel.fake_quant_backward(grad, x, scale, bucket, group_size)
    return dx, reference.clip_gradient(dscale, exact, bucket, gradient_scale)


def dequantize(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int
) -> Tensor:
    from dqw_kernels import dequantize as kernel

    _check_packed(weight, scale, levels, rows, cols, bits, group_size)
    return kernel.dequantize(weight, scale, levels, rows, cols, bits, group_size)


def quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
) -> Tensor:
    from dqw_kernels import dequantize as kernel

    _check_packed(weight, scale, levels, rows, cols, bits, group_size, ids)
    y = kernel.gather(ids, weight, scale, levels, rows, cols, bits, group_size)
    return y.view(*ids.shape, cols)


@functools.cache
def _is_new_enough(device: torch.device) -> bool:
    """Whether ``device`` has the tensor cores' instructions that the CUDA C++ products take, from
    sm_80 on. The CPU, which stands in for a GPU in tests, has them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


# Tables that were looked at, as they were at a version.
_uniform: MutableMapping[Tensor, tuple[int, bool]] = WeakIdKeyDictionary()


def _is_uniform(levels: Tensor) -> bool:
    """Whether a table's levels are their indices: bfloat16 holds each of 7 and 8 bits then. The
    first look waits for the GPU; where a graph is captured nobody may, and the answer is no."""
    version = 0 if levels.is_inference() else levels._version
    known = _uniform.get(levels)
    if known is None or known[0] != version:
        if levels.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        half = levels.numel() // 2  # magnitudes rise from 0 or more (a tail without use is 0)
        known = _uniform[levels] = version, int(levels[half - 1]) == half - 1
    return known[1]


def _most_rows(weights: list[Tensor], bits: int) -> int:
    small = all(8 * w.numel() <= bits * SMALL for w in weights)
    return MORE_ROWS if bits > 4 or small else ROWS["CUDA C++"]


def gemv_serves(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    levels: Tensor,
    bits: int,
    group_size: int,
) -> bool:
    """Whether the CUDA C++ kernel takes these layers: what csrc/cuda/quant_linear.cu demands.

    It reads weights and scales before the kernel ahead of it in the stream has ended: who writes
    them on the GPU waits for it, as ``QuantModule.freeze`` does.
    """
    return (
        not library_reason
        and _is_new_enough(x.device)
        and x.shape[:-1].numel() <= _most_rows(weights, bits)
        and (
            x.dtype == torch.float16
            or (x.dtype == torch.bfloat16 and (bits <= 6 or _is_uniform(levels)))
        )
        and group_size in (0, 16, 32, 64, 128)
        and x.shape[-1] % 8 == 0
        and (x.data_ptr() % 16 == 0 or not x.is_contiguous())
        and all(w.data_ptr() % 16 == 0 for w in weights)
        and all(s.dtype == (torch.float16 if group_size else torch.float32) for s in scales)
        and all(s.is_contiguous() for s in scales)  # a copy would not be ready when it is read
    )


def quant_linears(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    levels: Tensor,
    biases: list[Tensor | None],
    rows: list[int],
    bits: int,
    group_size: int,
    gelu: bool,
) -> list[Tensor]:
    cols = x.shape[-1]
    if len(rows) > 3 or not gemv_serves(x, weights, scales, levels, bits, group_size):
        return reference.quant_linears(
            x, weights, scales, levels, biases, rows, bits, group_size, gelu
        )
    for w, s, n in zip(weights, scales, rows, strict=True):
        _check_packed(w, s, levels, n, cols, bits, group_size, x)
    flat = x.reshape(x.shape[:-1].numel(), cols).contiguous()
    given = [x.new_empty(0) if b is None else b.to(x.dtype).contiguous() for b in biases]
    ys = torch.ops.dqw_cuda.gemv(flat, weights, scales, levels, given, rows, bits, group_size, gelu)
    return [y.view(*x.shape[:-1], n) for y, n in zip(ys, rows, strict=True)]


def quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    from dqw_kernels import dequantize as whole
    from dqw_kernels import quant_linear as kernel

    cols = x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), cols)
    _check_packed(weight, scale, levels, rows, cols, bits, group_size, x, bias)
    if bias is not None and bias.numel() != rows:
        raise ValueError(f"bias must have {rows} entries, got {bias.numel()}")
    if not int8_activations and gemv_serves(x, [weight], [scale], levels, bits, group_size):
        one = quant_linears(x, [weight], [scale], levels, [bias], [rows], bits, group_size, False)
        return one[0]
    fits = kernel.supports(cols, group_size, int8_activations)
    if int8_activations and not fits:
        _say_once(
            f"int8 activations with {cols} columns in groups of {group_size} run on dqw's slow "
            "PyTorch reference on a GPU: use groups of a multiple of 16, and up to 65536 columns."
        )
        return reference.quant_linear(
            x, weight, scale, levels, bias, rows, bits, group_size, int8_activations
        )
    if int8_activations or (fits and flat.shape[0] <= ROWS["Triton"]):
        y = kernel.quant_linear(
            flat, weight, scale, levels, bias, rows, bits, group_size, int8_activations
        )
    else:
        w = whole.dequantize(weight, scale, levels, rows, cols, bits, group_size, x.dtype)
        with torch.autocast("cuda", enabled=False):  # the dtype of y is that of x
            y = torch.nn.functional.linear(flat, w, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], rows)


KERNELS: dict[str, Callable] = {
    "fake_quant": fake_quant,
    "fake_quant_backward": fake_quant_backward,
    "fake_quant_clip": fake_quant_clip,
    "fake_quant_clip_backward": fake_quant_clip_backward,
    "dequantize": dequantize,
    "quant_linear": quant_linear,
    "quant_linears": quant_linears,
    "quant_embedding": quant_embedding,
}


def _triton_reason() -> str:
    """Why Triton does not serve CUDA tensors; empty if it does."""
    from importlib.util import find_spec

    if os.environ.get("DQW_BACKEND", "auto") == "reference":
        return "DQW_BACKEND=reference is set"
    for module in ("triton", "dqw_kernels"):
        if find_spec(module) is None:
            return f"the package {module} is not installed"
    return ""


def _load_library() -> str:
    """Load the CUDA C++ library; → why it does not serve, empty if it does."""
    file = Path(__file__).parent / "_C_cuda.so"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not file.exists():
        return "the CUDA C++ library was not built: install dqw where nvcc is"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{file.name} does not load ({error}): reinstall dqw to rebuild it"
    return ""


reason = _triton_reason()  # why no kernel of dqw serves CUDA tensors; empty if they do
library_reason = reason or _load_library()  # why the CUDA C++ library does not

IN_LIBRARY = (  # csrc/cuda/fake_quant.cu registers them
    "fake_quant_clip",
    "fake_quant_clip_backward",
    "fake_quant_clips",
    "fake_quant_clips_backward",
    "fake_quant_activation",
)
if not library_reason:
    for _name in IN_LIBRARY:
        KERNELS.pop(_name, None)


def kernel_of(name: str) -> str:
    """Which kernel serves an operator's CUDA tensors, and why."""
    if reason:
        return f"PyTorch reference ({reason})"
    if name in IN_LIBRARY:
        instead = "PyTorch reference" if name == "fake_quant_activation" else "Triton"
        return f"{instead}, no CUDA C++ ({library_reason})" if library_reason else "CUDA C++"
    if name not in KERNELS:
        return "PyTorch reference (outside the layers that run: no kernel needed)"
    if name not in ("quant_linear", "quant_linears"):
        return "Triton"
    few, some = ROWS["CUDA C++"], ROWS["Triton"]
    first = f"CUDA C++ up to {few} rows, {MORE_ROWS} of 5 bits and more or small matrices"
    if library_reason:
        first = f"no CUDA C++ ({library_reason})"
    return f"{first}; Triton up to {some} rows and for int8 activations; above Triton + cuBLAS"
