"""Error-compensating rounding: less error where it counts, on the same grid."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from speech_helpers import Noise
from torch import nn

import dqw
import dqw.calibrate as walk
from dqw.calibrate import calibrate, layer_count
from dqw.calls import PADDING, REACH
from dqw.compensate import (
    DAMPING,
    EMBEDDING_DAMPING,
    Curvature,
    Moment,
    carried_over,
    compensated,
    factor,
    round_layers,
)
from dqw.convert import quant_modules
from dqw.distill.config import GuidanceConfig
from dqw.distill.cuts import Window
from dqw.embedding import QuantEmbedding
from dqw.fake_quant import FakeQuantize
from dqw.linear import QuantLinear
from dqw.recipe import QuantConfig, QuantSpec, Recipe, stepped
from dqw.speech import balanced, stretches


def inputs(rows: int, cols: int) -> torch.Tensor:
    """Correlated, as activations are: a quarter as many directions as features, and noise."""
    return torch.randn(rows, cols // 4) @ torch.randn(cols // 4, cols) + torch.randn(rows, cols)


@pytest.mark.parametrize(("grid", "bits", "group"), [("apot", 4, 64), ("uniform", 3, None)])
def test_compensation_lowers_the_output_error(grid: str, bits: int, group: int | None) -> None:
    x, w = inputs(512, 200), torch.randn(96, 200)
    quantizer = FakeQuantize(QuantSpec(bits=bits, grid=grid, group_size=group), w)
    plain = quantizer(w).detach()
    better = compensated(w, Curvature.of(x.T @ x), quantizer)
    error = [(x @ (q - w).T).square().sum() for q in (better, plain)]
    assert error[0] < 0.6 * error[1]
    assert torch.equal(quantizer(better), better)  # on the grid: rounding leaves it as it is


def test_a_clip_per_tensor_stays() -> None:
    x, w = inputs(512, 200), torch.randn(96, 200)
    spec = QuantSpec(bits=4, grid="apot", group_size=None, per_tensor=True)
    quantizer = FakeQuantize(spec, w)
    before, plain = quantizer.clip.clone(), quantizer(w).detach()
    better = compensated(w, Curvature.of(x.T @ x), quantizer)
    error = [(x @ (q - w).T).square().sum() for q in (better, plain)]
    assert torch.equal(quantizer.clip, before) and error[0] < 0.6 * error[1]


def test_without_correlation_it_is_plain_rounding() -> None:
    w = torch.randn(8, 130)
    quantizer = FakeQuantize(QuantSpec(group_size=32), w)
    curvature = Curvature.of(torch.eye(130))
    assert torch.equal(compensated(w, curvature, quantizer), quantizer(w))


def test_dead_inputs_and_few_rows_are_no_trouble() -> None:
    x, w = torch.randn(5, 130), torch.randn(8, 130)
    x[:, 7] = 0
    quantizer = FakeQuantize(QuantSpec(group_size=None), w)
    assert compensated(w, Curvature.of(x.T @ x), quantizer).isfinite().all()


def test_a_moment_that_sums_left_indefinite_is_damped_more() -> None:
    h = torch.diag(torch.tensor([1.0, 1e-3, -2e-7], dtype=torch.float64))
    lower = factor(h)
    added = (lower @ lower.T - h).diagonal()
    assert (added > 2e-7).all() and (added < 1e-4).all()
    fine = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    assert torch.equal(factor(fine), torch.linalg.cholesky(fine))
    for wrong in (-torch.eye(2, dtype=torch.float64), torch.full((2, 2), float("nan")).double()):
        with pytest.raises(torch.linalg.LinAlgError):
            factor(wrong)


def test_an_embedding_is_damped_more_because_its_rows_are_inputs() -> None:
    x, table = inputs(256, 64), torch.nn.Embedding(40, 64)
    layer = QuantEmbedding.from_embedding(table, QuantSpec(group_size=32))
    quantizer = FakeQuantize(QuantSpec(group_size=32), table.weight)
    damped, less = (
        compensated(table.weight.detach().clone(), Curvature.of(x.T @ x, damping), quantizer)
        for damping in (EMBEDDING_DAMPING, DAMPING)
    )
    round_layers({"embed_tokens": layer}, Moment(x.T @ x, x.sum(0), len(x)))
    assert torch.equal(layer.fake_quantized_weight(), damped) and not torch.equal(damped, less)


def test_rounding_itself_is_never_in_bfloat16() -> None:
    x, linear = inputs(512, 192), torch.nn.Linear(192, 48)
    moment, found = Moment(x.T @ x, x.sum(0), len(x)), []
    for lowered in (False, True):
        layer = QuantLinear.from_linear(copy.deepcopy(linear), QuantSpec(bits=3, group_size=64))
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            round_layers({"fc1": layer}, moment)
        found.append((layer.fake_quantized_weight().detach(), layer.bias))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("given", ["ieee", "tf32"])
def test_the_precision_of_products_is_as_it_was(given: str) -> None:
    """Also where a Trainer's tf32=True or torch_compile=True has set it."""
    before, torch.backends.fp32_precision = torch.backends.fp32_precision, given
    own = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with torch.autocast("cpu", torch.bfloat16):
            Moment.empty(8).add(torch.randn(3, 8))
        assert torch.backends.mkldnn.matmul.fp32_precision == own
        assert torch.backends.fp32_precision == given
    finally:
        torch.backends.fp32_precision = before


