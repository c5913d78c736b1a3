"""What dqw is measured against: PyTorch's own float, int8 and fake-quantization operators."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]


def linear_float32(x: Tensor, w: Tensor) -> Call:
    return lambda: F.linear(x, w)


def linear_bfloat16(x: Tensor, w: Tensor) -> Call:
    xb, wb = x.bfloat16(), w.bfloat16()
    return lambda: F.linear(xb, wb)


def linear_dynamic_int8(x: Tensor, w: Tensor) -> Call:
    """``torch.ao`` dynamic quantization: int8 weights per channel, activations per tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scales = w.abs().amax(1).double() / 127
        zeros = torch.zeros(len(w), dtype=torch.long)
        qw = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(qw, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, True)


def linear_int8pack(x: Tensor, w: Tensor) -> Call:
    """``torch._weight_int8pack_mm``: int8 weights per channel, bfloat16 activations."""
    scales = w.abs().amax(1) / 127
    qw = torch.round(w / scales[:, None]).to(torch.int8)
    xb, sb = x.bfloat16(), scales.bfloat16()
    return lambda: torch._weight_int8pack_mm(xb, qw, sb)


LINEAR: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "F.linear float32": linear_float32,
    "F.linear bfloat16": linear_bfloat16,
    "dynamic int8": linear_dynamic_int8,
    "int8pack bfloat16": linear_int8pack,
}


def per_channel_affine(x: Tensor, scale: Tensor, level_max: int) -> Tensor:
    zeros = torch.zeros(len(x), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(
        x, scale.detach().flatten(), zeros, 0, -level_max, level_max
    )


def learnable_per_channel_affine(x: Tensor, scale: Tensor, level_max: int) -> Tensor:
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale.flatten(), torch.zeros(len(x)), 0, -level_max, level_max, 1.0
    )


def argmin_over_levels(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The usual eager APoT quantizer: nearest of all levels by argmin, straight-through by hand."""
    u = (x / scale).clamp(-levels[-1], levels[-1])
    magnitude = levels[(u.detach().abs().unsqueeze(-1) - levels).abs().argmin(-1)]
    rounded = magnitude * u.detach().sign()
    return ((rounded - u).detach() + u) * scale
