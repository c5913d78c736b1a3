"""A packed Whisper on the CPU as two native networks: its encoder, and its decoder a step at a time.

``fast_part(model)`` gives the networks of a model that they cover, made once and again when its
layers change; ``uncovered(model)`` says in words why a model is not covered. Weights are not
copied: the networks read the model's own tensors.

``Session`` decodes: rows of tokens in, logits out, with keys and values in a cache of its own. It
also stands in for transformers' cache, so ``generate`` drives it as any other (``fast_model``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqw import ops
from dqw.embedding import QuantEmbedding, TiedProjection
from dqw.linear import QuantLinear, QuantModule

CROSS_TYPES = ("int8", "bfloat16", "float32")
"""How the decoder's keys and values of the audio are kept: at one, two or four bytes a number.

int8 (a scale for each position and head) reads half of what bfloat16 does; both are read once a
token, and at whisper-base's width they weigh as much as its 4-bit weights.
"""

_SELF = ("q_proj", "k_proj", "v_proj", "out_proj")


def uncovered(model: Any) -> str:
    """Why the native networks do not serve ``model``, or "" if they do."""
    if not hasattr(torch.ops.dqw_cpu, "decoder_step"):
        return "the C++ library is not loaded"
    config = model.config
    if config.model_type != "whisper" or not hasattr(model, "proj_out"):
        return "it is no Whisper that generates"
    if model.training:
        return "it is in training mode"
    if config.activation_function != "gelu" or config.scale_embedding:
        return "its activation function or scaled embedding is not Whisper's"
    for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
        if config.d_model % heads or config.d_model // heads % 16 or config.d_model // heads > 256:
            return "its heads are not 16, 32, … 256 wide"
    decoder = model.model.decoder
    if not isinstance(model.proj_out, TiedProjection):
        return "its vocabulary is not packed"
    for name, module in (*_linears(decoder), ("embed_tokens", decoder.embed_tokens)):
        reason = _unfit(module)
        if reason:
            return f"the decoder's {name} {reason}"
    rest = [p for p in decoder.parameters() if p.is_floating_point()]
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in rest):
        return "its float tensors are not float32 on the CPU"
    return ""


def _unfit(module: nn.Module) -> str:
    if not isinstance(module, QuantLinear | QuantEmbedding) or not module.frozen:
        return "is not packed"
    if module.group_size % 32 or module.cols > 65536:
        return "has groups or rows that the kernels do not take"
    if module.spec.activations != "int8" and int(module.levels.abs().max()) > 128:
        return "has levels beyond 8 bits"
    if module.weight.device.type != "cpu":
        return "is not on the CPU"
    return ""


def _linears(part: nn.Module) -> list[tuple[str, Any]]:
    """The matrices of a decoder or encoder in the order of its network."""
    found: list[tuple[str, Any]] = []
    for i, layer in enumerate(part.layers):  # type: ignore[arg-type, var-annotated]
        names = [f"self_attn.{name}" for name in _SELF]
        if hasattr(layer, "encoder_attn"):
            names += [f"encoder_attn.{name}" for name in _SELF]
        found += [
            (f"layers.{i}.{name}", layer.get_submodule(name)) for name in (*names, "fc1", "fc2")
        ]
    return found


class Network:
    """A native network; freed with this object."""

    def __init__(
        self, floats: Sequence[Tensor], packed: Sequence[QuantModule], heads: int, layers: int,
        width: int,
    ) -> None:  # fmt: skip
        tensors, layout = list[Tensor](), list[int]()
        for module in packed:
            bias = module.bias if isinstance(module, QuantLinear) else None
            tensors += [module.weight, module.scale, module.levels]
            tensors.append(torch.empty(0) if bias is None else bias.detach())
            layout += [module.rows, module.cols, module.spec.bits, module.group_size]
            layout.append(int(module.spec.activations == "int8"))
        plain = [t.detach() for t in floats]
        self.handle: int = torch.ops.dqw_cpu.network_new(
            plain, tensors, layout, heads, layers, width
        )
        weakref.finalize(self, torch.ops.dqw_cpu.network_free, self.handle)


def _norms(layer: Any) -> list[Tensor]:
    norms = [layer.self_attn_layer_norm]
    if hasattr(layer, "encoder_attn"):
        norms.append(layer.encoder_attn_layer_norm)
    return [t for norm in (*norms, layer.final_layer_norm) for t in (norm.weight, norm.bias)]


class FastPart:
    """The native networks of one model."""

    def __init__(self, model: Any) -> None:
        config, decoder = model.config, model.model.decoder
        self.vocabulary: int = config.vocab_size
        self.layers: int = config.decoder_layers
        self.width: int = config.d_model
        self.positions: int = config.max_target_positions
        modules = [module for _, module in _linears(decoder)]
        int8 = all(module.spec.activations == "int8" for module in modules)
        self.cross_type = "int8" if int8 else "bfloat16"
        floats = [t for layer in decoder.layers for t in _norms(layer)]
        floats += [decoder.layer_norm.weight, decoder.layer_norm.bias]
        floats.append(decoder.embed_positions.weight)
        self.decoder = Network(
            floats, [*modules, decoder.embed_tokens], config.decoder_attention_heads, self.layers,
            self.width,
        )  # fmt: skip


_parts: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, FastPart]] = weakref.WeakKeyDictionary()


def fast_part(model: Any) -> FastPart | None:
    """The native networks of ``model``; None where it is not covered."""
    key = _identity(model)
    known = _parts.get(model)
    if known is not None and known[0] == key:
        return known[1]
    if uncovered(model):
        return None
    part = FastPart(model)
    _parts[model] = key, part
    return part


def _identity(model: nn.Module) -> tuple:
    """Changes when a layer, its memory or its activations do."""
    found: list[Any] = [model.training]
    for module in model.modules():
        if isinstance(module, QuantModule):
            found += [module.weight.data_ptr(), module.spec.activations]
        else:
            found += [p.data_ptr() for p in module.parameters(recurse=False)]
    return tuple(found)


class Session:
    """Sequences being decoded, ``per_clip`` of them for each clip (beams).

    states: the encoder's (clips, positions, width) float32. longest: tokens a sequence may have.
    """

    is_compileable = False
    is_sliding = (False,)

    def __init__(
        self, part: FastPart, states: Tensor, longest: int, per_clip: int = 1,
        cross_type: str | None = None,
    ) -> None:  # fmt: skip
        self.part = part
        self.audio = states.shape[1]
        self.type = CROSS_TYPES.index(cross_type or part.cross_type)
        self.cross = torch.ops.dqw_cpu.decoder_cross(part.decoder.handle, states.float(), self.type)
        count = states.shape[0] * per_clip
        self.longest = min(longest, part.positions)
        self.cache = torch.empty(part.layers, 2, count, self.longest, part.width)
        rows = torch.arange(count, dtype=torch.int32)
        self.slots = rows  # of the cache, one for each sequence
        self.clips = rows // per_clip
        # sources[i, t]: the slot that holds token t of sequence i
        self.sources = rows[:, None].repeat(1, self.longest)
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """ids (sequences, new tokens) int64 → logits (sequences, vocabulary) of the last ones."""
        count, new = ids.shape
        at = torch.arange(self.length, self.length + new, dtype=torch.int32)
        if new == 1:
            positions, clips, sources, wanted = at.expand(count), self.clips, self.sources, None
        else:
            positions = at.repeat(count)
            clips = self.clips.repeat_interleave(new)
            sources = self.sources.repeat_interleave(new, dim=0)
            wanted = torch.arange(new - 1, count * new, new, dtype=torch.int32)
        if wanted is None:
            wanted = torch.arange(count, dtype=torch.int32)
        logits = torch.ops.dqw_cpu.decoder_step(
            self.part.decoder.handle, ids.flatten().contiguous(), positions.contiguous(), clips, sources,
            self.cache, self.cross, self.audio, self.type, wanted,
        )  # fmt: skip
        self.length += new
        return logits

    def keep(self, rows: Tensor) -> None:
        """Only the sequences ``rows`` go on, in this order; each at most once."""
        self.clips, self.sources = self.clips[rows], self.sources[rows]
        self.slots = self.slots[rows]

    # ---- as transformers' cache ----

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def reorder_cache(self, beams: Tensor) -> None:
        """Sequence i goes on as sequence beams[i] did; what is written from now on is its own."""
        self.sources = self.sources[beams]
        self.sources[:, self.length :] = self.slots[:, None]