def test_a_whole_model_comes_closer_to_its_float_self() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    features, ids = torch.randn(8, 80, 100), torch.randint(0, 120, (8, 12))
    batch = {"input_features": features, "decoder_input_ids": ids}
    with torch.no_grad():
        target = model(**batch).logits
        dqw.quantize(model)
        before = (model(**batch).logits - target).square().mean()
        calibrate(model, [batch])
        after = (model(**batch).logits - target).square().mean()
    assert after < 0.8 * before


def test_centred_moments_stay_positive_in_bfloat16() -> None:
    x = torch.randn(200, 24) + 1000  # the mean is all but all of it
    moment = Moment(torch.zeros(24, 24), torch.zeros(24))
    with torch.autocast("cpu", torch.bfloat16):
        moment.add(x)
    h = moment.centred().second
    assert torch.linalg.eigvalsh(h.double()).min() > -0.02 * h.diagonal().mean()


def test_a_moment_is_symmetric_and_near_in_bfloat16_too() -> None:
    x, weight = torch.randn(300, 24), torch.rand(300)
    exact = (x.double() * weight.double()[:, None]).T @ x.double()
    for lowered in (False, True):
        moment = Moment(torch.zeros(24, 24), torch.zeros(24))
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            moment.add(x, weight)
        assert torch.equal(moment.second, moment.second.T)
        error = (moment.second - exact).abs().max() / exact.diagonal().mean()
        assert error < (2**-8 if lowered else 1e-6)
        torch.testing.assert_close(moment.first, weight @ x, rtol=2**-8, atol=0.3)
        assert torch.get_float32_matmul_precision() == "highest"


def test_carried_over_gives_the_float_inputs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, same = inputs(4000, 24), torch.eye(24)
    mixed = same + 0.2 * torch.randn(24, 24)
    y = x @ mixed.T
    damped = carried_over(same, x.T @ x, y.T @ x)
    assert (y - x @ damped.T).norm() < 0.9 * (y - x).norm()  # part of the way
    torch.testing.assert_close(carried_over(same, x.T @ x, x.T @ x), same, atol=1e-5, rtol=0)
    # What was never seen stays as it is.
    assert torch.equal(carried_over(same, torch.zeros(24, 24), torch.zeros(24, 24)), same)
    monkeypatch.setattr("dqw.compensate.CARRY_DAMPING", 1e-7)
    torch.testing.assert_close(carried_over(same, x.T @ x, y.T @ x), mixed, atol=1e-3, rtol=1e-3)


