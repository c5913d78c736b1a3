"""Ways to store a layer: their bytes are the folder's, and their costs go with their error."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny_whisper
from speech_helpers import random_windows

import dqw
from dqw.choices import (
    BOUNDS,
    PROBE_STEP,
    STEPS,
    WIDTHS,
    _beside,
    _some,
    _tried,
    candidates,
    rounded,
    sensitivities,
    stored_bytes,
)
from dqw.coding import LONG, encoded_weight
from dqw.compensate import Moment, round_layers
from dqw.convert import quant_modules
from dqw.embedding import QuantEmbedding
from dqw.errors import UserError
from dqw.fake_quant import FakeQuantize, root_mean_square
from dqw.hf import coded_state, packed_state
from dqw.linear import QuantLinear
from dqw.probe import Probe, changed, first_changed
from dqw.recipe import Override, QuantConfig, QuantSpec, Recipe, stepped


@pytest.mark.parametrize("group", [None, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_stored_bytes_are_those_of_a_packed_layer(group: int | None, bits: int) -> None:
    spec = QuantSpec(bits=bits, grid="uniform", group_size=group)
    layer = QuantLinear.from_linear(torch.nn.Linear(100, 7), spec)
    layer.freeze()
    state = packed_state(torch.nn.Sequential(layer))
    size = sum(tensor.nbytes for name, tensor in state.items() if name != "0.bias")
    assert stored_bytes(7, 100, spec) == size


def test_candidates_are_widths_and_groups() -> None:
    assert [s.grid for s in candidates(QuantSpec())] == ["apot"] * 3 + ["uniform"] * 3
    groups = [s.group_size for s in candidates(QuantSpec(grid="lloyd", group_size=16))]
    assert groups == [16, 32, 64] * 6
    spelled = candidates(QuantSpec(grid="1,3,5,7,10,13,17,22"))
    assert {s.bits: s.grid != "uniform" for s in spelled} == {b: b == 4 for b in WIDTHS}
    lloyd = candidates(QuantSpec(grid="lloyd"))
    assert [s.grid for s in lloyd] == ["lloyd"] * 4 + ["uniform"] * 2


@pytest.mark.parametrize("steps", [False, True])
def test_a_layer_that_matters_costs_more(steps: bool) -> None:
    model = make_tiny_whisper(max_source_positions=50)
    model.model.encoder.layers[0].fc1.weight.data *= 0.0  # says nothing, rounds to itself
    probe = Probe(model, random_windows())
    assert probe.kl() < 1e-6
    plan = Recipe().plan(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sensitivities(model, plan, probe, steps)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    costs = {name: [c.cost for c in row] for name, row in found.items()}
    assert set(costs["model.encoder.layers.0.fc1"]) == {0.0}
    assert costs["model.decoder.embed_tokens"][0 if not steps else 1] > 0
    # What is extrapolated is what is measured, within a factor.
    name = "model.decoder.layers.1.fc1"
    near = [c for c in found[name] if not steps or abs(c.spec.step / PROBE_STEP - 1) < 0.5]
    for choice in near[:3]:
        layer = model.get_submodule(name)
        with changed(layer, rounded(layer.weight.detach(), choice.spec)):
            assert 0.4 < choice.cost / probe.kl(first_changed([name])) < 2.5
    sizes = [choice.size for choice in found[name]]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(c.rate == 8 * c.size / layer.weight.numel() for c in found[name])


@pytest.mark.parametrize("steps", [False, True])
def test_sizes_are_those_of_the_folder(steps: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 600)
    torch.nn.init.normal_(layer.weight, std=0.05)
    model = make_tiny_whisper(max_source_positions=50)
    model.model.decoder.layers[0].fc1 = layer
    name = "model.decoder.layers.0.fc1"
    probe = Probe(make_tiny_whisper(max_source_positions=50), random_windows())
    probe.kl = lambda first: 1.0  # type: ignore[method-assign]
    spec = Recipe().plan(model)[name]
    for choice in sensitivities(model, {name: spec}, probe, steps)[name][::5]:
        own = QuantLinear.from_linear(copy.deepcopy(layer), choice.spec)
        own.freeze()
        state, _ = coded_state(torch.nn.Sequential(own))
        size = sum(tensor.nbytes for key, tensor in state.items() if key != "0.bias")
        # Before compensation, which is expected to add some.
        least = 0.97 if not steps else 0.97 - 0.1 * choice.spec.step
        assert least * choice.size < size <= 1.02 * choice.size, choice


@pytest.mark.parametrize(("rows", "step"), [(LONG, 0.25), (LONG, 0.7), (1000, 0.25), (1000, 0.7)])
def test_calibrated_weights_take_no_more_than_was_counted(rows: int, step: float) -> None:
    """Compensation makes the codes of each column more spread, most where it is small."""
    torch.manual_seed(0)
    spread = torch.logspace(-2, 2, 48, base=2.0)[torch.randperm(48)]
    weight, spec = torch.randn(rows, 48) * spread, stepped(QuantSpec(), step, 8)
    table = torch.nn.Embedding(rows, 48, _weight=weight.clone())
    layer = QuantEmbedding.from_embedding(table, spec)
    assert layer.quantizer is not None
    size, _ = _tried(_some(weight), spec, layer.quantizer.scale().detach(), rows)
    moment = Moment.empty(48)
    moment.add(torch.randn(4000, 24) @ torch.randn(24, 48) + torch.randn(4000, 48))
    round_layers({"embedding": layer}, moment)
    layer.freeze()
    stored = len(encoded_weight(layer.weight, rows, 48, 8))
    assert stored + _beside(rows, spec) < size < 1.1 * stored


def test_steps_take_the_bits_that_they_need() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    name = "model.decoder.embed_tokens"
    weight = model.get_submodule(name).weight.detach().normal_()
    found = sensitivities(
        model, {name: Recipe().plan(model)[name]}, Probe(model, random_windows()), True
    )[name]
    assert [c.spec.step for c in found] == list(STEPS)
    bits = [c.spec.bits for c in found]
    assert bits == sorted(bits) and set(bits) == set(BOUNDS)
    one = next(c.spec for c in found if c.spec.step == PROBE_STEP)
    assert one == stepped(QuantSpec(), PROBE_STEP, one.bits) and one.per_tensor
    step = PROBE_STEP * float(root_mean_square(weight))
    levels = rounded(weight, one) / step
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.abs().max() <= 2 ** (one.bits - 1) - 1


def test_a_step_is_not_learned_and_stays_on_the_grid() -> None:
    spec = stepped(QuantSpec(weight_norm=True), 0.5, 5)
    weight = torch.nn.Parameter(torch.randn(40, 64))
    quantizer = FakeQuantize(spec, weight)
    before = quantizer.clip.clone()
    quantizer(weight).square().sum().backward()
    assert not quantizer.clip.requires_grad and quantizer.clip.grad is None
    assert weight.grad is not None and torch.equal(quantizer.clip, before)
    assert float(quantizer.scale()) == pytest.approx(0.5 * float(root_mean_square(weight.detach())))
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    zeros = FakeQuantize(spec, torch.zeros(2, 64))
    assert torch.equal(zeros(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_a_recipe_may_give_steps() -> None:
    model = make_tiny_whisper()
    rules = [Override(match="*fc1", bits=5, step=0.4), Override(match="*fc2", step=0.8)]
    dqw.quantize(model, Recipe(quant=QuantConfig(weight_norm=True, override=rules)))
    specs = {name: module.spec for name, module in quant_modules(model).items()}
    assert specs["model.decoder.layers.0.fc1"] == stepped(QuantSpec(), 0.4, 5)
    assert specs["model.decoder.layers.0.fc2"] == stepped(QuantSpec(), 0.8, 8)


def test_a_later_rule_takes_the_place_of_a_step() -> None:
    rules = [Override(match="*", step=0.4), Override(match="*fc1", bits=3, group_size=16)]
    recipe = Recipe(quant=QuantConfig(override=rules))
    plan = recipe.plan(make_tiny_whisper())
    wanted = QuantSpec(bits=3, grid="uniform", group_size=16)
    assert plan["model.decoder.layers.0.fc1"] == wanted
    assert plan["model.decoder.layers.0.fc2"].step == 0.4
    assert recipe.sets_bits("model.decoder.layers.0.fc2")
    with pytest.raises(UserError, match="a step and a grid"):
        QuantConfig(override=[Override(match="*", step=0.4, grid="uniform")])


def test_large_weights_are_not_clipped_unseen() -> None:
    """Few rows stand for all where errors are compared, not where bits are chosen."""
    model = make_tiny_whisper(max_source_positions=50)
    name = "model.decoder.layers.0.fc1"
    layer = torch.nn.Linear(64, 2048)
    torch.nn.init.normal_(layer.weight, std=0.05)
    layer.weight.data[3, 5] = 2.0  # 40 deviations, in a row that is not looked at
    model.model.decoder.layers[0].fc1 = layer
    probe = Probe(make_tiny_whisper(max_source_positions=50), random_windows())
    probe.kl = lambda first: 1.0  # type: ignore[method-assign]
    found = sensitivities(model, {name: QuantSpec()}, probe, True)[name]
    bits = {choice.spec.step: choice.spec.bits for choice in found}
    assert bits[0.5] == 8 and bits[2.0] == 5
    assert min(bits) > 0.3  # beyond, 8 bits would clip it
    layer.weight.data[3, 5] = 60.0  # so that no step holds it
    only = sensitivities(model, {name: QuantSpec()}, probe, True)[name]
    assert len(only) == 1 and only[0].spec.bits == 8 and only[0].cost > 0
    layer.weight.data[3, 5] = 2.0
    assert float(layer.weight.abs().max()) < 127.5 * 0.5 * float(
        root_mean_square(layer.weight.detach())
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": 0.0}, "positive"),
        ({"step": float("nan")}, "positive"),
        ({"step": "wide"}, "a number is needed"),
        ({"step": float("inf")}, "positive"),
        ({"step": True}, "a number is needed"),
        ({"step": 0.5, "grid": "apot", "per_tensor": True}, "uniform grid"),
        ({"step": 0.5, "grid": "uniform"}, "per_tensor"),
    ],
)
def test_steps_that_cannot_be(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QuantSpec.from_dict({"group_size": None, **values})
    if len(values) == 1:
        with pytest.raises(UserError):
            QuantConfig(override=[Override(match="*", **values)])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none, bits, steps"):
        QuantConfig(allocate="all")
