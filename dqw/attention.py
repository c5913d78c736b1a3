"""Attention of Whispers that run layer by layer, on dqw's own kernel where it beats torch's:
without gradients, in bfloat16, on a CPU that multiplies it in hardware. 8 heads of 1500 positions
take 13 ms on two cores of a Zen 4, in torch 30 (``python -m bench.attention``)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention

from dqw import ops  # noqa: F401 (loads the kernels)

NAME = "dqw"  # among transformers' attention functions
_native: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()  # attention → configs


@contextmanager
def native_attention(*models: Any) -> Iterator[None]:
    """Within the block attention of the encoders, and of the decoders to them, is the kernel's
    where that serves; elsewhere torch's, as before. Models on a GPU, and those that do not run
    torch's attention, stay as they are. Not for two threads at once on one model."""
    found: list[tuple[Any, Any]] = [
        (module, module.config)
        for model in models
        for module in model.modules()
        if isinstance(module, WhisperAttention) and not module.is_causal and _may_serve(module)
    ]
    for module, _ in found:
        module.config = _config_of(module)
    try:
        yield
    finally:
        for module, config in found:
            module.config = config


def _may_serve(module: Any) -> bool:
    on_cpu = all(t.device.type == "cpu" for t in (*module.parameters(), *module.buffers()))
    implementation = getattr(module.config, "_attn_implementation", None)
    return on_cpu and implementation == "sdpa" and hasattr(torch.ops.dqw_cpu, "attention")


def _config_of(module: Any) -> Any:
    """Its own copy, always the same one: the stack's would change what masks are made for the
    decoder's tokens, and a new one would have a compiled model compiled again."""
    before, made = _native.get(module, (None, None))
    if before is not module.config:
        made = copy.copy(module.config)
        made._attn_implementation = NAME
        _native[module] = module.config, made
    return made


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers asks of an attention function: query (batch, heads, queries, head_dim), key
    and value (batch, heads, positions, head_dim) → (batch, queries, heads, head_dim), no weights.
    """
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    every = attention_mask is None and not (causal and query.shape[2] > 1)
    if every and _serves(query, key, value) and not given.get("dropout"):
        scaling = given.get("scaling")
        q = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        found = torch.ops.dqw_cpu.attention(q, key, value, True)
        return found.to(query.dtype).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def _serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[:2] == key.shape[:2]
        and query.shape[-1] % 16 == 0
        and query.shape[-1] <= 256
        and key.shape[2] > 0
        and not learns
        and not torch.compiler.is_compiling()
        and torch.ops.dqw_cpu.instruction_set() in ("avx512_bf16", "amx")
    )


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