def test_every_layer_is_rounded_on_what_it_will_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its moments are those of the finished model's inputs and of the float model's, row by row."""
    model = make_tiny_whisper(max_source_positions=50)
    features, ids = torch.randn(4, 80, 100), torch.randint(0, 120, (4, 12))
    batch = {"input_features": features, "decoder_input_ids": ids}
    names = {id(m): n for n, m in dqw.quantize(model, Recipe(QuantConfig(bits=3))).named_modules()}
    seen: dict[str, Moment] = {}

    def noting(layers: dict[str, QuantLinear], moment: Moment, *rest: Any) -> None:
        seen.update((names[id(module)], moment) for module in layers.values())
        round_layers(layers, moment, *rest)

    def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, x, n=n: found.__setitem__(n, x[0].flatten(0, 1)))
            for n, m in model.named_modules()
            if isinstance(m, QuantLinear)
        ]
        with torch.no_grad():
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    with walk._as_float(model):
        told = inputs_of(model)
    monkeypatch.setattr(walk, "round_layers", noting)
    calibrate(model, [{k: v[:3] for k, v in batch.items()}, {k: v[3:] for k, v in batch.items()}])
    assert len(seen) == layer_count(model)
    for name, x in inputs_of(model).items():
        found, y = seen[name], told[name]
        assert found.cross is not None
        torch.testing.assert_close(found.second, x.T @ x, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found.cross, y.T @ x, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found.mean_float(), y.mean(0), rtol=1e-4, atol=1e-4)


def test_what_is_known_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of the encoder multiplies each batch once, float, and once, rounded."""
    model, runs = dqw.quantize(make_tiny_whisper(max_source_positions=50)), Counter[int]()
    forward = QuantLinear.forward

    def counting(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        runs[id(module)] += 1
        return forward(module, x)

    monkeypatch.setattr(QuantLinear, "forward", counting)
    ids = torch.randint(0, 120, (2, 12))
    batches = [{"input_features": torch.randn(2, 80, 100), "decoder_input_ids": ids}] * 3
    calibrate(model, batches)
    layers = [m for m in model.model.encoder.layers.modules() if isinstance(m, QuantLinear)]
    assert [runs[id(layer)] for layer in layers] == [2 * len(batches)] * len(layers)


def test_layers_make_up_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    features, ids = torch.randn(16, 80, 100), torch.randint(0, 120, (16, 12))
    batch = {"input_features": features, "decoder_input_ids": ids}
    errors = []
    for carries in (True, False):
        torch.manual_seed(0)
        model = make_tiny_whisper(max_source_positions=50)
        with torch.no_grad():
            target = model(**batch).logits
            dqw.quantize(model, Recipe(QuantConfig(bits=2, group_size=32)))
            if not carries:
                monkeypatch.setattr("dqw.compensate.carried_over", lambda weight, *_: weight)
            calibrate(model, [batch])
            errors.append(float((model(**batch).logits - target).square().mean()))
    assert errors[0] < errors[1]


def test_what_is_not_chosen_stays_float() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    dqw.quantize(model)
    left = model.model.decoder.layers[0].fc1
    left.chosen = False
    before = left.weight.detach().clone()
    features, ids = torch.randn(2, 80, 100), torch.randint(0, 120, (2, 12))
    calibrate(model, [{"input_features": features, "decoder_input_ids": ids}])
    assert torch.equal(left.weight, before)
    for module in quant_modules(model).values():  # all quantizers are back in their places
        assert module.quantizer is not None


@pytest.mark.parametrize("off_grid", [False, True])
@pytest.mark.parametrize(
    ("spec", "fine"),
    [
        (QuantSpec(4, "lloyd", 16), False),
        (QuantSpec(6, "apot", 16), True),
        (QuantSpec(8, "uniform", 16), True),
        (stepped(QuantSpec(), 0.1, 6), True),
        (stepped(QuantSpec(), 0.4, 8), False),  # few levels are in use
    ],
)
def test_training_starts_off_a_fine_grid_and_rounds_to_what_was_found(
    spec: QuantSpec, fine: bool, off_grid: bool
) -> None:
    """Weights on the grid would have half a step to go before any of them changes."""
    layer = QuantLinear.from_linear(nn.Linear(128, 64), spec)
    assert layer.quantizer is not None
    before, x = layer.weight.detach().clone(), inputs(512, 128)
    round_layers({"fc1": layer}, Moment(x.T @ x, x.sum(0), len(x)), off_grid)
    after = layer.fake_quantized_weight().detach()
    assert torch.equal(layer.quantizer(after), after)
    if not fine and not off_grid:
        assert torch.equal(layer.weight, after)
        return
    kept = layer.weight == before  # rounded as if alone: nothing pulls them from where they were
    assert kept.float().mean() > 0.4
    assert (layer.weight == after).float().mean() < 0.2
    between = (layer.weight - after).abs() <= (before - after).abs() * 1.001
    assert bool(between.all())


@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_a_student_with_far_to_go_starts_off_the_grid(decoder_layers: int) -> None:
    from dqw.distill.rounding import starts_off_grid

    teacher = make_tiny_whisper(decoder_layers=2)
    student = make_tiny_whisper(decoder_layers=decoder_layers)
    assert starts_off_grid(student, teacher, GuidanceConfig()) == (decoder_layers == 1)
    assert starts_off_grid(student, teacher, GuidanceConfig(mode="mutual"))


def test_languages_share_in_calibration_more_evenly_than_in_the_speech() -> None:
    """Each clip once, in order; a language of few clips gives all before another gives many."""
    codes = ["en"] * 40 + ["fr"] * 3 + [None] + ["ja"] * 20
    items = [Noise(str(i), language=code) for i, code in enumerate(codes)]
    chosen = balanced(items, 16)
    assert chosen == sorted(set(chosen)) and len(chosen) == 16
    found = Counter(codes[i] for i in chosen)
    # 40 ** 0.3 : 20 ** 0.3 = 3.0 : 2.5
    assert found == {"en": 7, "ja": 5, "fr": 3, None: 1}
    assert [i for i in chosen if codes[i] == "en"] == [0, 5, 11, 17, 22, 28, 34]
    assert balanced(items, 999) == list(range(64)) and balanced([], 4) == balanced(items, 0) == []


def test_of_recordings_some_windows_each_are_taken() -> None:
    """Not all of the first ones, and each file is decoded once."""
    loaded = []

    class Talk(NamedTuple):
        id: str
        seconds: float
        text: str | None = None
        language: str | None = "en"

        def load(self) -> np.ndarray:
            loaded.append(self.id)
            return np.random.default_rng(0).uniform(-1, 1, int(self.seconds * 16_000))

    items = [Talk(str(i), 40.0 if i % 2 else 3.0) for i in range(40)]
    found = stretches(items, 24, 2.0, "missing")
    long = [held for held in found if isinstance(held, Window)]
    assert 27 <= len(found) < 40 and len(long) == 8 * len(set(loaded)) == 8 * len(loaded)
    assert all(0 < held.seconds <= 2 and held.load().dtype == np.float32 for held in long)
    begins = sorted(float(held.id.split("@")[1]) / 16_000 for held in long[:8])
    assert begins[0] == 0 and begins[-1] > 30, "evenly spaced"
    assert len(stretches(items[1:2], 16, 2.0, "missing")) == 18, "more of it where it is all"
    assert len(stretches(items[1:2], 99, 2.0, "missing")) == 20
    for labels in ("missing", "all", "never"):
        told = [talk._replace(text="words") for talk in items]
        assert stretches(told[::2], 4, 2.0, labels) == [told[i] for i in (0, 10, 20, 30)]
    assert stretches(items, 4, 2.0, "never") == [items[i] for i in (0, 10, 20, 30)]


def test_padding_of_a_window_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dqw.quantize(make_tiny_whisper())
    features, ids = torch.full((2, 80, 3000), -1.5), torch.randint(3, 120, (2, 5))
    features[:, :, :400] = torch.randn(2, 80, 400)  # 200 of 1500 positions
    rows, add = [], Moment.add

    def counted(self: Moment, x: torch.Tensor, *rest: Any, **named: Any) -> None:
        rows.append(len(x))
        add(self, x, *rest, **named)

    monkeypatch.setattr(Moment, "add", counted)
    calibrate(model, [{"input_features": features, "decoder_input_ids": ids}])
    heard = 200 + REACH
    # Four inputs of each of the encoder's two layers; the decoder's hear all of the encoder.
    assert set(rows[:8]) == {2 * heard + -(-2 * (1500 - heard) // PADDING)}
    assert max(rows[8:]) == 2 * 1500
