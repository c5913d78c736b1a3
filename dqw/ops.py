"""The operators ``torch.ops.dqw.*``: schemas, meta functions, gradients, and who computes them.

Every operator has a reference in plain PyTorch (``dqw.reference``), registered for every device.
On a CPU the compiled library takes its place when it could be loaded; on a GPU the Triton kernels
do. That choice is made in this file and nowhere else; ``backend_info`` says what was chosen and
why. ``DQW_BACKEND=reference`` keeps everything on the reference.

Shapes: a weight is (rows, cols), rows = out features. ``scale`` is float32 (packed: also float16)
of shape (1, 1) per tensor, (rows, 1) per channel, or (rows, ceil(cols / group_size)) per group of
``group_size`` along the columns; ``group_size`` is 0 unless grouped. ``bucket`` and ``levels`` are
the tables of ``dqw.grids``; ``weight`` is packed as in ``dqw.packing``.
"""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dqw import reference
from dqw.packing import packed_bytes

_SCHEMAS = {
    "fake_quant": "(Tensor x, Tensor scale, Tensor bucket, int group_size) -> Tensor",
    "fake_quant_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor bucket, int group_size) -> (Tensor, Tensor)"
    ),
    "fake_quant_activation": "(Tensor x) -> Tensor",
    "quantize": "(Tensor x, Tensor scale, Tensor bucket, int group_size) -> Tensor",
    "dequantize": (
        "(Tensor weight, Tensor scale, Tensor levels, int rows, int cols, int bits, int group_size)"
        " -> Tensor"
    ),
    "quant_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor levels, Tensor? bias, int rows, int bits, "
        "int group_size, bool int8_activations) -> Tensor"
    ),
    # Up to three layers that share x, such as query, key and value: one launch where a kernel has
    # it. With gelu the exact one is applied. No gradients.
    "quant_linears": (
        "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor levels, Tensor?[] biases, "
        "int[] rows, int bits, int group_size, bool gelu) -> Tensor[]"
    ),
    "quant_embedding": (
        "(Tensor ids, Tensor weight, Tensor scale, Tensor levels, int rows, int cols, int bits, "
        "int group_size) -> Tensor"
    ),
}

