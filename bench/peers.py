"""What dqw is measured against: PyTorch's own operators, and those of other packages.

A peer is a name, the package it needs, and a function that gives a call with weights of its own.
A peer that cannot serve a problem raises ``Unfit`` with the reason. Peers of other packages are in
bench/packages.py.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import calls, cuda, packages
from bench.calls import Builder, fake_quant_call
from bench.packages import Unfit
from bench.rows import Problem
from bench.timing import Call

Data = tuple[Tensor, Tensor]  # x (M, K), w (N, K); float32


@dataclass(frozen=True)
class Peer:
    """``build(problem, data)`` → (builder of calls, bytes of one call's weights).

    ``not_cold``: why copies of its weights would measure something else; empty if they do not.
    ``waits``: on a GPU, for a value of a tensor, so that no CUDA graph holds it.
    """

    name: str
    build: Callable[[Problem, Data], tuple[Builder, int]]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    not_cold: str = ""
    waits: bool = False

    def missing(self) -> str:
        """Why this peer is skipped everywhere here; empty if it is not."""
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else ""


# ---- linear ----


def linear_float(dtype: torch.dtype) -> Callable[[Problem, Data], tuple[Builder, int]]:
    def build(p: Problem, data: Data) -> tuple[Builder, int]:
        x, w = (t.to(dtype) for t in data)

        def make() -> Call:
            own = w.clone()
            return lambda: F.linear(x, own)

        return make, w.numel() * w.element_size()

    return build


def linear_dynamic_int8(p: Problem, data: Data) -> tuple[Builder, int]:
    """``torch.ao`` dynamic quantization: int8 weights per channel, activations per tensor."""
    x, w = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scales = (w.abs().amax(1).double() / 127).clamp(min=1e-9)
        qw = torch.quantize_per_channel(
            w, scales, torch.zeros(p.N, dtype=torch.long), 0, torch.qint8
        )

    def make() -> Call:
        packed = torch.ops.quantized.linear_prepack(qw, None)
        return lambda: torch.ops.quantized.linear_dynamic(x, packed, True)

    return make, p.N * p.K


def linear_int8pack(p: Problem, data: Data) -> tuple[Builder, int]:
    """int8 weights per channel, bfloat16 activations."""
    x, w = data
    scales = w.abs().amax(1) / 127
    qw = torch.round(w / scales[:, None]).to(torch.int8)
    xb, sb = x.bfloat16(), scales.bfloat16()

    def make() -> Call:
        own = qw.clone()
        return lambda: torch._weight_int8pack_mm(xb, own, sb)

    return make, p.N * p.K


def linear_int4pack(p: Problem, data: Data) -> tuple[Builder, int]:
    """4 bit weights in groups of 64, bfloat16 activations."""
    x, w = data
    group = 64
    if p.K % group or p.N % 16:
        raise Unfit("wants K divisible by 64 and N by 16")
    parts = w.view(p.N, -1, group)
    scale = parts.abs().amax(-1).clamp(min=1e-9) / 7
    codes = (torch.round(parts / scale[..., None]) + 8).clamp(0, 15).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.view(p.N, p.K), 1)
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
    sb, xb = scales.contiguous().bfloat16(), x.bfloat16()

    def make() -> Call:
        own = packed.clone()
        return lambda: torch._weight_int4pack_mm_for_cpu(xb, own, group, sb)

    return make, p.N * p.K // 2 + sb.numel() * 2


# ---- fake quantization ----


def fake_quantizer(
    function: Callable[[Tensor, Tensor, Tensor, int], Tensor], forward_only: bool = False
) -> Callable[[Problem, Data], tuple[Builder, int]]:
    """A peer from ``function(x, scale, zero points, level_max)`` on a uniform grid."""

    def build(p: Problem, data: Data) -> tuple[Builder, int]:
        if forward_only and p.variant != "forward":
            raise Unfit("learns no scale")
        if p.dtype != "float32":
            raise Unfit("is compared in float32")
        top = 2 ** (p.bits - 1) - 1

        def make() -> Call:
            # A buffer, as torch's own modules keep it. The first takes integers on a CPU; they are
            # checked, by their values, and a GPU would be waited for.
            dtype = torch.int32 if forward_only and p.device == "cpu" else torch.float32
            zeros = torch.zeros(p.N, dtype=dtype, device=p.device)
            return fake_quant_call(p, top, lambda x, s: function(x, s, zeros, top))[0]

        return make, 4 * p.N * p.K

    return build


def per_channel_affine(x: Tensor, scale: Tensor, zeros: Tensor, top: int) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, scale.detach().flatten(), zeros, 0, -top, top)


def learnable_per_channel_affine(x: Tensor, scale: Tensor, zeros: Tensor, top: int) -> Tensor:
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale.flatten(), zeros, 0, -top, top, 1.0
    )


def argmin(p: Problem, data: Data) -> tuple[Builder, int]:
    """The usual eager quantizer for the same grid: nearest of all levels by argmin."""
    from dqw import grids

    levels = torch.tensor(grids.magnitudes(p.grid, p.bits), device=p.device).float()
    if p.N * p.K * len(levels) > 2**29:
        raise Unfit("takes over 2 GiB of temporaries")

    def function(x: Tensor, scale: Tensor) -> Tensor:
        return argmin_over_levels(x, scale, levels)

    def make() -> Call:
        return fake_quant_call(p, int(levels[-1]), function)[0]

    return make, 4 * p.N * p.K


def argmin_over_levels(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Straight-through by hand."""
    levels, scale = levels.to(x.dtype), scale.to(x.dtype)
    u = (x / scale).clamp(-levels[-1], levels[-1])
    magnitude = levels[(u.detach().abs().unsqueeze(-1) - levels).abs().argmin(-1)]
    rounded = magnitude * u.detach().sign()
    return ((rounded - u).detach() + u) * scale


# ---- embedding ----


def embedding_float(dtype: torch.dtype) -> Callable[[Problem, Data], tuple[Builder, int]]:
    def build(p: Problem, data: Data) -> tuple[Builder, int]:
        table = torch.randn(p.N, p.K, device=p.device).to(dtype)

        def make(many: int = 1) -> Call:
            own = table.clone() if many > 1 else table
            turns = calls.tokens(p, many)

            def call() -> object:
                return F.embedding(next(turns), own)

            call.turns = many  # type: ignore[attr-defined]
            return call

        touched = p.M * p.K * table.element_size()
        make.cold = partial(make, calls.cold_calls(touched))  # type: ignore[attr-defined]
        return make, calls.size(table)

    return build


BOTH = ("cpu", "cuda")
PEERS: dict[str, tuple[Peer, ...]] = {
    "quant_linear": (
        Peer("torch-float32", linear_float(torch.float32), devices=BOTH),
        Peer("torch-float16", linear_float(torch.float16), devices=("cuda",)),
        Peer("torch-bfloat16", linear_float(torch.bfloat16), devices=BOTH),
        Peer("torch-tinygemm", cuda.tinygemm, devices=("cuda",)),
        Peer("bitsandbytes-nf4", cuda.bitsandbytes_nf4, ("bitsandbytes",), devices=("cuda",)),
        Peer("gemlite", cuda.gemlite_int4, ("gemlite",), devices=("cuda",)),
        Peer("torch-dynamic-int8", linear_dynamic_int8),
        Peer("torch-int8pack", linear_int8pack),
        Peer("torch-int4pack", linear_int4pack),
        Peer("torchao", packages.torchao_linear, ("torchao",)),
        Peer("onnxruntime", packages.onnxruntime_linear, ("onnxruntime", "onnx")),
        Peer(
            "openvino",
            packages.openvino_linear,
            ("openvino",),
            not_cold="has threads of its own for each copy of the weights, and they oversleep",
        ),
    ),
    "fake_quant": (
        Peer("torch-per-channel", fake_quantizer(per_channel_affine, True), devices=BOTH),
        Peer(
            "torch-learnable",
            fake_quantizer(learnable_per_channel_affine),
            devices=BOTH,
            waits=True,
        ),
        Peer("torchao", packages.torchao_fake_quant, ("torchao",)),
        Peer("argmin", argmin, devices=BOTH),
    ),
    "embedding": (
        Peer("torch-float32", embedding_float(torch.float32), devices=BOTH),
        Peer("torch-float16", embedding_float(torch.float16), devices=BOTH),
    ),
    "train_step": (),  # bench/train_step.py has its own: whole models
}
TRAIN_STEP_PEERS = ("torch-float32",)


def names() -> tuple[str, ...]:
    """All peers, each once, in the order of the tables."""
    found = [peer.name for group in PEERS.values() for peer in group]
    return tuple(dict.fromkeys([*found, *TRAIN_STEP_PEERS]))
