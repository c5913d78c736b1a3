"""Error-compensating rounding: less error where it counts, on the same grid."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny_whisper

import dqw
from dqw.calibrate import calibrate
from dqw.compensate import EMBEDDING_DAMPING, Moment, compensated, round_layer
from dqw.embedding import QuantEmbedding
from dqw.fake_quant import FakeQuantize
from dqw.linear import QuantLinear
from dqw.recipe import QuantSpec


def inputs(rows: int, cols: int) -> torch.Tensor:
    """Correlated, as activations are: a quarter as many directions as features, and noise."""
    return torch.randn(rows, cols // 4) @ torch.randn(cols // 4, cols) + torch.randn(rows, cols)


@pytest.mark.parametrize(("grid", "bits", "group"), [("apot", 4, 64), ("uniform", 3, None)])
def test_compensation_lowers_the_output_error(grid: str, bits: int, group: int | None) -> None:
    x, w = inputs(512, 200), torch.randn(96, 200)
    quantizer = FakeQuantize(QuantSpec(bits=bits, grid=grid, group_size=group), w)
    plain = quantizer(w).detach()
    better = compensated(w, x.T @ x, quantizer)
    error = [(x @ (q - w).T).square().sum() for q in (better, plain)]
    assert error[0] < 0.6 * error[1]
    assert torch.equal(quantizer(better), better)  # on the grid: rounding leaves it as it is


def test_without_correlation_it_is_plain_rounding() -> None:
    w = torch.randn(8, 130)
    quantizer = FakeQuantize(QuantSpec(group_size=32), w)
    moment = torch.eye(130)
    assert torch.equal(compensated(w, moment, quantizer), quantizer(w))


def test_dead_inputs_and_few_rows_are_no_trouble() -> None:
    x, w = torch.randn(5, 130), torch.randn(8, 130)
    x[:, 7] = 0
    quantizer = FakeQuantize(QuantSpec(group_size=None), w)
    assert compensated(w, x.T @ x, quantizer).isfinite().all()


def test_an_embedding_is_damped_more_because_its_rows_are_inputs() -> None:
    x, table = inputs(256, 64), torch.nn.Embedding(40, 64)
    layer = QuantEmbedding.from_embedding(table, QuantSpec(group_size=32))
    quantizer = FakeQuantize(QuantSpec(group_size=32), table.weight)
    want = compensated(table.weight.detach().clone(), x.T @ x, quantizer, EMBEDDING_DAMPING)
    less = compensated(table.weight.detach().clone(), x.T @ x, quantizer)
    round_layer("embed_tokens", layer, Moment(x.T @ x, x.sum(0), len(x)))
    assert torch.equal(layer.weight, want) and not torch.equal(want, less)


def test_rounding_itself_is_never_in_bfloat16() -> None:
    x, linear = inputs(512, 192), torch.nn.Linear(192, 48)
    moment, found = Moment(x.T @ x, x.sum(0), len(x)), []
    for lowered in (False, True):
        layer = QuantLinear.from_linear(copy.deepcopy(linear), QuantSpec(bits=3, group_size=64))
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            round_layer("fc1", layer, moment)
        found.append((layer.weight, layer.bias))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


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