_library = torch.library.Library("dqw", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    if _name != "quant_linears":
        _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _each_linear(
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
    ys = [
        torch.ops.dqw.quant_linear(x, w, s, levels, b, n, bits, group_size, False)
        for w, s, b, n in zip(weights, scales, biases, rows, strict=True)
    ]
    return [torch.nn.functional.gelu(y) for y in ys] if gelu else ys


_library.impl("quant_linears", _each_linear, "CompositeExplicitAutograd")


# ---- meta functions: shapes and dtypes without data ----


def _meta_fake_quant(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape)


def _meta_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _meta_quantize(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int16)


def _meta_dequantize(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int
) -> Tensor:
    return weight.new_empty((rows, cols), dtype=torch.float32)


def _meta_quant_linear(
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
    return x.new_empty((*x.shape[:-1], rows))


def _meta_quant_linears(
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
    return [x.new_empty((*x.shape[:-1], n)) for n in rows]


def _meta_quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
) -> Tensor:
    return ids.new_empty((*ids.shape, cols), dtype=torch.float32)


def _meta_fake_quant_activation(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


for _name in _SCHEMAS:
    torch.library.register_fake(f"dqw::{_name}", globals()[f"_meta_{_name}"], lib=_library)


# ---- gradients ----


def _fake_quant_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, bucket, group_size = inputs
    ctx.save_for_backward(x, scale, bucket)
    ctx.group_size = group_size


def _fake_quant_grad(ctx, grad):
    dx, dscale = torch.ops.dqw.fake_quant_backward(grad, *ctx.saved_tensors, ctx.group_size)
    return dx, dscale, None, None


def _quant_linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, scale, levels, bias, ctx.rows, ctx.bits, ctx.group_size, _ = inputs
    ctx.save_for_backward(weight, scale, levels)
    ctx.cols = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _quant_linear_grad(ctx, grad):
    """Packed weights take no gradient; the input does (straight through int8), and the bias."""
    w = torch.ops.dqw.dequantize(
        *ctx.saved_tensors, ctx.rows, ctx.cols, ctx.bits, ctx.group_size
    ).to(grad.dtype)
    dbias = None
    if ctx.bias_dtype is not None:
        dbias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad @ w, None, None, None, dbias, None, None, None, None


torch.library.register_autograd(
    "dqw::fake_quant", _fake_quant_grad, setup_context=_fake_quant_setup, lib=_library
)
torch.library.register_autograd(  # straight through: the range of a row always covers it
    "dqw::fake_quant_activation", lambda ctx, grad: grad, lib=_library
)
torch.library.register_autograd(
    "dqw::quant_linear", _quant_linear_grad, setup_context=_quant_linear_setup, lib=_library
)


# ---- who computes ----

_LIBRARY_FILE = Path(__file__).parent / "_C.so"
_cpu_reason = ""  # why the compiled CPU kernels do not serve; empty if they do


def _load_cpu_kernels() -> None:
    global _cpu_reason
    if os.environ.get("DQW_BACKEND", "auto") == "reference":
        _cpu_reason = "DQW_BACKEND=reference is set"
        return
    if not _LIBRARY_FILE.exists():
        _cpu_reason = "the C++ library was not built; install dqw where a C++ compiler is"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY_FILE))
        except OSError as error:
            _cpu_reason = (
                f"{_LIBRARY_FILE.name} does not load ({error}); reinstall dqw to rebuild it"
            )
    if _cpu_reason:
        warnings.warn(f"dqw runs on its slow PyTorch reference: {_cpu_reason}.", stacklevel=2)


_load_cpu_kernels()


# ---- CUDA: each kernel is imported when the first tensor comes for it ----

# Rows of x up to which the float layers' kernels serve; above, the weight is dequantized to x's
# dtype and cuBLAS multiplies. Not measured yet: the CUDA C++ kernel stops where an m16n8k16
# tensor-core product is full, and Triton where published 4-bit kernels begin to lose to float16
# (64 to 128 rows on an A100).
_CUDA_ROWS = {"CUDA C++": 8, "Triton": 64}
_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=3)


def _check_packed(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int
) -> None:
    """A kernel must not read beyond a tensor; the reference would raise by itself."""
    groups = -(-cols // group_size) if group_size else 1
    shapes = [(rows, groups)] if group_size else [(rows, 1), (1, 1)]
    if weight.numel() != packed_bytes(rows, cols, bits) or not weight.is_contiguous():
        raise ValueError(
            f"packed weight has {weight.numel()} bytes, "
            f"but ({rows}, {cols}) at {bits} bits takes {packed_bytes(rows, cols, bits)}"
        )
    if tuple(scale.shape) not in shapes:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, but {shapes[0]} is needed")
    if levels.dtype != torch.int16 or levels.numel() != 2**bits:
        raise ValueError(f"levels must be int16 of {2**bits} entries")


def _cuda_fake_quant(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    from dqw_kernels import fake_quant as kernel

    return kernel.fake_quant(x, scale, bucket, group_size)


def _cuda_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    from dqw_kernels import fake_quant as kernel

    return kernel.fake_quant_backward(grad, x, scale, bucket, group_size)


def _cuda_dequantize(
    weight: Tensor, scale: Tensor, levels: Tensor, rows: int, cols: int, bits: int, group_size: int
) -> Tensor:
    from dqw_kernels import dequantize as kernel

    _check_packed(weight, scale, levels, rows, cols, bits, group_size)
    return kernel.dequantize(weight, scale, levels, rows, cols, bits, group_size)


def _cuda_quant_embedding(
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

    _check_packed(weight, scale, levels, rows, cols, bits, group_size)
    y = kernel.gather(ids, weight, scale, levels, rows, cols, bits, group_size)
    return y.view(*ids.shape, cols)


def _gemv_serves(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], bits: int, group_size: int
) -> bool:
    """Whether the CUDA C++ kernel takes these layers: what csrc/cuda/quant_linear.cu demands."""
    return (
        not _gemv_reason
        and x.shape[:-1].numel() <= _CUDA_ROWS["CUDA C++"]
        and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and bits <= 6))
        and group_size in (0, 32, 64, 128)
        and x.shape[-1] % 8 == 0
        and (x.data_ptr() % 16 == 0 or not x.is_contiguous())
        and all(w.data_ptr() % 16 == 0 for w in weights)
        and all(s.dtype == (torch.float16 if group_size else torch.float32) for s in scales)
    )


def _cuda_quant_linears(
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
    if len(rows) > 3 or not _gemv_serves(x, weights, scales, bits, group_size):
        return _each_linear(x, weights, scales, levels, biases, rows, bits, group_size, gelu)
    for w, s, n in zip(weights, scales, rows, strict=True):
        _check_packed(w, s, levels, n, cols, bits, group_size)
    flat = x.reshape(x.shape[:-1].numel(), cols).contiguous()
    given = [x.new_empty(0) if b is None else b.to(x.dtype).contiguous() for b in biases]
    ys = torch.ops.dqw_cuda.gemv(
        flat, weights, [s.contiguous() for s in scales], levels, given, rows, bits, group_size, gelu
    )
    return [y.view(*x.shape[:-1], n) for y, n in zip(ys, rows, strict=True)]


def _cuda_quant_linear(
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
    from dqw_kernels import dequantize
    from dqw_kernels import quant_linear as kernel

    cols = x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), cols)
    _check_packed(weight, scale, levels, rows, cols, bits, group_size)
    if bias is not None and bias.numel() != rows:
        raise ValueError(f"bias must have {rows} entries, got {bias.numel()}")
    if not int8_activations and _gemv_serves(x, [weight], [scale], bits, group_size):
        one = _cuda_quant_linears(
            x, [weight], [scale], levels, [bias], [rows], bits, group_size, False
        )
        return one[0]
    fits = kernel.supports(cols, group_size, int8_activations)
    if int8_activations and not fits:
        _say_once(
            f"int8 activations with {cols} columns in groups of {group_size} run on dqw's slow "
            "PyTorch reference on a GPU: use groups of a multiple of 16."
        )
        return reference.quant_linear(
            x, weight, scale, levels, bias, rows, bits, group_size, int8_activations
        )
    if int8_activations or (fits and flat.shape[0] <= _CUDA_ROWS["Triton"]):
        y = kernel.quant_linear(
            flat, weight, scale, levels, bias, rows, bits, group_size, int8_activations
        )
    else:
        w = dequantize.dequantize(weight, scale, levels, rows, cols, bits, group_size, x.dtype)
        y = torch.nn.functional.linear(flat, w, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], rows)


