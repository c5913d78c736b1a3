"""The operators ``torch.ops.dqw.*``: schemas, meta functions, gradients, and who computes them.

Every operator has a reference in plain PyTorch (``dqw.reference``), registered for every device.
On a CPU the compiled library takes its place when it could be loaded; on a GPU the kernels of
``dqw.ops_cuda`` do. ``backend_info`` says what was chosen and why; ``DQW_BACKEND=reference`` keeps
everything on the reference.

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

from dqw import ops_cuda, reference

_SCHEMAS = {
    "fake_quant": "(Tensor x, Tensor scale, Tensor bucket, int group_size) -> Tensor",
    "fake_quant_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor bucket, int group_size) -> (Tensor, Tensor)"
    ),
    # From the clip that is learned, and with the cast. Nothing is registered for autograd: Python
    # would stand between the caller and the kernel. dqw.fake_quant has the gradient.
    "fake_quant_clip": (
        "(Tensor x, Tensor clip, Tensor bucket, Tensor? window, int group_size, ScalarType dtype)"
        " -> Tensor"
    ),
    "fake_quant_clip_backward": (
        "(Tensor grad, Tensor x, Tensor clip, Tensor bucket, Tensor? window, int group_size, "
        "float gradient_scale) -> (Tensor, Tensor)"
    ),
    # The same of several matrices: what the host spends on one it spends on a transformer layer.
    "fake_quant_clips": (
        "(Tensor[] x, Tensor[] clip, Tensor[] bucket, Tensor[] window, int[] group_size, "
        "ScalarType dtype) -> Tensor[]"
    ),
    "fake_quant_clips_backward": (
        "(Tensor[] grad, Tensor[] x, Tensor[] clip, Tensor[] bucket, Tensor[] window, "
        "int[] group_size, float[] gradient_scale) -> Tensor[]"
    ),
    "fake_quant_activation": "(Tensor x) -> Tensor",
    "round_columns": (
        "(Tensor state, Tensor? base, Tensor divisor, Tensor coefficient, Tensor scale, "
        "Tensor bucket) -> (Tensor, Tensor)"
    ),
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
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# ---- meta functions: shapes and dtypes without data ----


def _meta_fake_quant(x: Tensor, scale: Tensor, bucket: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape)


def _meta_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bucket: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _meta_fake_quant_clip(
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _meta_fake_quant_clip_backward(
    grad: Tensor,
    x: Tensor,
    clip: Tensor,
    bucket: Tensor,
    window: Tensor | None,
    group_size: int,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), clip.new_empty(clip.shape)


def _meta_fake_quant_clips(
    x: list[Tensor],
    clip: list[Tensor],
    bucket: list[Tensor],
    window: list[Tensor],
    group_size: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    return [a.new_empty(a.shape, dtype=dtype) for a in x]


def _meta_fake_quant_clips_backward(
    grad: list[Tensor],
    x: list[Tensor],
    clip: list[Tensor],
    bucket: list[Tensor],
    window: list[Tensor],
    group_size: list[int],
    gradient_scale: list[float],
) -> list[Tensor]:
    return [a.new_empty(a.shape) for a in (*x, *clip)]


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


def _meta_round_columns(
    state: Tensor,
    base: Tensor | None,
    divisor: Tensor,
    coefficient: Tensor,
    scale: Tensor,
    bucket: Tensor,
) -> tuple[Tensor, Tensor]:
    def empty() -> Tensor:
        return state.new_empty(state.shape, dtype=torch.float32)

    return empty(), empty()


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
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
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
plain_cpp = False  # whether none of them has instructions of this processor


def _load_cpu_kernels() -> None:
    global _cpu_reason, plain_cpp
    if os.environ.get("DQW_BACKEND", "auto") == "reference":
        _cpu_reason = "DQW_BACKEND=reference is set"
        return
    if not _LIBRARY_FILE.exists():
        _cpu_reason = (
            f"there is no {_LIBRARY_FILE}; install dqw with a C++20 compiler (g++ 11 or newer), "
            "and run an installed dqw outside its checkout"
        )
    else:
        try:
            torch.ops.load_library(str(_LIBRARY_FILE))
        except OSError as error:
            _cpu_reason = (
                f"{_LIBRARY_FILE.name} does not load ({error}); reinstall dqw to rebuild it"
            )
    if _cpu_reason:
        warnings.warn(f"dqw runs on its slow PyTorch reference: {_cpu_reason}.", stacklevel=2)
        return
    plain_cpp = torch.ops.dqw_cpu.instruction_set() == "scalar"
    if plain_cpp and "DQW_CPU_ISA" not in os.environ:
        warnings.warn(
            "dqw has fast CPU kernels for x86-64 with AVX2 or newer; on this processor plain C++ "
            "runs, which is slow.",
            stacklevel=2,
        )


_load_cpu_kernels()


if not ops_cuda.reason:
    for _name, _function in ops_cuda.KERNELS.items():
        _library.impl(_name, _function, "CUDA")


def backend_info() -> dict[str, dict[str, str]]:
    """Which kernel serves each operator, and why: {operator: {"cpu": …, "cuda": …}}."""
    cpu = f"PyTorch reference ({_cpu_reason})"
    if not _cpu_reason:
        cpu = "C++"
        if hasattr(torch.ops.dqw_cpu, "instruction_set"):
            cpu += f", {torch.ops.dqw_cpu.instruction_set()}"
    return {name: {"cpu": cpu, "cuda": ops_cuda.kernel_of(name)} for name in _SCHEMAS}


fake_quant = torch.ops.dqw.fake_quant.default
fake_quant_backward = torch.ops.dqw.fake_quant_backward.default
fake_quant_clip = torch.ops.dqw.fake_quant_clip.default
fake_quant_clip_backward = torch.ops.dqw.fake_quant_clip_backward.default
fake_quant_clips = torch.ops.dqw.fake_quant_clips.default
fake_quant_clips_backward = torch.ops.dqw.fake_quant_clips_backward.default
fake_quant_activation = torch.ops.dqw.fake_quant_activation.default
round_columns = torch.ops.dqw.round_columns.default
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
