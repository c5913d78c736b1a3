"""A transformer layer's weights rounded together: what each gives on its own, bit for bit."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from whisper_helpers import make_tiny_whisper

import dqw
from dqw import fake_quant, ops
from dqw.convert import dequantize, quant_modules
from dqw.linear import QuantLinear
from dqw.recipe import Recipe
from dqw.together import forget_together, rounded_once

KINDS = {
    "apot": {"bits": 4, "grid": "apot", "group_size": 0},
    "groups": {"bits": 3, "grid": "lloyd", "group_size": 16, "activations": "int8"},
    "rest": {"bits": 4, "group_size": 0, "rest_bits": 8},
    "weight norm": {"bits": 5, "grid": "apot", "weight_norm": True},
    "mixed": {
        "override": [
            {"match": "*.fc1", "bits": 8, "step": 0.05},
            {"match": "*.q_proj", "bits": 2},
        ]
    },
}


def quantized(kind: str = "apot"):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = make_tiny_whisper(max_source_positions=50).train()
    dqw.quantize(model, Recipe.from_dict({"quant": KINDS[kind]}, "the test"))
    return model


def twins(kind: str = "apot"):  # type: ignore[no-untyped-def]
    """A model, and the same whose modules round on their own."""
    model, alone = quantized(kind), quantized(kind)
    forget_together(alone)
    return model, alone


def losses(model) -> Tensor:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    features, ids = torch.randn(2, 80, 100), torch.randint(0, 50, (2, 6))
    return model(input_features=features, labels=ids).loss


def gradients(model, lower: bool = False) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        loss = losses(model)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) > 20
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@contextmanager
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Matrices of each call of the operator for several."""
    seen: list[int] = []
    operator = ops.fake_quant_clips

    def counted(x: list[Tensor], *rest: object) -> list[Tensor]:
        seen.append(len(x))
        return operator(x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fake_quant.ops, "fake_quant_clips", counted)
        yield seen


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_step(kind: str, lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alone = twins(kind)
    with calls(monkeypatch) as seen:
        want = gradients(alone, lower)
        assert not seen
        same(gradients(model, lower), want)
    config = model.config
    assert seen == [6] * config.encoder_layers + [10] * config.decoder_layers


def test_guidance_leaves_some_out() -> None:
    model, alone = twins()
    for m in (model, alone):
        m.model.encoder.layers[0].fc1.chosen = False
        for module in m.model.decoder.layers[0].modules():
            if isinstance(module, QuantLinear):
                module.chosen = False
    same(gradients(model), gradients(alone))


def test_guidance_gives_some_other_bits() -> None:
    """Modules that are not chosen go by their rest quantizer; one that changes in between, too."""
    model, alone = twins("rest")
    assert model.model.decoder.layers[0].fc2.rest_quantizer is not None

    def unchoose(module: QuantLinear, args: object) -> None:
        module.chosen = False

    for m in (model, alone):
        m.model.decoder.layers[0].fc2.chosen = False
        m.model.encoder.layers[0].fc1.register_forward_pre_hook(unchoose)
    same(gradients(model), gradients(alone))


def test_a_module_without_part_has_no_gradient() -> None:
    model, alone = twins()
    for m in (model, alone):
        fc1 = m.model.encoder.layers[0].fc1
        fc1.forward = lambda x, fc1=fc1: x @ fc1.weight.detach().T
    got = gradients(model)
    same(got, gradients(alone))
    assert not any("encoder.layers.0.fc1" in name for name in got)


def test_another_module_in_its_place() -> None:
    model = quantized()
    layer = model.model.encoder.layers[0]
    layer.fc1 = torch.nn.Linear(layer.fc1.in_features, layer.fc1.out_features)
    assert losses(model).isfinite()


def test_what_an_interrupt_left_is_forgotten() -> None:
    """Hooks do not hear of a KeyboardInterrupt; the next run rounds anew."""
    model = quantized()
    layer = model.model.encoder.layers[0]

    def interrupt(module: object, args: object) -> None:
        raise KeyboardInterrupt

    handle = layer.fc2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        losses(model)
    handle.remove()
    assert layer.fc1.rounded is not None
    with torch.no_grad():
        layer.fc1.weight.mul_(2)
    alone = copy.deepcopy(quantized())
    forget_together(alone)
    with torch.no_grad():
        alone.model.encoder.layers[0].fc1.weight.mul_(2)
    same(gradients(model), gradients(alone))
    with pytest.raises(KeyboardInterrupt):
        layer.fc2.register_forward_pre_hook(interrupt)
        losses(model)
    forget_together(model)
    assert layer.fc1.rounded is None


def test_gradients_are_checkpointed() -> None:
    model, alone = twins()
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        assert hasattr(layer, "gradient_checkpointing")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(gradients(model), gradients(alone))


def test_frozen_weights_and_fixed_clips() -> None:
    model, alone = twins()
    for m in (model, alone):
        m.model.encoder.requires_grad_(False)
        m.model.decoder.layers[0].fc2.weight.requires_grad_(False)
        m.model.decoder.layers[0].fc1.quantizer.clip.requires_grad_(False)
    same(gradients(model), gradients(alone))
    with torch.no_grad():
        assert torch.equal(losses(model), losses(alone))


def test_rounded_once_for_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the block; a weight that changed behind it counts, and nothing stays."""
    model = quantized()
    layer = model.model.encoder.layers[0]
    x = torch.randn(1, 30, model.config.d_model)
    with torch.no_grad(), calls(monkeypatch) as seen:
        want = layer(x, None)
        with rounded_once(layer):
            assert all(torch.equal(layer(x, None), want) for _ in range(3))
        layer.fc1.weight.mul_(2)
        with rounded_once(layer):
            changed = layer(x, None)
        assert len(seen) == 3 and not torch.equal(changed, want)
        assert torch.equal(layer(x, None), changed)
    assert all(m.rounded is None for m in quant_modules(model).values())
    assert not {"_dqw_rounded", "_dqw_stay"} & set(layer.__dict__)


def test_nothing_stays() -> None:
    """After a step, and after one that fails within a layer."""
    model = quantized()
    losses(model)
    assert all(m.rounded is None for m in quant_modules(model).values())
    held = []

    def fail(module: object, args: object) -> None:
        held.append(model.model.decoder.layers[0].fc1.rounded)
        raise KeyError("in the middle of a layer")

    model.model.decoder.layers[0].fc1.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        losses(model)
    assert held[0] is not None
    assert all(m.rounded is None for m in quant_modules(model).values())


def test_a_copy_rounds_its_own_weights() -> None:
    model = quantized()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in quant_modules(other).values():
            module.weight.mul_(1.5)
    alone = copy.deepcopy(other)
    forget_together(alone)
    same(gradients(other), gradients(alone))


def test_another_dtype_than_the_layer_was_given() -> None:
    """The hook reads the layer's input; a module that gets another rounds its own."""
    model, alone = twins()
    for m in (model, alone):
        fc1 = m.model.encoder.layers[0].fc1
        fc1.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
        fc1.register_forward_hook(lambda module, args, y: y.float())
        fc1.bias.data = fc1.bias.data.bfloat16()
    same(gradients(model), gradients(alone))


def test_packed_and_float_models_have_no_hooks() -> None:
    def hooks(model) -> int:  # type: ignore[no-untyped-def]
        both = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values(),
                 *m._forward_hooks_always_called) for m in model.modules()]  # fmt: skip
        return sum(len(found) for found in both)

    layers = 2 * make_tiny_whisper(max_source_positions=50).config.encoder_layers
    assert hooks(quantized()) == 3 * layers
    assert hooks(dqw.freeze(quantized())) == 0
    assert hooks(dequantize(quantized())) == 0
    own = quantized()
    own.model.encoder.layers[0].register_forward_hook(lambda *_: None)
    forget_together(own)
    assert hooks(own) == 1


def test_a_layer_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    layer = model.model.encoder.layers[0]
    x = torch.randn(1, 30, model.config.d_model)
    want = layer(x, None)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with calls(monkeypatch) as seen:
        torch.testing.assert_close(compiled(x, None), want)
        assert not seen
