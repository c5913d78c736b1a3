"""Mutual guidance: the rules of choice, what a choice does, the measured losses, resuming."""

import json

import pytest
import torch
from speech_helpers import one_thread, tiny_model  # noqa: F401

import dqw
from dqw.distill.config import GuidanceConfig
from dqw.distill.guidance import Guidance, QuantLossProbe, choose, quantized_as, smooth
from dqw.errors import UserError
from dqw.linear import QuantModule
from dqw.recipe import QuantConfig, Recipe

E0, E1, E2, D0, D1 = (
    "model.encoder.layers.0", "model.encoder.layers.1", "model.encoder.layers.2",
    "model.decoder.layers.0", "model.decoder.layers.1",
)  # fmt: skip


@pytest.fixture
def student():
    return dqw.quantize(tiny_model(encoder_layers=3), Recipe())


def losses(*values):
    return dict(zip((E0, E1, E2, D0, D1), values, strict=True))


def test_choose_by_ratio_direction_and_scope():
    values = losses(1.0, 3.0, 2.0, 9.0, 8.0)
    assert choose(values, 0.5, "largest") == (E1, E2, D0)  # 1.5 and 1 layers: half rounds up
    assert choose(values, 0.5, "smallest") == (E0, E2, D1)
    assert choose(values, 0.5, "smallest", "model") == (E0, E1, E2)
    assert choose(values, 0.4, "largest", "model") == (D0, D1)
    assert choose(values, 0.01, "largest") == (E1, D0)
    assert choose(values, 0.0, "largest") == ()
    assert choose(values, 1.0, "smallest") == (E0, E1, E2, D0, D1)


def test_ties_go_to_the_first_layer():
    assert choose(losses(1.0, 1.0, 1.0, 2.0, 2.0), 0.34, "largest") == (E0, D0)
    assert choose(losses(1.0, 1.0, 1.0, 2.0, 2.0), 0.34, "smallest") == (E0, D0)


def test_smoothing_is_a_moving_average():
    old = {}
    smooth(old, {"a": 4.0}, 0.75)
    smooth(old, {"a": 8.0}, 0.75)
    assert old == {"a": 5.0}


def test_mutual_rules_and_what_is_quantized(student):
    guidance = Guidance(student, GuidanceConfig(mode="mutual", smoothing=0.0))
    assert guidance.choice.quantized == (E0, E1, E2, D0, D1)
    quant, distill = losses(5.0, 1.0, 1.0, 1.0, 2.0), losses(0.1, 0.9, 0.2, 0.7, 0.3)
    choice = guidance.update(quant, distill)
    assert choice.distilled == (E0, E1, D1)  # hurt most by quantization
    assert choice.quantized == (E0, E2, D1)  # nearest to the teacher
    for name, module in student.named_modules():
        if isinstance(module, QuantModule):
            unit = ".".join(name.split(".")[:4])
            inside = unit in guidance.units
            assert module.chosen == (unit in choice.quantized if inside else True), name
    embedding = student.model.decoder.embed_tokens
    assert isinstance(embedding, QuantModule) and embedding.chosen
    turned = GuidanceConfig(mode="mutual", quantize_first="largest", distill_first="smallest")
    choice = Guidance(student, turned).update(quant, distill)
    assert choice.distilled == (E1, E2, D0) and choice.quantized == (E1, E2, D0)


def test_each_rule_alone(student):
    quant, distill = losses(5.0, 1.0, 1.0, 1.0, 2.0), losses(0.1, 0.9, 0.2, 0.7, 0.3)
    everything = (E0, E1, E2, D0, D1)
    alone = Guidance(student, GuidanceConfig(mode="quant_guided")).update(quant, distill)
    assert alone.quantized == everything and alone.distilled == (E0, E1, D1)
    alone = Guidance(student, GuidanceConfig(mode="distill_guided")).update(quant, distill)
    assert alone.quantized == (E0, E2, D1) and alone.distilled == everything


def test_a_stack_that_is_not_compared_is_quantized_and_not_distilled(student):
    guidance = Guidance(student, GuidanceConfig(mode="mutual"), ("decoder",))
    choice = guidance.update(losses(1.0, 1.0, 1.0, 1.0, 2.0), {D0: 0.5, D1: 0.6})
    assert choice.quantized == (E0, E1, E2, D0) and choice.distilled == (D1,)
    guidance = Guidance(student, GuidanceConfig(mode="random"), ("decoder",))
    assert all({E0, E1, E2} < set(guidance.update().quantized) for _ in range(4))


