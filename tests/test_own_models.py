"""quantize and freeze in models that are not transformers' Whisper."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_whisper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dqw
from dqw.convert import dequantize, quant_modules, set_activations
from dqw.errors import UserError
from dqw.linear import QuantLinear
from dqw.recipe import QuantConfig, QuantSpec, Recipe

ROWS = Recipe(quant=QuantConfig(group_size=0))


def linears(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def test_what_is_not_quantized_stays_as_it_is() -> None:
    """No folder of dqw will hold it: float16 would turn a mask's -1e9 into an infinity."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    model.register_buffer("mask", torch.tensor([-1e9, 1e-8, 4097.0]))
    model[1].running_var.fill_(1e6)
    bias = model[0].bias.detach().clone()
    dqw.freeze(dqw.quantize(model, ROWS))
    assert model.mask.tolist() == torch.tensor([-1e9, 1e-8, 4097.0]).tolist()
    assert model[1].running_var.unique().item() == 1e6 and torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("config", [{"width": 16}, SimpleNamespace(width=16)])
def test_a_config_of_its_own(config: object) -> None:
    model = linears(16, 16)
    model.config = config
    assert dqw.freeze(dqw.quantize(model, ROWS))(torch.randn(2, 16)).shape == (2, 16)
    assert model.config is config


@pytest.mark.parametrize("batch", [2, 3])
def test_what_torchs_own_layers_read_themselves_is_left_out(batch: int) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(32, 8)).eval()
    x = torch.randn(batch, 5, 32)
    dqw.quantize(model, ROWS)
    assert list(quant_modules(model)) == ["1"]
    model(x).sum().backward()
    with torch.no_grad():
        assert dqw.freeze(model)(x).shape == (batch, 5, 8)

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = nn.Sequential(Twice(16, 16), nn.Linear(16, 16))
    assert list(quant_modules(dqw.quantize(own, ROWS))) == ["1"]


class Block(nn.Module):
    """Half of it is computed again in backward, without the block's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        part = checkpoint(self.second, self.first(x).relu(), use_reentrant=False)
        assert isinstance(part, Tensor)
        return part


def test_a_block_that_checkpoints_a_part_of_itself() -> None:
    model = nn.ModuleList([Block()])
    dqw.quantize(model, ROWS)
    x = torch.randn(3, 16)
    model[0](x).square().sum().backward()
    block = model[0]
    found = block.second.weight.grad.clone()
    model.zero_grad()
    block.second(block.first(x).relu()).square().sum().backward()
    assert torch.equal(found, block.second.weight.grad)


@pytest.mark.parametrize("chosen", [True, False])
def test_activations_outlive_freezing(chosen: bool) -> None:
    if chosen:
        model = set_activations(dqw.quantize(linears(32, 16, 8), ROWS), "int8")
    else:  # left to its rest bits
        config = QuantConfig(group_size=0, activations="int8", rest_bits=8)
        model = dqw.quantize(linears(32, 16, 8), Recipe(quant=config))
        for module in quant_modules(model).values():
            module.chosen = False
    x = torch.randn(4, 32)
    learning = model(x).detach()
    packed = dqw.freeze(model)(x)
    assert {module.spec.activations for module in quant_modules(model).values()} == {"int8"}
    torch.testing.assert_close(packed, learning, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_plain_layer_has_the_dtype_of_the_model(frozen: bool) -> None:
    model = dqw.quantize(linears(32, 16, 8).bfloat16(), ROWS)
    if frozen:
        dqw.freeze(model)
    x = torch.randn(4, 32).bfloat16()
    before = model(x).float()
    plain = dequantize(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(x).float(), before, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "circular padding"),
        (nn.Conv1d(4, 4, 3, groups=2), "2 groups"),
        (nn.Conv1d(4, 4, 3, padding="same", dilation=2), r"dilation \(2,\), padding 'same'"),
        (nn.Embedding(9, 4, max_norm=1.0, sparse=True), "max_norm, sparse"),
    ],
)
def test_what_a_twin_has_not_is_refused_before_anything_is_swapped(
    layer: nn.Module, words: str
) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "embed_tokens": layer})
    with pytest.raises(UserError, match="embed_tokens has " + words):
        dqw.quantize(model, ROWS)
    assert not quant_modules(model)
    dqw.quantize(model, Recipe(quant=QuantConfig(group_size=0, skip=["embed_tokens"])))


def test_a_model_with_nothing_to_quantize() -> None:
    with pytest.raises(UserError, match=r"nothing to quantize: no nn\.Linear"):
        dqw.quantize(nn.LayerNorm(4))


def test_one_layer_in_two_places() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 16)
    dqw.quantize(model, ROWS)
    assert model[0] is model[2] and isinstance(model[2], QuantLinear)
    frozen = dqw.freeze(model)(x)
    plain = dequantize(model)
    assert plain[0] is plain[2] and torch.allclose(plain(x), frozen, atol=1e-5)


def test_a_projection_of_its_own_is_a_layer_like_others(tmp_path) -> None:
    """Whisper's, untied."""
    from transformers import WhisperForConditionalGeneration

    model = make_tiny_whisper(max_source_positions=50)
    model.config.tie_word_embeddings = False
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
    recipe = Recipe(quant=QuantConfig(embedding_bits=0))
    dqw.freeze(dqw.quantize(model, recipe))
    assert isinstance(model.proj_out, QuantLinear)
    model.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    batch = {
        "input_features": torch.randn(1, 80, 100),
        "decoder_input_ids": torch.tensor([[1, 5, 7]]),
    }
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("group_size", [0, 16])
def test_an_empty_layer_takes_a_frozen_ones_state(group_size: int) -> None:
    spec = QuantSpec(group_size=group_size or None)
    layer = QuantLinear.from_linear(nn.Linear(40, 24), spec)
    layer.freeze()
    empty = QuantLinear(40, 24, True, spec)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(empty(x), layer(x))


def test_a_quantized_part_of_a_model_under_ddp() -> None:
    """No collective takes int16, and DistributedDataParallel sends all buffers."""
    part = dqw.quantize(linears(32, 16, 8), Recipe(quant=QuantConfig(group_size=16)))
    part._ddp_params_and_buffers_to_ignore = ["mine"]
    model = nn.Sequential(part, nn.Linear(8, 4))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        wrapped(torch.randn(3, 32)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert part._ddp_params_and_buffers_to_ignore == ["mine"]
    assert not [n for n, b in model.named_buffers() if b.dtype == torch.int16]


def test_second_derivatives_are_refused_aloud() -> None:
    """The closed form has none: zeros would be a wrong answer."""
    for grid in ("apot", "learned"):
        model = dqw.quantize(linears(16, 8), Recipe(quant=QuantConfig(grid=grid, group_size=0)))
        loss = model(torch.randn(3, 16)).square().sum()
        (slope,) = torch.autograd.grad(loss, [model[0].weight], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()
