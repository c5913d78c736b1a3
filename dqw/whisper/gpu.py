"""A Whisper on a GPU as CUDA graphs: the encoder, and the decoder a token at a time.

    graphs = Graphs(model)      graphs.encoder(features) → states
                                graphs.decoder.greedy(states, prompt, rules) → tokens

``model`` is float or packed, of transformers or ``native.skeleton``, and in any dtype. A step of
whisper-base is 75 launches that a GPU works through faster than Python starts two of them. So they
are captured once for a number of sequences and replayed: what changes from token to token (the
token, its position, the rules) lies in the GPU's memory, and the token is chosen there too. The
host looks at the tokens every ``_BURST`` steps to see whether all sequences have ended.

Packed layers multiply float activations here, unless their spec asks for int8: on a GPU those cost
a launch more and save nothing. The residual stays float32 from layer to layer.

Without a GPU the same functions run one by one, on the reference of their kernels: that is how they
are tested. Not for two threads at once.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqw import ops, ops_cuda
from dqw.linear import QuantLinear, QuantModule
from dqw.whisper import gpu_steps
from dqw.whisper.coverage import has_hooks
from dqw.whisper.decoding import Rules, is_loop

_BURST = 4  # tokens between two looks: a look costs 0.03 ms, a token behind the end a step
_SHAPES = 16  # graphs that a network keeps, each for one shape of its inputs


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
        if isinstance(module, QuantModule) and not module.frozen:
            return f"{name} is not packed yet"
    return ""


class _Captures:
    """A function of tensors, captured for each set of their shapes; the latest ``_SHAPES`` stay.

    What it returns is overwritten by the next call for the same shapes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.known: OrderedDict[tuple, tuple[Any, list[Tensor], Any]] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> Any:
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        key = tuple(t.shape for t in inputs)
        if key not in self.known:
            self.known[key] = self._captured(inputs)
            if len(self.known) > _SHAPES:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        graph, own, outputs = self.known[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return outputs

    def _captured(self, inputs: Sequence[Tensor]) -> tuple[Any, list[Tensor], Any]:
        own = [t.clone() for t in inputs]
        graph, outputs = capture(lambda: self.function(*own))
        return graph, own, outputs


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of what ``function`` launches, and what it returned while it was captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()  # libraries and Triton set up here what may not be captured
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


class Graphs:
    """Both networks of a model that ``gpu_uncovered`` has nothing against; its weights stay where
    they are from here on. A copy, or what is unpickled, is None."""

    def __init__(self, model: Any) -> None:
        self.encoder, self.decoder = GpuEncoder(model.model.encoder), GpuDecoder(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class GpuEncoder:
    """Features (clips, mels, frames) → states (clips, frames / 2, width), in the model's dtype."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.heads: int = encoder.config.encoder_attention_heads
        self.graphs = _Captures(self._forward)

    def __call__(self, features: Tensor, bf16: bool = False) -> Tensor:
        """bf16: as of ``fast.FastEncoder``; nothing here."""
        weight = self.encoder.layer_norm.weight
        with torch.inference_mode():
            states = self.graphs(features.to(weight.device, weight.dtype))
        return states.clone()  # out here: no inference tensor, unless the caller wants one

    def _forward(self, features: Tensor) -> Tensor:
        e = self.encoder
        x = F.gelu(e.conv2(F.gelu(e.conv1(features)))).transpose(1, 2)
        # Contiguous, or every sum below would go along the wrong way: a fifth of the time.
        x = x.contiguous() + e.embed_positions.weight[: x.shape[1]]
        for layer in e.layers:
            own = layer.self_attn
            h = layer.self_attn_layer_norm(x)
            q, k, v = (
                p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for p in (own.q_proj, own.k_proj, own.v_proj)
            )
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + own.out_proj(a)
            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
        return e.layer_norm(x)


class GpuDecoder:
    """Greedy decoding; see the top of the file."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, self.decoder = model, model.model.decoder
        self.heads: int = config.decoder_attention_heads
        self.width: int = config.d_model
        self.positions: int = config.max_target_positions
        self.audio: int = config.max_source_positions
        self.triples = [
            _Together(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            for layer in self.decoder.layers
        ]
        self.batches: OrderedDict[int, _Batch] = OrderedDict()
        self._bans: tuple[tuple, Tensor] | None = None

    @torch.inference_mode()
    def greedy(self, states: Tensor, prompt: Tensor, rules: Rules) -> Tensor:
        """The tokens (clips, tokens) of the encoder's ``states`` behind ``prompt`` (clips, begin),
        on the CPU; behind the end of a sequence stands ``rules.end``."""
        count = len(states)
        batch = self._batch(count)
        batch.hear(states)
        batch.start(prompt, rules, self._bans_of(rules))
        ids, length = prompt.tolist(), rules.begin
        stops: list[int | None] = [None] * count  # the length at which a sequence has ended
        batch.step(rules.begin - 1)
        while length < rules.longest and None in stops:
            known, length = length, min((length // _BURST + 1) * _BURST, rules.longest)
            batch.step(length - known)
            for row, new in enumerate(batch.tokens[:count, known:length].tolist()):
                if stops[row] is None:
                    stops[row] = _follow(ids[row], new, rules)
        longest = max(len(row) for row in ids)
        return torch.tensor([row + [rules.end] * (longest - len(row)) for row in ids])

    @torch.inference_mode()
    def detect(self, states: Tensor, start: int, ids: Sequence[int]) -> list[int]:
        """The likeliest of ``ids`` behind the token ``start``, for each clip."""
        logits = self.session(states).step(torch.full((len(states), 1), start))
        choice = torch.tensor(list(ids), device=logits.device)
        return choice[logits.index_select(1, choice).argmax(1)].tolist()

    def session(self, states: Tensor, longest: int = 0, bf16: bool = False) -> GpuSession:
        """The decoder a step at a time, for a loop that chooses the tokens itself; until the next
        call of this, ``greedy`` or ``detect``."""
        return GpuSession(self, states)

    def _batch(self, count: int) -> _Batch:
        rows = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        if rows not in self.batches:
            self.batches[rows] = _Batch(self, rows)
            if len(self.batches) > 4:  # their caches take most of the memory
                self.batches.popitem(last=False)
        self.batches.move_to_end(rows)
        return self.batches[rows]

    def _bans_of(self, rules: Rules) -> Tensor:
        asked = rules.always, rules.first
        if self._bans is None or self._bans[0] != asked:
            bans = torch.zeros(self.model.config.vocab_size, dtype=torch.uint8)
            bans[list(rules.first)] = gpu_steps.NOT_FIRST
            bans[list(rules.always)] = gpu_steps.NEVER
            self._bans = asked, bans
        return self._bans[1]


def _follow(ids: list[int], new: list[int], rules: Rules) -> int | None:
    """Add ``new`` tokens to ``ids`` up to the end, the loop guard's too; → their number there."""
    for token in new:
        ids.append(rules.end if is_loop(ids, rules.first_timestamp) else token)
        if ids[-1] == rules.end:
            return len(ids)
    return None


class GpuSession:
    """Sequences being decoded, one for each clip; as ``fast.Session``, with logits on the GPU."""

    @torch.inference_mode()
    def __init__(self, decoder: GpuDecoder, states: Tensor) -> None:
        self.batch = decoder._batch(len(states))
        self.batch.hear(states)
        self.batch.start()
        self.rows = torch.arange(len(states), device=states.device)
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """ids (sequences, new tokens) → logits (sequences, vocabulary) float32 of the last."""
        with torch.inference_mode():
            for new in ids.to(self.rows.device).unbind(1):
                self.batch.tokens[self.rows, self.length] = new
                self.length += 1
                self.batch.step(1)
            assert self.batch.logits is not None
            logits = self.batch.logits[self.rows]
        return logits.to(torch.float32, copy=True)

    def keep(self, rows: Tensor) -> None:
        """Only the sequences ``rows`` go on, in this order; each at most once."""
        self.rows = self.rows[rows]


class _Batch:
    """The memory and graph of ``rows`` sequences that are decoded together."""

    def __init__(self, decoder: GpuDecoder, rows: int) -> None:
        self.decoder, self.rows = decoder, rows
        norm = decoder.decoder.layer_norm.weight
        like = {"device": norm.device, "dtype": norm.dtype}
        layers, width = len(decoder.decoder.layers), decoder.width
        self.tokens = torch.zeros(rows, decoder.positions + 1, dtype=torch.long, device=norm.device)
        self.state = torch.zeros(gpu_steps.STATE, dtype=torch.long, device=norm.device)
        self.bans = torch.zeros(
            decoder.model.config.vocab_size, dtype=torch.uint8, device=norm.device
        )
        self.cache = torch.zeros(layers, 2, rows, decoder.positions, width, **like)
        self.cross = torch.zeros(layers, 2, rows, decoder.audio, width, **like)
        self.scratch = gpu_steps.audio_scratch(rows, width, decoder.heads, norm.device)
        self.votes = gpu_steps.choice_scratch(rows, self.bans.numel(), norm.device)
        self.logits: Tensor | None = None
        self.graph: Any = None
        self.hearing = _Captures(self._hear)
        self.heard: weakref.ref | None = None
        self.heard_positions = 0

    def hear(self, states: Tensor) -> None:
        """Keys and values of the encoder's ``states`` (clips, positions, width)."""
        if self.heard is not None and self.heard() is states:
            return  # those that the language was detected from
        if len(states) < self.rows:
            rest = states[-1:].expand(self.rows - len(states), -1, -1)
            self.hearing(torch.cat([states, rest]))
        else:
            self.hearing(states)
        self.heard_positions = states.shape[1]
        self.heard = weakref.ref(states)

    def _hear(self, states: Tensor) -> None:
        for layer, (keys, values) in zip(self.decoder.decoder.layers, self.cross, strict=True):
            keys[:, : states.shape[1]] = layer.encoder_attn.k_proj(states)
            values[:, : states.shape[1]] = layer.encoder_attn.v_proj(states)

    def start(
        self, prompt: Tensor | None = None, rules: Rules | None = None, bans: Tensor | None = None
    ) -> None:
        """The next step reads the first token: of ``prompt``, or of what is put in ``tokens`` by
        someone who chooses them (no rules)."""
        if self.graph is None and self.tokens.is_cuda:
            self.graph, _ = capture(self._step)
        last, room = self.bans.numel() - 1, self.tokens.shape[1]
        state = [0] * gpu_steps.STATE
        state[gpu_steps.HEARD], state[gpu_steps.BEGIN] = self.heard_positions, room + 1
        if prompt is not None and rules is not None and bans is not None:
            state[gpu_steps.BEGIN], state[gpu_steps.TIMES] = rules.begin, int(rules.timestamps)
            latest = last if rules.latest is None else rules.first_timestamp + rules.latest
            state[gpu_steps.LATEST] = min(latest, last)
            state[gpu_steps.END], state[gpu_steps.TIME] = rules.end, rules.first_timestamp
            self.bans.copy_(bans)
            self.tokens[:, : rules.begin] = prompt[-1:]
            self.tokens[: len(prompt), : rules.begin] = prompt
        self.state.copy_(torch.tensor(state))

    def step(self, count: int) -> None:
        """``count`` tokens further."""
        for _ in range(count):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()

    def _step(self) -> None:
        parts, heads, state = self.decoder.decoder, self.decoder.heads, self.state
        x = gpu_steps.begin(self.tokens, state, parts.embed_tokens, parts.embed_positions.weight)
        y: Tensor | None = None
        for layer, project, cache, (keys, values) in zip(
            parts.layers, self.decoder.triples, self.cache, self.cross, strict=True
        ):
            h = gpu_steps.add_norm(x, y, layer.self_attn_layer_norm)
            q, k, v = project(h)
            a = gpu_steps.attend_past(q, k, v, cache, state, heads)
            y = layer.self_attn.out_proj(a)
            h = gpu_steps.add_norm(x, y, layer.encoder_attn_layer_norm)
            q = layer.encoder_attn.q_proj(h)
            a = gpu_steps.attend_audio(q, keys, values, state, heads, *self.scratch)
            y = layer.encoder_attn.out_proj(a)
            h = gpu_steps.add_norm(x, y, layer.final_layer_norm)
            y = layer.fc2(_gelu_of(layer.fc1, h))
        self.logits = self.decoder.model.proj_out(gpu_steps.add_norm(x, y, parts.layer_norm))
        gpu_steps.choose(self.logits, self.tokens, state, self.bans, *self.votes)


class _Together:
    """Projections of the same input, in one launch where they are packed alike."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.alike = all(_is_packed_float(m) for m in modules) and _are_alike(modules)

    def __call__(self, x: Tensor) -> list[Tensor]:
        return _packed(x, self.modules) if self.alike else [m(x) for m in self.modules]


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


def _are_alike(modules: Sequence[Any]) -> bool:
    first = modules[0]
    return all(
        (m.cols, m.spec.bits, m.group_size) == (first.cols, first.spec.bits, first.group_size)
        and torch.equal(m.levels, first.levels)
        for m in modules
    )
