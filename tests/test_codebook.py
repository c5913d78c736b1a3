"""Learned grids: levels that are found, trained, frozen and loaded again."""

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_whisper
from torch import Tensor, nn
from torch.nn import functional as F

import dqw
from dqw import grids
from dqw.codebook import CodebookQuantize, fake_quantizer, found_levels, rounded_levels
from dqw.compensate import Curvature, compensated
from dqw.convert import quant_modules
from dqw.distill.config import TrainConfig
from dqw.distill.stepping import parameter_groups
from dqw.errors import UserError
from dqw.fake_quant import FakeQuantize
from dqw.linear import QuantLinear
from dqw.recipe import QuantConfig, QuantSpec, Recipe

SPECS = [
    QuantSpec(bits=2, grid="learned", group_size=None),
    QuantSpec(bits=3, grid="learned", group_size=16),
    QuantSpec(bits=4, grid="learned", group_size=None, weight_norm=True),
    QuantSpec(bits=5, grid="learned", group_size=None, per_tensor=True),
]


def start(bits: int) -> Tensor:
    return torch.tensor(grids.magnitudes("learned", bits))


def quantizer_of(spec: QuantSpec, weight: Tensor) -> CodebookQuantize:
    made = fake_quantizer(spec, weight)
    assert isinstance(made, CodebookQuantize)
    return made


@pytest.mark.parametrize("group", [0, 16])
def test_levels_that_weights_have_are_found(group: int) -> None:
    """Weights that hold four magnitudes, each row or group by a scale of its own."""
    true = torch.tensor([20.0, 45.0, 90.0, 127.0])
    size = group or 64
    scale = torch.exp(torch.randn(200, 64 // size)).repeat_interleave(size, 1)
    weight = scale * true[torch.randint(0, 4, (200, 64))] * torch.randn(200, 64).sign()
    spec = QuantSpec(bits=3, grid="learned", group_size=group)
    found = found_levels(weight, spec, start(3))
    assert (127 * found / found[-1] - true).abs().max() < 1


def test_levels_go_where_errors_count() -> None:
    """Half of the columns have one shape, half another; the levels are those of what counts."""

    def of(levels: tuple[int, int], rows: int = 300) -> Tensor:
        choice = torch.tensor(levels, dtype=torch.float32)[torch.randint(0, 2, (rows, 32))]
        return choice * torch.randn(rows, 32).sign()

    weight = torch.cat([of((30, 100)), of((50, 100))], 1)
    spec = QuantSpec(bits=2, grid="learned", group_size=None)
    ratio = []
    for left, right in ((1.0, 1e-4), (1e-4, 1.0)):
        importance = torch.tensor([left] * 32 + [right] * 32)
        found = found_levels(weight, spec, start(2), importance)
        ratio.append(float(found[0] / found[1]))
    assert ratio[0] == pytest.approx(0.3, abs=0.02) and ratio[1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("bits", grids.widths("learned"))
def test_levels_have_less_error_than_the_table_they_begin_with(bits: int) -> None:
    weight = torch.rand(128, 128) - 0.5  # uniform, as no Lloyd level expects
    error = []
    for grid in ("lloyd", "learned"):
        spec = QuantSpec(bits=bits, grid=grid, group_size=None)
        error.append(float((fake_quantizer(spec, weight)(weight) - weight).detach().square().sum()))
    assert error[1] < 0.95 * error[0]


@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.4, 0.3], [2.0, 2.0, 2.0], [-1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.1, 0.9, 0.95]],
)
def test_levels_in_use_rise_and_are_bytes(shares: list[float]) -> None:
    quantizer = quantizer_of(SPECS[1], torch.randn(4, 32))
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor(shares))
    levels = quantizer.magnitudes()
    assert bool((levels[1:] > levels[:-1]).all()) and levels[0] > 0 and levels[-1] == 127
    grid = quantizer.packed_spec().grid
    assert grids.magnitudes(grid, 3) == tuple(levels.tolist())
    assert torch.equal(quantizer.bucket, grids.bucket(grid, 3))
    assert torch.equal(rounded_levels(levels.float()), levels)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_levels_are_the_closed_form(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 40, dtype=dtype)
    quantizer = quantizer_of(spec, weight)
    grad = torch.randn(9, 40, dtype=dtype)
    twin = FakeQuantize(quantizer.packed_spec(), weight)  # the same levels, which stay
    with torch.no_grad():
        twin.clip.copy_(quantizer.clip)
        if spec.group_size:
            twin.window.copy_(quantizer.window)
    rounded = quantizer(weight.requires_grad_())
    rounded.backward(grad)
    assert weight.grad is not None and quantizer.clip.grad is not None
    own, weight.grad = weight.grad, None
    twin(weight).backward(grad)
    assert torch.equal(rounded, twin(weight)) and torch.equal(own, weight.grad)
    assert torch.equal(quantizer.clip.grad, twin.clip.grad)

    scale = quantizer.scale()
    groups = torch.arange(40) // (spec.group_size or 40)
    clip = 127 * scale.expand(9, -1)[:, groups.clamp(max=scale.shape[1] - 1)].double()
    share = rounded.detach().double() / clip
    for place, level in enumerate(quantizer.magnitudes()[:-1]):
        here = (share.abs() * 127 - level).abs() < 0.6
        expected = (grad.double() * share.sign() * clip)[here].sum() / (9 * 40 * 127) ** 0.5
        assert quantizer.codebook.grad is not None
        torch.testing.assert_close(
            quantizer.codebook.grad[place].double(), expected, rtol=1e-4, atol=1e-5
        )


