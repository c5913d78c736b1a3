"""Whether the native networks of ``dqw.whisper.fast``, or a GPU's, serve a model; why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dqw import ops, ops_cuda
from dqw.conv import QuantConv1d
from dqw.embedding import QuantEmbedding, TiedProjection
from dqw.grids import level_max
from dqw.linear import QuantLinear, QuantModule

# What the graphs of a GPU call; a subclass might do what can't be captured.
_KNOWN = (nn.Linear, nn.Conv1d, nn.Embedding, QuantLinear, QuantConv1d, QuantEmbedding)
_KNOWN += (TiedProjection,)  # type: ignore[assignment]

_DEVICES = ("cpu", "meta")  # meta: a folder that is looked at, not loaded
_SELF = ("q_proj", "k_proj", "v_proj", "out_proj")
# Modules whose hooks need no call: transformers' recorder stays where hidden states were asked for
# once, and calls that ask run plainly; ``narrowed`` has the positions cut, as the networks do it;
# ``lowered`` has float layers round what they are given.
_IDLE = ("transformers.utils.output_capturing", "dqw.whisper.context", "dqw.devices")


def uncovered(model: Any) -> str:
    """Why the native decoder does not serve ``model``, or "" if it does."""
    if not hasattr(model, "proj_out") or not hasattr(model, "generation_config"):
        return "it is no Whisper that generates"
    if not isinstance(model.proj_out, TiedProjection):
        return "its vocabulary is not packed"
    if any(has_hooks(outer) for outer in (model, model.model, model.proj_out)):
        return "it has hooks, and the networks call no module"
    decoder = model.model.decoder
    named = [*linears(decoder), ("embed_tokens", decoder.embed_tokens)]
    return _reason(decoder, named, model.config.decoder_attention_heads)


def encoder_uncovered(encoder: Any) -> str:
    """Why the native encoder does not serve ``encoder``, or "" if it does."""
    convolutions = [(name, getattr(encoder, name)) for name in ("conv1", "conv2")]
    for name, conv in convolutions:
        shape = tuple(getattr(conv, part, None) for part in ("kernel_size", "stride", "padding"))
        if shape != ((3,), (1 if name == "conv1" else 2,), (1,)):
            return f"{name} is not Whisper's"
    named = [*linears(encoder), *convolutions]
    return _reason(encoder, named, encoder.config.encoder_attention_heads)


def gpu_uncovered(model: Any) -> str:
    """Why the graphs do not serve ``model``, or "" if they do."""
    config, tensors = model.config, [*model.parameters(), *model.buffers()]
    if len({t.device for t in tensors}) != 1:
        return "it is spread over several devices"
    if tensors[0].is_cuda and ops_cuda.reason:
        return ops_cuda.reason
    if config.activation_function != "gelu" or config.scale_embedding:
        return "its activation function or scaled embedding is not Whisper's"
    if config.d_model // config.decoder_attention_heads > 256:
        return "its heads are more than 256 wide"
    for name, module in model.named_modules():
        if module.training or has_hooks(module):
            return f"{name or 'it'} is in training mode or has hooks, and a graph calls none"
        if "forward" in vars(module) or hasattr(module, "_hf_hook"):
            return f"{name or 'it'} has a forward of its own, and a graph may not call it"
        if isinstance(module, QuantModule) and not module.frozen:
            return f"{name} is not packed yet"
    encoder, decoder = model.model.encoder, model.model.decoder
    parts = [*linears(encoder), *linears(decoder), ("proj_out", model.proj_out)]
    parts += [("conv1", encoder.conv1), ("conv2", encoder.conv2)]
    parts += [("embed_tokens", decoder.embed_tokens)]
    for name, module in parts:
        if type(module) not in _KNOWN:
            return f"its {name} is a {type(module).__name__}, which a graph may not take"
    return ""


def coverage(config: dict[str, Any]) -> dict[str, str]:
    """Who serves a folder with this config.json on a CPU: {"encoder": …, "decoder": …}."""
    stored = config.get("quantization_config") or {}
    if not stored.get("plan"):
        return dict.fromkeys(("encoder", "decoder"), "plain: the folder is not packed")

    from dqw.whisper.native import skeleton

    model: Any = skeleton(config)
    reasons = {"encoder": encoder_uncovered(model.model.encoder), "decoder": uncovered(model)}
    return {name: f"plain: {why}" if why else "native" for name, why in reasons.items()}


def _reason(part: nn.Module, named: list[tuple[str, Any]], heads: int) -> str:
    config: Any = part.config
    if not hasattr(torch.ops.dqw_cpu, "decoder_step"):
        return "the C++ library is not loaded"
    # A row of 512 -> 512 at a time takes 0.5 ms, of which the encoder has 1500; torch's product
    # behind ``quant_linear`` 14 for all (csrc/cpu/quant_linear_scalar.cpp).
    if ops.plain_cpp:
        return "it would run in plain C++, where torch's products of many rows are faster"
    if part.training:
        return "it is in training mode"
    if config.activation_function != "gelu" or config.scale_embedding:
        return "its activation function or scaled embedding is not Whisper's"
    if config.d_model % heads or config.d_model // heads % 16 or config.d_model // heads > 256:
        return "its heads are not 16, 32, … 256 wide"
    if any(has_hooks(module) for module in part.modules()):
        return "a layer has hooks, and the networks call no module"
    for name, module in named:
        reason = _unfit(module)
        if reason:
            return f"its {name} {reason}"
    for name, module in part.named_modules():
        if name.endswith("norm") and not _is_whispers_norm(module):
            return f"its {name} is not Whisper's"
    rest = part.parameters()
    if any(p.dtype != torch.float32 or p.device.type not in _DEVICES for p in rest):
        return "its float tensors are not float32 on the CPU"
    return ""


def _is_whispers_norm(module: nn.Module) -> bool:
    plain = type(module) is nn.LayerNorm and module.eps == 1e-5
    return plain and module.weight is not None and module.bias is not None


def _unfit(module: nn.Module) -> str:
    if not isinstance(module, QuantModule) or not module.frozen:
        return "is not packed"
    if module.group_size % 16 or module.cols > 65536:
        return "has groups or rows that the kernels do not take"
    if not is_int8(module) and level_max(module.spec.grid, module.spec.bits) > 127:
        return "has levels beyond 8 bits"
    if module.weight.device.type not in _DEVICES:
        return "is not on the CPU"
    return ""


def is_int8(module: QuantModule) -> bool:
    """Whether ``module`` multiplies int8 activations; convolutions take floats at any spec."""
    return module.spec.activations == "int8" and not isinstance(module, QuantConv1d)


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to see what ``module`` takes or gives."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") not in _IDLE for hook in hooks)


def linears(part: Any) -> list[tuple[str, Any]]:
    """The matrices of a decoder or encoder in the order of its network."""
    found: list[tuple[str, Any]] = []
    for i, layer in enumerate(part.layers):
        names = [f"self_attn.{name}" for name in _SELF]
        if hasattr(layer, "encoder_attn"):
            names += [f"encoder_attn.{name}" for name in _SELF]
        found += [
            (f"layers.{i}.{name}", layer.get_submodule(name)) for name in (*names, "fc1", "fc2")
        ]
    return found
