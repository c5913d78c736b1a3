"""Error-compensating rounding of a model: layer after layer, each on what those before it give.

Two states of every window go through the model side by side, the float model's and the rounded
one's. At each transformer layer, in the order in which its matrices multiply: the inputs of both
sides are summed up (``Moment``), the matrices rounded on them (``dqw.compensate``), and the rounded
side goes on from the rounded layer. So a layer makes up for its own rounding and, as far as it can,
for that of all layers before it.

    encoder layers 0 … : float layer → stage by stage: moments, rounding → rounded layer
    embedding          : rounded for its use as the output projection, on the float decoder's states
    decoder layers 0 … : as the encoder's, from the rounded embedding and the rounded encoder

Training starts from weights that round to those found (``dqw.compensate.latent``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqw.calls import Call, decoder_call, decoding, first_call, hearing, padding_of
from dqw.catch import given_to
from dqw.compensate import Moment, round_layers
from dqw.embedding import TiedProjection
from dqw.linear import QuantLinear, QuantModule
from dqw.together import rounded_once

if TYPE_CHECKING:
    from dqw.kept import Kept

# Matrices in which a part of a layer ends: what they are given is kept until they are rounded, and
# what comes before them need not run again.
ENDS = ("attn.out_proj", "fc2")
FIRST = "model.encoder.layers.0"  # what is rounded first


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    progress: Callable[[str], object] | None = None,
    off_grid: bool = False,
    kept: Kept | None = None,
) -> None:
    """Round the Linear weights and the embedding of a learning Whisper with compensation, in place.

    batches: input_features and decoder_input_ids; a ``decoder_mask`` (batch, length) bool marks the
    tokens that are no padding. Clips and biases change too. Keeps at most 23 bytes for each feature
    of each position where products are of bfloat16 (2.8 GB for base and 160 windows), else 37.
    ``progress`` gets each layer's name.
    ``off_grid``: training starts off the grid at every width, for a student that has far to go.
    ``kept``: layers that it has are taken from there, others go there.
    """
    say = progress or (lambda name: None)
    encoder, decoder = model.model.encoder, model.model.decoder
    given = [{k: v.to(model.device) for k, v in batch.items()} for batch in batches]
    with _as_float(encoder):
        heard = [_hearing(encoder, batch) for batch in given]
    now = [_hearing(encoder, batch) for batch in given]
    _walk("model.encoder.layers", encoder.layers, heard, now, say, off_grid, kept)
    told = list[Call]()
    moments = _output_moments(model)
    done = [name for name in moments if kept is not None and kept.has(name)]
    with _as_float(model):
        for call, batch in zip(heard, given, strict=True):
            told.append(decoder_call(model.model, batch, call))
            if len(done) == len(moments):
                continue  # nothing is left to add up
            states = encoder.layer_norm(call.hidden)
            last = decoder(**decoding(batch, states)).last_hidden_state
            for module, holder, moment in moments.values():
                rows = told[-1].rows(last, holder.cols)
                moment.add(rows, _doubt(module(rows)))
    heard.clear()
    for name, (_, holder, moment) in moments.items():
        if kept is not None and name in done:
            kept.load(name, holder)
            say(name)
            continue
        round_layers({name: holder}, moment, off_grid, say)
        if kept is not None:
            kept.save(name, holder)
    now = [decoder_call(model.model, b, call) for b, call in zip(given, now, strict=True)]
    _walk("model.decoder.layers", decoder.layers, told, now, say, off_grid, kept)


def _hearing(encoder: Any, batch: dict[str, Tensor]) -> Call:
    padding = padding_of(batch["input_features"])
    return first_call(encoder, hearing(batch), padding=padding)


def _output_moments(model: nn.Module) -> dict[str, tuple[nn.Module, QuantModule, Moment]]:
    """Of the output projection, if it learns. Its inputs count by how undecided the next token is,
    1 - Σ p²: where the model is sure, errors in the logits change nothing."""
    return {
        name: (module, holder, Moment.empty(holder.cols, holder.weight.device))
        for name, (module, holder) in _learning(model).items()
        if isinstance(module, TiedProjection)
    }


def layer_count(model: nn.Module) -> int:
    """How many layers ``calibrate`` will round."""
    return len(_learning(model))


def _learning(part: nn.Module) -> dict[str, tuple[nn.Module, QuantModule]]:
    """Name → (module that multiplies, module that holds its weight) of every learning layer."""
    found = {}
    for name, layer in part.named_modules():
        holder = layer.embedding if isinstance(layer, TiedProjection) else layer
        multiplies = isinstance(layer, QuantLinear | TiedProjection)
        if multiplies and not holder.frozen and holder.chosen:
            found[name] = layer, holder
    return found


@contextmanager
def _as_float(part: nn.Module) -> Iterator[None]:
    """Weights of ``part`` as they are, not rounded, within the block."""
    modules = [m for m in part.modules() if isinstance(m, QuantModule) and not m.frozen]
    kept = [(m, m.quantizer, m.rest_quantizer) for m in modules]
    for module in modules:
        module.quantizer = module.rest_quantizer = None
    try:
        yield
    finally:
        for module, own, rest in kept:
            module.quantizer, module.rest_quantizer = own, rest


def _doubt(logits: Tensor) -> Tensor:
    """1 - Σ p² of each row, and a little, so that no row counts for nothing; (n,)."""
    return 1.02 - logits.float().softmax(-1).square().sum(-1)


def _walk(
    stack: str,
    layers: Any,
    floats: list[Call],
    now: list[Call],
    say: Callable[[str], object],
    off_grid: bool,
    kept: Kept | None,
) -> None:
    """Round a stack's layers one after the other; the calls end behind the last one."""
    for index, layer in enumerate(layers):
        place = f"{stack}.{index}"
        if kept is not None and kept.has(place):
            with _as_float(layer):
                for call in floats:
                    call.hidden = call.run(layer)
            kept.load(place, layer)
            for name in _learning(layer):
                say(f"{place}.{name}")
            _go_on(layer, now)
            continue
        stages, inputs = _float_layer(layer, floats)
        for stage, rows in zip(stages, inputs, strict=True):
            name, matrix, holder = stage[0]
            moment, given = Moment.empty(holder.cols, rows[0].device), list[Tensor]()
            with rounded_once(layer):
                for call in now:
                    (x, *_), _ = given_to(matrix, partial(call.run, layer))
                    moment.add(call.rows(x, holder.cols), y=rows.pop(0))
                    if name.endswith(ENDS):
                        given.append(x)
            shared = {f"{place}.{own}": holder for own, _, holder in stage}
            round_layers(shared, moment, off_grid, say)
            if given:
                for call in now:
                    call.known += _known(layer, name, matrix(given.pop(0)))
        _go_on(layer, now)
        if kept is not None:
            kept.save(place, layer)