def test_random_is_deterministic_and_changes_with_the_seed(student):
    def run(seed):
        guidance = Guidance(student, GuidanceConfig(mode="random", seed=seed))
        return [guidance.update() for _ in range(6)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) > 1
    assert all(len(choice.quantized) == 3 for choice in run(1))


def test_all_never_updates(student):
    guidance = Guidance(student, GuidanceConfig(mode="all"))
    assert not any(guidance.due(step) for step in range(5))
    guidance = Guidance(student, GuidanceConfig(mode="random", interval=3))
    assert [step for step in range(8) if guidance.due(step)] == [0, 3, 6]


def test_state_goes_through_json(student):
    guidance = Guidance(student, GuidanceConfig(mode="mutual", smoothing=0.3))
    guidance.update(losses(5.0, 1.0, 1.0, 1.0, 2.0), losses(0.1, 0.9, 0.2, 0.7, 0.3))
    again = Guidance(dqw.quantize(tiny_model(encoder_layers=3), Recipe()), guidance.config)
    again.load_state_dict(json.loads(json.dumps(guidance.state_dict())))
    assert again.choice == guidance.choice
    assert not again.units[E1].fc1.chosen and again.units[E0].fc1.chosen
    new = losses(0.3, 0.1, 0.7, 0.2, 0.4), losses(0.2, 0.5, 0.1, 0.3, 0.9)
    assert again.update(*new) == guidance.update(*new)
    assert again.quant_loss == guidance.quant_loss


def run_probe(student):
    guidance = Guidance(student, GuidanceConfig(mode="mutual"))
    features = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[257, 258, 260, 262], [257, 258, 260, 262]])
    with torch.no_grad(), QuantLossProbe(guidance.units).open() as measured:
        heard = student.model.encoder(features).last_hidden_state
        student.model.decoder(input_ids=ids, encoder_hidden_states=heard, use_cache=False)
    return guidance, features, dict(measured)


def test_quantization_loss_is_the_definition(student):
    _, features, measured = run_probe(student)
    # The first encoder layer by hand.
    layer = student.model.encoder.layers[0]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        student.model.encoder(features)
        handle.remove()
        rounded = layer(seen[0], None)
        for module in layer.modules():
            if isinstance(module, QuantModule):
                module.chosen = False
        exact = layer(seen[0], None)
    by_hand = (rounded - exact).square().sum() / (exact - seen[0]).square().sum()
    assert measured[E0] == pytest.approx(by_hand.item(), rel=1e-5)
    assert all(0 < value < 1 for value in measured.values())


def test_fewer_bits_have_a_larger_loss_whether_chosen_or_not():
    fine = dqw.quantize(tiny_model(), Recipe(quant=QuantConfig(bits=6, grid="uniform")))
    coarse = dqw.quantize(tiny_model(), Recipe(quant=QuantConfig(bits=2, grid="uniform")))
    _, _, low = run_probe(fine)
    guidance, _, high = run_probe(coarse)
    assert all(high[name] > 10 * low[name] for name in low)
    for unit in guidance.units.values():
        for module in unit.modules():
            if isinstance(module, QuantModule):
                module.chosen = False
    _, _, unchosen = run_probe(coarse)
    assert unchosen[E0] == pytest.approx(high[E0], rel=1e-5)  # later layers meet other inputs
    assert not coarse.model.encoder.layers[0].fc1.chosen


def test_quantized_as_restores_everything():
    student = dqw.quantize(tiny_model(), Recipe(quant=QuantConfig(rest_bits=8)))
    unit = student.model.encoder.layers[0]
    rest = unit.fc1.rest_quantizer
    assert rest is not None
    unit.fc1.chosen = False
    with pytest.raises(KeyError), quantized_as(unit, False):
        assert unit.fc1.rest_quantizer is None
        assert torch.equal(unit.fc1.fake_quantized_weight(), unit.fc1.weight)
        raise KeyError
    assert unit.fc1.rest_quantizer is rest and not unit.fc1.chosen and unit.fc2.chosen


def test_mistakes_name_the_key():
    for wrong in ({"mode": "both"}, {"quantize_ratio": 1.5}, {"interval": 0}, {"smoothing": 1.0}):
        with pytest.raises(UserError, match=f"guidance.{next(iter(wrong))}"):
            GuidanceConfig(**wrong)