def test_the_rows_that_are_looked_up_count_as_in_the_product() -> None:
    """A tied embedding rounds some rows in one call and all in another: one codebook learns."""
    weight = torch.randn(50, 32)
    quantizer = quantizer_of(SPECS[1], weight)
    grad, found = torch.randn(50, 32), []
    for rows in (torch.arange(50), torch.arange(20)):
        quantizer.zero_grad()
        some = torch.zeros(50, 32)
        some[rows] = grad[rows]
        quantizer(weight).backward(some)
        assert quantizer.codebook.grad is not None
        found.append(quantizer.codebook.grad.clone())
        quantizer.zero_grad()
        quantizer(weight[rows], rows).backward(grad[rows])
        torch.testing.assert_close(quantizer.codebook.grad, found[-1])


def test_training_moves_levels_to_where_the_loss_wants_them() -> None:
    """The weight cannot change; outputs of other levels can only be met by the codebook."""
    weight = torch.randn(16, 64)
    layer = QuantLinear.from_linear(nn.Linear(64, 16), SPECS[0])
    quantizer = layer.quantizer = quantizer_of(SPECS[0], weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    clip = quantizer.clip.requires_grad_(False)
    target = torch.where(weight.abs() > clip * 0.6, 1.0, 0.55) * clip * weight.sign()
    optimizer = torch.optim.Adam([quantizer.codebook], lr=0.02)
    for _ in range(60):
        x = torch.randn(64, 64)
        loss = F.mse_loss(layer(x), x @ target.T + layer.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(quantizer.codebook[0].detach()) == pytest.approx(0.55, abs=0.06)


def test_only_what_learns_has_a_gradient() -> None:
    weight = torch.randn(8, 32, requires_grad=True)
    quantizer = quantizer_of(SPECS[0], weight)
    quantizer.codebook.requires_grad_(False)
    quantizer(weight).sum().backward()
    assert quantizer.codebook.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not quantizer(weight).requires_grad


@pytest.mark.parametrize("spec", SPECS[1:3])
def test_compensation_finds_levels_for_the_inputs(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(512, 30) @ torch.randn(30, 120) + torch.randn(512, 120), torch.rand(80, 120)
    w = w - 0.5
    error = []
    for fits in (False, True):
        quantizer = quantizer_of(spec, w)
        if not fits:
            monkeypatch.setattr(CodebookQuantize, "fit", lambda *_: None)
            quantizer.set_levels(start(spec.bits).float())
        found = compensated(w, Curvature.of(x.T @ x), quantizer)
        assert torch.equal(quantizer(found).detach(), found)
        error.append(float((x @ (found - w).T).square().sum()))
        monkeypatch.undo()
    assert error[1] < 0.97 * error[0]


def test_a_model_learns_is_frozen_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_tiny_whisper(max_source_positions=50)
    recipe = Recipe(QuantConfig(bits=3, grid="learned", group_size=16, embedding_bits=4))
    dqw.quantize(model, recipe)
    names = [n for n, _ in model.named_parameters() if n.endswith(".codebook")]
    assert len(names) == sum("conv" not in n for n in quant_modules(model))
    ids = torch.randint(0, 120, (2, 12))
    batch = {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": ids}
    config = TrainConfig(clip_lr=3e-2)
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    for _ in range(3):
        loss = F.cross_entropy(model(**batch).logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = [n for n in names if not torch.equal(before[n], model.get_parameter(n))]
    assert len(moved) == len(names)

    state = {k: v.clone() for k, v in model.state_dict().items()}  # as of a checkpoint
    twin = make_tiny_whisper(max_source_positions=50)
    dqw.quantize(twin, recipe)
    twin.load_state_dict(state)
    model.eval(), twin.eval()
    with torch.no_grad():
        learned = model(**batch).logits
        assert torch.equal(twin(**batch).logits, learned)
        dqw.freeze(model)
        frozen = model(**batch).logits
    torch.testing.assert_close(frozen, learned, rtol=0, atol=2e-2)  # biases are float16 now
    tables = {tuple(m.levels.tolist()) for m in quant_modules(model).values()}
    assert len(tables) > 3  # each layer its own
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, frozen, rtol=0, atol=1e-5)
    spec = quant_modules(again)["model.decoder.layers.0.fc1"].spec
    assert spec.grid.count(",") == 3 and spec.grid.endswith(",127")


def test_levels_may_be_spelled_out() -> None:
    weight = torch.randn(8, 32)
    spelled = FakeQuantize(QuantSpec(bits=2, grid="1,3", group_size=None), weight)
    named = FakeQuantize(QuantSpec(bits=2, grid="stretched", group_size=None), weight)
    assert torch.equal(spelled(weight), named(weight))
    with pytest.raises(UserError, match="the 1,3 grid has 2 bits, not 4: choose one of"):
        QuantConfig(grid="1,3")
    mixed = QuantConfig(bits=2, grid="1,3", embedding_bits=4)
    plan = Recipe(mixed).plan(make_tiny_whisper(max_source_positions=50))
    assert plan["model.decoder.embed_tokens"].grid == "uniform"
    assert plan["model.decoder.layers.0.fc1"].grid == "1,3"


@pytest.mark.parametrize("grid", ["3,1", "1,2,3", "1,200", "1", "1,", "1,1", "0x1,3", ""])
def test_levels_that_are_none_are_refused(grid: str) -> None:
    with pytest.raises(UserError, match="is not known: choose one of apot"):
        QuantSpec(bits=2, grid=grid)


def test_learned_grids_have_two_to_five_bits() -> None:
    with pytest.raises(UserError, match="the learned grid has 2 to 5 bits, not 6: choose uniform"):
        QuantSpec(bits=6, grid="learned")
    with pytest.raises(UserError, match="the 1,3 grid has 2 bits, not 3"):
        grids.check_grid("1,3", 3)


def test_compiled_training_is_the_same() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 32), SPECS[1])
    assert isinstance(layer.quantizer, CodebookQuantize)
    x, found = torch.randn(5, 64), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        run(x).square().sum().backward()
        assert layer.quantizer.codebook.grad is not None
        found.append(layer.quantizer.codebook.grad.clone())
    torch.testing.assert_close(found[0], found[1])