_TRITON = {
    "fake_quant": _cuda_fake_quant,
    "fake_quant_backward": _cuda_fake_quant_backward,
    "dequantize": _cuda_dequantize,
    "quant_linear": _cuda_quant_linear,
    "quant_linears": _cuda_quant_linears,
    "quant_embedding": _cuda_quant_embedding,
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


def _load_gemv() -> str:
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


_cuda_reason = _triton_reason()
_gemv_reason = _cuda_reason or _load_gemv()
if not _cuda_reason:
    for _name, _function in _TRITON.items():
        _library.impl(_name, _function, "CUDA")


def _cuda_kernel(name: str) -> str:
    """Which kernel serves an operator's CUDA tensors, and why."""
    if _cuda_reason:
        return f"PyTorch reference ({_cuda_reason})"
    if name not in _TRITON:
        return "PyTorch reference (outside the layers that run: no kernel needed)"
    if name not in ("quant_linear", "quant_linears"):
        return "Triton"
    few, some = _CUDA_ROWS["CUDA C++"], _CUDA_ROWS["Triton"]
    first = f"no CUDA C++ ({_gemv_reason})" if _gemv_reason else f"CUDA C++ up to {few} rows"
    return f"{first}; Triton up to {some} rows and for int8 activations; above Triton + cuBLAS"


def backend_info() -> dict[str, dict[str, str]]:
    """Which kernel serves each operator, and why: {operator: {"cpu": …, "cuda": …}}."""
    cpu = f"PyTorch reference ({_cpu_reason})"
    if not _cpu_reason:
        cpu = "C++"
        if hasattr(torch.ops.dqw_cpu, "instruction_set"):
            cpu += f", {torch.ops.dqw_cpu.instruction_set()}"
    return {name: {"cpu": cpu, "cuda": _cuda_kernel(name)} for name in _SCHEMAS}


fake_quant = torch.ops.dqw.fake_quant.default
fake_quant_activation = torch.ops.dqw.fake_quant_activation.default
quantize = torch.ops.dqw.quantize.default
dequantize = torch.ops.dqw.dequantize.default
quant_linears = torch.ops.dqw.quant_linears.default

_quant_linear = torch.ops.dqw.quant_linear.default
_quant_embedding = torch.ops.dqw.quant_embedding.default
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _straight_to_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing between Python and the CPU kernel wants to see this call.

    The dispatcher's way there costs 9 microseconds, most of them in the autograd layer that
    ``torch.library`` writes in Python; a small layer's product takes less. Gradients, subclasses,
    compilers, modes, transforms and the profiler get the whole way.
    """
    return (
        type(x) is Tensor
        and type(weight) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
        and not torch._C._get_tracing_state()
    )


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
    """``torch.ops.dqw.quant_linear``, by the shortest way; see ``dqw.reference.quant_linear``."""
    args = (x, weight, scale, levels, bias, rows, bits, group_size, int8_activations)
    learns = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if learns or not _straight_to_kernel(x, weight):
        return _quant_linear(*args)
    return _quant_linear.redispatch(_CPU, *args)


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
    """``torch.ops.dqw.quant_embedding``, by the shortest way."""
    args = (ids, weight, scale, levels, rows, cols, bits, group_size)
    if not _straight_to_kernel(ids, weight):
        return _quant_embedding(*args)
    return _quant_embedding.redispatch(_CPU, *args)