def _go_on(layer: nn.Module, now: list[Call]) -> None:
    """Run the rounded ``layer`` on its calls."""
    with rounded_once(layer):
        for call in now:
            call.hidden = call.run(layer)
            call.known.clear()


def _known(layer: nn.Module, name: str, output: Tensor) -> list[tuple[nn.Module, Any]]:
    """What the modules of ``layer`` return that end in the matrix ``name``, which gives ``output``:
    an attention, or fc1 and fc2, of which fc1's is not needed any more."""
    if name == "fc2":
        nothing = output.new_empty(0)
        return [(layer.get_submodule("fc1"), nothing), (layer.get_submodule(name), output)]
    return [(layer.get_submodule(name.rpartition(".")[0]), (output, None))]


_Stage = list[tuple[str, nn.Module, QuantModule]]  # matrices that share their input


def _float_layer(
    layer: nn.Module, calls: Sequence[Call]
) -> tuple[list[_Stage], list[list[Tensor]]]:
    """Run the float ``layer`` on its calls, whose hidden states go on; → its stages in order, and
    each one's inputs, rows (n, cols) of every call."""
    matrices = _learning(layer)
    stages, inputs = list[_Stage](), list[list[Tensor]]()
    seen = list[tuple[str, Tensor]]()
    with _as_float(layer), ExitStack() as hooks:
        for name, (module, _) in matrices.items():

            def hook(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                seen.append((name, given[0]))

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        for call in calls:
            output = call.run(layer)
            if not stages:
                last: Tensor | None = None
                for name, x in seen:
                    if x is not last:
                        stages.append([])
                    stages[-1].append((name, *matrices[name]))
                    last = x
                inputs = [[] for _ in stages]
            by_name = dict(seen)
            for stage, rows in zip(stages, inputs, strict=True):
                x = call.rows(by_name[stage[0][0]], stage[0][2].cols)
                lower = torch.is_autocast_enabled(x.device.type)
                rows.append(x.bfloat16() if lower else x.clone())
            seen.clear()
            call.hidden = output
    return stages, inputs
