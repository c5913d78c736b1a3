"""A packed Whisper on the CPU as two native networks: encoder, and decoder a step at a time.

``fast_decoder(model)`` and ``fast_encoder(model.model.encoder)`` give the networks of what they
cover (``coverage`` says why something is not), made once and again when layers change. Weights are
not copied: the networks read the model's own tensors.

``Session`` decodes: rows of tokens in, logits out, with keys and values in a cache of its own. It
also stands in for transformers' cache, so ``generate`` drives it as any other (``fast_model``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dqw.ops  # noqa: F401  loads the library
from dqw.linear import QuantModule
from dqw.whisper.coverage import encoder_uncovered, has_hooks, is_int8, linears, uncovered
from dqw.whisper.decoding import Rules

CROSS_TYPES = ("int8", "bfloat16", "float32")
"""How the decoder's keys and values of the audio are kept: at one, two or four bytes a number.

int8 (a scale for each position and head) reads half of what bfloat16 does; both are read once a
token, and at whisper-base's width they weigh as much as its 4-bit weights.
"""


class Network:
    """A native network; freed with this object."""

    def __init__(self, part: Any, packed: Sequence[QuantModule], heads: int) -> None:
        """part: the decoder or encoder, whose matrices (and what else is packed) are ``packed``."""
        floats = [t for layer in part.layers for t in _norms(layer)]
        floats += [part.layer_norm.weight, part.layer_norm.bias, part.embed_positions.weight]
        tensors, layout = list[Tensor](), list[int]()
        for module in packed:
            bias = getattr(module, "bias", None)
            tensors += [module.weight, module.scale, module.levels]
            tensors.append(torch.empty(0) if bias is None else bias.detach())
            layout += [module.rows, module.cols, module.spec.bits, module.group_size]
            layout.append(int(is_int8(module)))
        self.heads, self.layers, self.width = heads, len(part.layers), int(part.config.d_model)
        self.last_rows = packed[-1].rows
        self.handle: int = torch.ops.dqw_cpu.network_new(
            [t.detach() for t in floats], tensors, layout, heads, self.layers, self.width
        )
        _networks[self.handle] = self
        weakref.finalize(self, torch.ops.dqw_cpu.network_free, self.handle)


_networks: weakref.WeakValueDictionary[int, Network] = weakref.WeakValueDictionary()


def _register_shapes() -> None:
    """What the operators return, without data (torch.compile and opcheck ask)."""

    def encoder(network: int, features: Tensor, bf16: bool = False) -> Tensor:
        clips, _, frames = features.shape
        return features.new_empty(clips, frames // 2, _networks[network].width, dtype=torch.float32)

    def decoder_cross(network: int, states: Tensor, type: int, bf16: bool = False) -> Tensor:
        net, padded = _networks[network], -(-states.shape[1] // 16) * 16
        width = net.width // net.heads
        size = 2 * padded * (width + 4 if type == 0 else width * 2 * type)
        shape = (states.shape[0], net.layers, net.heads, size)
        return states.new_empty(shape, dtype=torch.uint8)

    def decoder_step(
        network: int, ids: Tensor, positions: Tensor, clips: Tensor, sources: Tensor,
        cache: Tensor, cross: Tensor, audio: int, type: int, wanted: Tensor,
    ) -> Tensor:  # fmt: skip
        return cache.new_empty(wanted.numel(), _networks[network].last_rows)

    for function in (encoder, decoder_cross, decoder_step):
        torch.library.register_fake(f"dqw_cpu::{function.__name__}", function)


if hasattr(torch.ops.dqw_cpu, "decoder_step"):
    _register_shapes()


def _norms(layer: Any) -> list[Tensor]:
    norms = [layer.self_attn_layer_norm]
    if hasattr(layer, "encoder_attn"):
        norms.append(layer.encoder_attn_layer_norm)
    return [t for norm in (*norms, layer.final_layer_norm) for t in (norm.weight, norm.bias)]


class FastEncoder:
    """The native encoder: features (clips, mels, frames) → states (clips, frames / 2, width).

    bf16: products may be of bfloat16, with float32 sums, where the machine is faster so
    (``takes_bf16`` in csrc/cpu/network.h).
    """

    def __init__(self, encoder: Any) -> None:
        packed = [module for _, module in linears(encoder)] + [encoder.conv1, encoder.conv2]
        self.network = Network(encoder, packed, encoder.config.encoder_attention_heads)

    def __call__(self, features: Tensor, bf16: bool = False) -> Tensor:
        return torch.ops.dqw_cpu.encoder(self.network.handle, features, bf16)


class FastDecoder:
    """The native decoder; ``Session`` runs it. cross_type: of ``CROSS_TYPES``, the default."""

    def __init__(self, model: Any) -> None:
        config, decoder = model.config, model.model.decoder
        self.layers: int = config.decoder_layers
        self.width: int = config.d_model
        self.positions: int = config.max_target_positions
        modules = [module for _, module in linears(decoder)]
        int8 = all(module.spec.activations == "int8" for module in modules)
        self.cross_type = "int8" if int8 else "bfloat16"
        packed = [*modules, decoder.embed_tokens]
        self.network = Network(decoder, packed, config.decoder_attention_heads)
        self._last: tuple[weakref.ref, tuple[int, bool, int], Tensor] | None = None

    def cross(
        self, states: Tensor, cross_type: int, bf16: bool = False, again: bool = False
    ) -> Tensor:
        """The keys and values of the encoder's ``states``.

        again: the next call asks for the same (decoding, after the language was detected) and gets
        these, unless the states died or were written to."""
        last, self._last = self._last, None
        version = 0 if states.is_inference() else states._version
        asked = cross_type, bf16, version
        if last is None or last[0]() is not states or last[1] != asked:
            made = torch.ops.dqw_cpu.decoder_cross(self.network.handle, states, cross_type, bf16)
            last = weakref.ref(states, self._forget), asked, made
        if again:
            self._last = last
        return last[2]

    def session(self, states: Tensor, longest: int, bf16: bool = False) -> Session:
        """The decoder a step at a time, for a loop that chooses the tokens itself."""
        return Session(self, states, longest, bf16=bf16)

    def greedy(self, states: Tensor, prompt: Tensor, rules: Rules) -> Tensor:
        """The likeliest tokens (clips, tokens) for the encoder's ``states``, behind ``prompt``
        (clips, begin); behind the end of a sequence stands ``rules.end``."""
        from dqw.whisper.fast_greedy import Stop, greedy

        stop = Stop(rules.longest, (rules.end,))
        decoded = greedy(self, states, prompt, rules.processors(), stop, pad=rules.end, bf16=True)
        return decoded.ids

    def _forget(self, dead: weakref.ref) -> None:
        if self._last is not None and self._last[0] is dead:
            self._last = None


_made: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = weakref.WeakKeyDictionary()


def fast_decoder(model: Any) -> FastDecoder | None:
    """The native decoder of ``model``; None where it is not covered."""
    return _remembered(model, uncovered, FastDecoder)


def fast_encoder(encoder: Any) -> FastEncoder | None:
    """The native form of a model's encoder; None where it is not covered."""
    return _remembered(encoder, encoder_uncovered, FastEncoder)


