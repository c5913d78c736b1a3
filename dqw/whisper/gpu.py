"""A Whisper on a GPU as CUDA graphs: the encoder, and the decoder a token at a time.

    graphs = graphs_of(model)                           or None where they do not serve
    states = graphs.encode(features)
    tokens = graphs.greedy(states, prompt, rules)

``model`` is float or packed, of transformers or ``native.skeleton``, and in any dtype. A step of
whisper-base is 70 to 82 launches that a GPU works through faster than Python starts two of them. So
they are captured once for a number of sequences and replayed: what changes from token to token (the
token, its position, the rules) lies in the GPU's memory, and the token is chosen there too. The
host looks at the tokens every ``_BURST`` steps to see whether all sequences have ended.

Packed layers multiply float activations here, unless their spec asks for int8: on a GPU those take
three launches for one, and longer. The decoder's residual stays float32 from layer to layer.

Without a GPU the same functions run one by one, on the reference of their kernels: that is how they
are tested. A lock lets one thread at a time decode. Nothing here refers back to its owner: memory
of a GPU should be free when the model or a batch is gone, not when Python next looks for cycles.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqw import ops
from dqw.errors import UserError
from dqw.linear import QuantLinear
from dqw.whisper import gpu_steps
from dqw.whisper.capture import Captures, captured
from dqw.whisper.coverage import gpu_uncovered
from dqw.whisper.decoding import Rules, is_loop
from dqw.whisper.fast import identity
from dqw.whisper.gpu_batch import Batch, Shape

_BURST = 4  # tokens between two looks: a look waits for the GPU, a token behind the end is lost
_BATCHES = 3  # numbers of sequences that are kept, with their caches and graphs
_SHARE = 1 / 3  # of the GPU's memory that their caches may take
_making = threading.Lock()  # two threads with a model's first call share its graphs


def graphs_of(model: Any) -> Graphs | None:
    """The graphs of a model of transformers on a GPU: made at the first call, and again when
    layers change; None elsewhere, and where they do not serve. They are freed with the model."""
    if not _on_gpu(model) or gpu_uncovered(model):
        model.__dict__.pop("_dqw_graphs", None)
        return None
    key = identity(model)
    with _making:
        known = model.__dict__.get("_dqw_graphs")
        if known is None or known[0] != key or known[1] is None:  # None: of a copy
            model.__dict__.pop("_dqw_graphs", None)  # its memory first
            known = model.__dict__["_dqw_graphs"] = key, Graphs(model)
        return known[1]


def _on_gpu(model: Any) -> bool:
    return model.device.type == "cuda"


class Graphs:
    """Both networks of a model that ``gpu_uncovered`` has nothing against; its weights stay where
    they are from here on. A copy, or what is unpickled, is None."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.encoder, self.decoder = model.model.encoder, model.model.decoder
        self.projection = model.proj_out
        self.encoder_heads: int = config.encoder_attention_heads
        self.positions: int = config.max_target_positions
        self.shape = Shape(
            len(self.decoder.layers), config.decoder_attention_heads, config.d_model,
            self.positions, config.max_source_positions, config.vocab_size,
        )  # fmt: skip
        self.same_levels = [_same_levels(layer.self_attn) for layer in self.decoder.layers]
        self.lock = threading.RLock()
        self._encodings = Captures()
        self._batches: OrderedDict[int, Batch] = OrderedDict()
        self._bans: tuple[tuple, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def _norm(self) -> Tensor:
        return self.decoder.layer_norm.weight

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """This thread alone, on the model's GPU, with its dtypes."""
        device = self._norm.device
        plain = torch.autocast(device.type, enabled=False)
        with self.lock, torch.inference_mode(), plain, torch.cuda.device_of(self._norm):
            yield

    def _roomy(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; where memory is too small, without what is kept for later."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self._batches.clear()
            self._encodings.clear()
        torch.cuda.empty_cache()
        try:
            return work()
        except torch.OutOfMemoryError:
            raise UserError(
                "the GPU's memory is too small for so many clips at once: give a smaller "
                "--batch-size (batch_size)."
            ) from None

    # ---- encoder ----

    def encode(self, features: Tensor) -> Tensor:
        """Features (clips, mels, frames) → states (clips, frames / 2, width), in the model's
        dtype."""
        with self.lock:  # until it is copied: another thread's call would overwrite it
            with self._at_work():
                moved = features.to(self._norm.device, self._norm.dtype)
                states = self._roomy(lambda: self._encodings(self._encoded, moved))
            return states.clone()  # out here: no inference tensor, unless the caller wants one

    def _encoded(self, features: Tensor) -> Tensor:
        e = self.encoder
        x = F.gelu(e.conv2(F.gelu(e.conv1(features)))).transpose(1, 2)
        # Contiguous, or every sum below would go along the wrong way (8 clips: 3.6 ms for 2.6).
        x = x.contiguous() + e.embed_positions.weight[: x.shape[1]]
        most = torch.finfo(x.dtype).max - 1000
        for layer in e.layers:
            own = layer.self_attn
            h = layer.self_attn_layer_norm(x)
            q, k, v = (
                p(h).unflatten(-1, (self.encoder_heads, -1)).transpose(1, 2)
                for p in (own.q_proj, own.k_proj, own.v_proj)
            )
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + own.out_proj(a)
            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
            if x.dtype == torch.float16:  # as transformers: infinity would become NaN
                x = x.clamp(-most, most)
        return e.layer_norm(x)

    # ---- decoder ----

    def greedy(self, states: Tensor, prompt: Tensor, rules: Rules) -> Tensor:
        """The tokens (clips, tokens) of the encoder's ``states`` behind ``prompt`` (clips, begin),
        on the CPU; behind the end of a sequence stands ``rules.end``."""
        with self._at_work():
            return self._roomy(lambda: self._greedy(states, prompt, rules))

    def _greedy(self, states: Tensor, prompt: Tensor, rules: Rules) -> Tensor:
        count = len(states)
        batch = self._heard(states)
        batch.start(prompt, rules, self._bans_of(rules))
        ids, length = prompt.tolist(), rules.begin
        stops: list[int | None] = [None] * count  # the length at which a sequence has ended
        self._steps(batch, rules.begin - 1)
        while length < rules.longest and None in stops:
            known, length = length, min((length // _BURST + 1) * _BURST, rules.longest)
            self._steps(batch, length - known)
            for row, new in enumerate(batch.tokens[:count, known:length].tolist()):
                if stops[row] is None:
                    stops[row] = _follow(ids[row], new, rules)
        longest = max(len(row) for row in ids)
        return torch.tensor([row + [rules.end] * (longest - len(row)) for row in ids])

    def session(self, states: Tensor, longest: int = 0, bf16: bool = False) -> GpuSession:
        """The decoder a step at a time, for a loop that chooses the tokens itself; until the next
        call of this or ``greedy``. longest: 1 where the start alone is asked for, and the next
        call decodes the same ``states``; bf16: as of ``FastDecoder``; nothing here."""
        with self._at_work():
            batch = self._roomy(lambda: self._heard(states, again=longest == 1))
            batch.start()
            return GpuSession(self, batch, len(states))

    def _heard(self, states: Tensor, again: bool = False) -> Batch:
        """A batch with the keys and values of ``states``, ready to step."""
        count = len(states)
        batch = self._batch(count)
        version = 0 if states.is_inference() else states._version
        last, batch.heard = batch.heard, None
        if last is None or last[0]() is not states or last[1] != version:
            rest = states[-1:].expand(batch.rows - count, -1, -1)
            whole = torch.cat([states, rest]) if batch.rows > count else states
            batch.hearings(lambda t: self._hear(batch.cross, t), whole)
        batch.positions = states.shape[1]
        if again:
            batch.heard = weakref.ref(states), version
        if batch.graph is None and batch.tokens.is_cuda:
            batch.graph, _ = captured(lambda: self._step(batch))
        return batch

    def _batch(self, count: int) -> Batch:
        """One of ``count`` sequences or more: a larger one of those that are there, if not by much,
        since that saves a capture and eight rows take 1.35 times the step of one."""
        least = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        fitting = [n for n in self._batches if least <= n <= 4 * least]
        if fitting:
            self._batches.move_to_end(min(fitting))
            return self._batches[min(fitting)]
        norm, s = self._norm, self.shape
        row = 2 * s.layers * (s.positions + s.audio) * s.width * norm.element_size()
        most = float("inf")
        if norm.is_cuda:
            most = _SHARE * torch.cuda.get_device_properties(norm.device).total_memory
        while self._batches and (
            len(self._batches) >= _BATCHES or row * (sum(self._batches) + least) > most
        ):
            self._batches.popitem(last=False)
        batch = self._batches[least] = Batch(norm, least, s)
        return batch

    def _bans_of(self, rules: Rules) -> Tensor:
        asked = rules.always, rules.first
        if self._bans is None or self._bans[0] != asked:
            bans = torch.zeros(self.shape.vocabulary, dtype=torch.uint8)
            for ids, ban in ((rules.first, gpu_steps.NOT_FIRST), (rules.always, gpu_steps.NEVER)):
                bans[[i for i in ids if 0 <= i < len(bans)]] = ban
            self._bans = asked, bans
        return self._bans[1]

    def _steps(self, batch: Batch, count: int) -> None:
        """``count`` tokens further."""
        for _ in range(count):
            if batch.graph is None:
                self._step(batch)
            else:
                batch.graph.replay()

    def _hear(self, cross: Tensor, states: Tensor) -> None:
        for layer, (keys, values) in zip(self.decoder.layers, cross, strict=True):
            keys[:, : states.shape[1]] = layer.encoder_attn.k_proj(states)
            values[:, : states.shape[1]] = layer.encoder_attn.v_proj(states)

    def _step(self, b: Batch) -> None:
        parts, heads, state = self.decoder, self.shape.heads, b.state
        x = gpu_steps.begin(b.tokens, state, parts.embed_tokens, parts.embed_positions.weight)
        y: Tensor | None = None
        for layer, same, cache, (keys, values) in zip(
            parts.layers, self.same_levels, b.cache, b.cross, strict=True
        ):
            own, other = layer.self_attn, layer.encoder_attn
            h = gpu_steps.add_norm(x, y, layer.self_attn_layer_norm)
            q, k, v = _together(h, (own.q_proj, own.k_proj, own.v_proj), same)
            y = own.out_proj(gpu_steps.attend_past(q, k, v, cache, state, heads))
            h = gpu_steps.add_norm(x, y, layer.encoder_attn_layer_norm)
            q = other.q_proj(h)
            a = gpu_steps.attend_audio(q, keys, values, state, heads, *b.scratch)
            y = other.out_proj(a)
            h = gpu_steps.add_norm(x, y, layer.final_layer_norm)
            y = layer.fc2(_gelu_of(layer.fc1, h))
        b.logits = self.projection(gpu_steps.add_norm(x, y, parts.layer_norm))
        gpu_steps.choose(b.logits, b.tokens, state, b.bans, *b.votes)


def _follow(ids: list[int], new: list[int], rules: Rules) -> int | None:
    """Add ``new`` tokens to ``ids`` up to the end, the loop guard's too; → their number there."""
    for token in new:
        ids.append(rules.end if is_loop(ids, rules.first_timestamp) else token)
        if ids[-1] == rules.end:
            return len(ids)
    return None


class GpuSession:
    """Sequences being decoded, one for each clip; as ``fast.Session``, with logits on the GPU."""

    def __init__(self, graphs: Graphs, batch: Batch, count: int) -> None:
        self.graphs, self.batch = graphs, batch
        self.rows = torch.arange(count, device=batch.tokens.device)
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """ids (sequences, new tokens) → logits (sequences, vocabulary) float32 of the last."""
        if self.length + ids.shape[1] > self.graphs.positions:
            raise IndexError(f"this model decodes {self.graphs.positions} tokens at most")
        with self.graphs._at_work():
            for new in ids.to(self.rows.device).unbind(1):
                self.batch.tokens[self.rows, self.length] = new
                self.length += 1
                self.graphs._steps(self.batch, 1)
            assert self.batch.logits is not None
            logits = self.batch.logits[self.rows]
        return logits.to(torch.float32, copy=True)

    def keep(self, rows: Tensor) -> None:
        """Only the sequences ``rows`` go on, in this order; each at most once."""
        self.rows = self.rows[rows]


def _together(x: Tensor, modules: Sequence[Any], same_levels: bool) -> list[Tensor]:
    """Projections of the same input, in one launch where they are packed alike."""
    alike = same_levels and all(_is_packed_float(m) for m in modules)
    return _packed(x, modules) if alike else [m(x) for m in modules]


def _same_levels(attention: Any) -> bool:
    """Whether query, key and value have one table of levels, and groups of one size."""
    first, *rest = attention.q_proj, attention.k_proj, attention.v_proj
    return isinstance(first, QuantLinear) and all(
        isinstance(m, QuantLinear)
        and (m.spec.bits, m.group_size) == (first.spec.bits, first.group_size)
        and torch.equal(m.levels, first.levels)
        for m in rest
    )


def _gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    if _is_packed_float(linear):
        return _packed(x, (linear,), gelu=True)[0]
    return F.gelu(linear(x))


def _packed(x: Tensor, modules: Sequence[Any], gelu: bool = False) -> list[Tensor]:
    first = modules[0]
    return ops.quant_linears(
        x, [m.weight for m in modules], [m.scale for m in modules], first.levels,
        [m.bias for m in modules], [m.rows for m in modules], first.spec.bits, first.group_size,
        gelu,
    )  # fmt: skip


def _is_packed_float(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) and module.spec.activations != "int8"