def _remembered(module: Any, reason: Callable[[Any], str], make: Callable[[Any], Any]) -> Any:
    if torch.compiler.is_compiling():
        return None  # the plain modules are what can be traced
    key = identity(module)
    known = _made.get(module)
    if known is None or known[0] != key:
        here = all(t.is_cpu for t in (*module.parameters(), *module.buffers()))
        known = _made[module] = key, make(module) if here and not reason(module) else None
    return known[1]


def identity(module: nn.Module) -> tuple:
    """Changes when a layer, its memory, its activations or whether it has hooks do."""
    found: list[Any] = [module.training]
    for part in module.modules():
        if isinstance(part, QuantModule):
            found.append(part.spec.activations)
        tensors = (*part._parameters.values(), *part._buffers.values())
        found += [None if t is None else (t.data_ptr(), t.dtype, t.device) for t in tensors]
        # Networks hold copies of small integers, levels and the first byte of scales.
        found += [t._version for t in tensors if t is not None and _is_copied(t)]
        found.append(has_hooks(part))
    return tuple(found)


def _is_copied(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int16, torch.uint8) and not tensor.is_inference()


class Session:
    """Sequences being decoded, ``per_clip`` of them for each clip (beams).

    states: the encoder's (clips, positions, width) float32. longest: tokens a sequence may have.
    bf16: keys and values of the audio may be products of bfloat16, as in ``FastEncoder``.
    """

    # what generate asks a cache
    is_compileable = False
    is_linear = (False,)
    is_sliding = (False,)

    def __init__(
        self, decoder: FastDecoder, states: Tensor, longest: int, per_clip: int = 1,
        cross_type: str | None = None, bf16: bool = False,
    ) -> None:  # fmt: skip
        self.audio = states.shape[1]
        self.type = CROSS_TYPES.index(cross_type or decoder.cross_type)
        self.network = decoder.network
        # A single token: what is spoken, if anything.
        self.cross = decoder.cross(states, self.type, bf16, again=longest == 1)
        count = states.shape[0] * per_clip
        self.longest = min(longest, decoder.positions)
        self.cache = torch.empty(decoder.layers, 2, count, self.longest, decoder.width)
        rows = torch.arange(count, dtype=torch.int32)
        self.slots = rows  # of the cache, one for each sequence
        self.clips = rows // per_clip
        # sources[i, t]: the slot that holds token t of sequence i
        self.sources = rows[:, None].repeat(1, self.longest)
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """ids (sequences, new tokens) of integers → logits (sequences, vocabulary) of the last."""
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
        ids = ids.flatten().long().contiguous()
        logits = torch.ops.dqw_cpu.decoder_step(
            self.network.handle, ids, positions.contiguous(), clips, sources,
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
