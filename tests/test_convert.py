"""quantize → freeze → save → load: the same numbers at every station."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_whisper
from safetensors.torch import load_file
from transformers import AutoModel, WhisperForConditionalGeneration
from whisper_helpers import tiny

import dqw
from dqw import reference
from dqw.convert import quant_modules, round_float_rest
from dqw.errors import UserError
from dqw.hf import packed_state
from dqw.linear import QuantLinear
from dqw.packing import pack_scales, unpack_scales
from dqw.recipe import Override, QuantConfig, QuantSpec, Recipe
from dqw.save import save_student
from dqw.whisper.checkpoint import load_whisper, save_processor, verify_folder
from dqw.whisper.engines import open_engine

FEATURES = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 5, 7, 9], [1, 8, 3, 4]])

RECIPES = {
    "apot4 groups": QuantConfig(),
    "lloyd4": QuantConfig(grid="lloyd", group_size=16),
    "learned3": QuantConfig(bits=3, embedding_bits=4, grid="learned", group_size=16),
    "lloyd3 int8": QuantConfig(bits=3, embedding_bits=5, grid="lloyd", activations="int8"),
    "apot3 rows int8": QuantConfig(bits=3, embedding_bits=5, group_size=0, activations="int8"),
    "uniform2 norm": QuantConfig(bits=2, grid="uniform", group_size=32, weight_norm=True),
    "pot7 float embedding": QuantConfig(bits=7, grid="pot", embedding_bits=0, conv_bits=0),
}


@torch.no_grad()
def logits(model: torch.nn.Module, features: torch.Tensor = FEATURES) -> torch.Tensor:
    return model(input_features=features, decoder_input_ids=IDS).logits


@pytest.mark.parametrize("name", RECIPES)
def test_every_station_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = dqw.quantize(make_tiny_whisper(max_source_positions=50), Recipe(quant=RECIPES[name]))
    round_float_rest(model)
    learning = logits(model)
    noise = (logits(model, FEATURES * (1 + 1e-6)) - learning).abs().mean()
    packed = logits(dqw.freeze(model))
    if "int8" in name:  # sums in another order flip a few activation codes, as does such noise
        error = (packed - learning).abs().mean()
        assert error < 2 * noise and error < 0.02 * learning.std()
    else:
        torch.testing.assert_close(packed, learning, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), packed)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    if "int8" not in name:
        plain = dqw.dequantize(loaded)
        assert not quant_modules(plain)
        assert plain.proj_out.weight is plain.model.decoder.embed_tokens.weight
        torch.testing.assert_close(logits(plain), packed, rtol=0, atol=2e-5)


def test_frozen_weights_are_bit_for_bit_the_learned_ones() -> None:
    model = dqw.quantize(make_tiny_whisper(max_source_positions=50))
    for module in quant_modules(model).values():  # off the initial clips
        module.quantizer.clip.data.mul_(0.77)
    before = {
        n: m.fake_quantized_weight().detach().flatten(1) for n, m in quant_modules(model).items()
    }
    dqw.freeze(model)
    for name, module in quant_modules(model).items():
        assert torch.equal(module.dequantized_weight(), before[name]), name


def test_scales_of_groups_take_a_byte_in_a_folder(tmp_path: Path) -> None:
    model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
    model.save_pretrained(tmp_path)
    fc1 = model.model.encoder.layers[0].fc1
    assert fc1.scale.dtype == torch.float16
    stored = load_file(tmp_path / "model.safetensors")["model.encoder.layers.0.fc1.scale"]
    assert stored.dtype == torch.uint8 and stored.numel() < fc1.scale.numel()  # entropy-coded
    assert packed_state(model)["model.encoder.layers.0.fc1.scale"].numel() == 1 + fc1.scale.numel()


def test_clips_stay_in_the_window_that_a_byte_spans() -> None:
    """A group of zeros and a clip that training drives far off both end as what can be stored."""
    linear = torch.nn.Linear(128, 4)
    linear.weight.data[0, :64] = 0.0
    layer = dqw.QuantLinear.from_linear(linear, QuantSpec(group_size=64))
    layer.quantizer.clip.data[1, 0] *= 1e6
    learned = layer.fake_quantized_weight().detach()
    layer.freeze()
    again = unpack_scales(pack_scales(layer.scale), 4, 2)
    assert torch.equal(again, layer.scale)
    assert torch.equal(layer.dequantized_weight(), learned)
    assert layer.dequantized_weight()[0, :64].abs().max() < 1e-3 * linear.weight.abs().max()


def test_embedding_and_projection_share_one_tensor() -> None:
    model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
    names = [n for n in model.state_dict() if "embed_tokens" in n or "proj_out" in n]
    assert names == [f"model.decoder.embed_tokens.{t}" for t in ("weight", "scale", "levels")]
    twin = copy.deepcopy(model)
    assert twin.proj_out.embedding is twin.model.decoder.embed_tokens


def test_clip_and_weight_learn_and_only_used_embedding_rows_round() -> None:
    model = dqw.quantize(make_tiny_whisper(max_source_positions=50)).train()
    embedding, rounded = model.model.decoder.embed_tokens, []
    embedding.quantizer.register_forward_pre_hook(lambda _, given: rounded.append(len(given[0])))
    model(input_features=FEATURES, decoder_input_ids=IDS).logits.square().mean().backward()
    # The rows looked up, and all, once, where it is the output projection.
    assert sorted(rounded) == [IDS.numel(), embedding.rows]
    for name, module in quant_modules(model).items():
        assert module.quantizer.clip.grad.abs().sum() > 0, name
        assert module.weight.grad.abs().sum() > 0, name


def test_unchosen_layers_stay_float_or_take_rest_bits(tmp_path: Path) -> None:
    for rest_bits in (0, 8):
        model = dqw.quantize(
            make_tiny_whisper(max_source_positions=50),
            Recipe(quant=QuantConfig(rest_bits=rest_bits)),
        )
        fc1 = "model.encoder.layers.1.fc1"
        model.get_submodule(fc1).chosen = False
        round_float_rest(model)
        learning = logits(model)
        dqw.freeze(model)
        torch.testing.assert_close(
            logits(model), learning, rtol=0, atol=2e-3 if not rest_bits else 2e-5
        )
        model.save_pretrained(tmp_path / str(rest_bits))
        loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / str(rest_bits))
        kept = loaded.get_submodule(fc1)
        assert isinstance(kept, torch.nn.Linear) if not rest_bits else kept.spec.bits == 8
        assert torch.equal(logits(loaded), logits(model))


def test_casts_keep_scales_and_moves_take_everything() -> None:
    model = dqw.freeze(
        dqw.quantize(
            make_tiny_whisper(max_source_positions=50), Recipe(quant=QuantConfig(group_size=0))
        )
    )
    scale, high = model.model.encoder.layers[0].fc1.scale.clone(), logits(model)
    model.to(torch.bfloat16)
    assert model.model.encoder.layers[0].fc1.scale.dtype == torch.float32
    assert torch.equal(model.model.encoder.layers[0].fc1.scale, scale)
    with torch.no_grad():
        low = model(input_features=FEATURES.bfloat16(), decoder_input_ids=IDS).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.1)
    assert model.to("meta").model.encoder.layers[0].fc1.scale.device.type == "meta"


@pytest.mark.parametrize("group_size", [0, 16])
def test_a_learning_layer_may_be_cast(group_size: int) -> None:
    layer = dqw.QuantLinear.from_linear(torch.nn.Linear(64, 8), QuantSpec(group_size=group_size))
    assert layer.quantizer is not None
    before = layer.quantizer.scale()
    assert (layer.spec.group_size or 0) == group_size
    after = layer.half().quantizer.scale()
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0.1, atol=0)  # stored with 4 bits


def test_the_projection_follows_its_embedding_to_another_device() -> None:
    model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
    model.model.decoder.embed_tokens.to("meta")
    assert model.proj_out(torch.randn(2, model.config.d_model)).device.type == "meta"


def test_an_embedding_that_is_not_the_projection_is_refused() -> None:
    """A folder of both could not be read back."""
    model = make_tiny_whisper(max_source_positions=50)
    model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight.detach().clone())
    with pytest.raises(UserError, match=r"leave the embedding float \(--embedding-bits 0\)"):
        dqw.quantize(model)
    dqw.quantize(model, Recipe(quant=QuantConfig(embedding_bits=0)))


def test_loading_as_bfloat16_keeps_scales(tmp_path: Path) -> None:
    model = dqw.freeze(
        dqw.quantize(
            make_tiny_whisper(max_source_positions=50), Recipe(quant=QuantConfig(group_size=0))
        )
    )
    model.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.generate(FEATURES.bfloat16(), max_new_tokens=2)
    fc1 = loaded.model.encoder.layers[0].fc1
    assert fc1.scale.dtype == torch.float32 and fc1.bias.dtype == torch.bfloat16
    assert torch.equal(fc1.scale, model.model.encoder.layers[0].fc1.scale)


def test_generate_runs_on_a_packed_model() -> None:
    model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
    assert model.generate(FEATURES, max_new_tokens=4).shape[0] == 2


def test_encoder_compiles_whole() -> None:
    model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
    encoder = model.get_encoder()
    x = torch.randn(1, 80, 100)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], encoder(x)[0])


def test_without_dqw_the_folder_fails_loudly(tmp_path: Path) -> None:
    dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50))).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import WhisperForConditionalGeneration as W; "
        "W.from_pretrained(sys.argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode != 0 and "size mismatch" in run.stdout + run.stderr


def test_least_squares_clip_beats_the_largest_weight() -> None:
    w = torch.randn(32, 256)
    for bits, grid in ((3, "apot"), (4, "apot"), (4, "uniform"), (8, "apot")):
        spec = QuantSpec(bits=bits, grid=grid, group_size=None)
        quantizer = dqw.FakeQuantize(spec, w)
        widest = w.abs().amax(1, keepdim=True) / quantizer.level_max
        error = (quantizer(w) - w).square().sum(1)
        assert (
            error <= (reference.fake_quant(w, widest, quantizer.bucket, 0) - w).square().sum(1)
        ).all()
        assert (
            error.sum()
            < 0.9 * (reference.fake_quant(w, widest, quantizer.bucket, 0) - w).square().sum()
        )


def test_a_group_that_does_not_divide_is_padded() -> None:
    linear = torch.nn.Linear(70, 6)
    layer = dqw.QuantLinear.from_linear(linear, QuantSpec(group_size=64))
    x = torch.randn(3, 70)
    learning = layer(x)
    layer.freeze()
    torch.testing.assert_close(layer(x), learning)
    assert layer.scale.shape == (6, 2)


@pytest.mark.parametrize("group_size", [None, 16, 32])
def test_int8_layer_equals_its_fake_quantization(group_size: int | None) -> None:
    spec = QuantSpec(group_size=group_size, activations="int8")
    layer = dqw.QuantLinear.from_linear(torch.nn.Linear(256, 48), spec)
    x = torch.randn(5, 256)
    learning = layer(x)
    layer.freeze()
    torch.testing.assert_close(layer(x), learning, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_zero() -> None:
    linear = torch.nn.Linear(64, 3)
    linear.weight.data[1] = 0
    layer = dqw.QuantLinear.from_linear(linear, QuantSpec())
    layer.freeze()
    assert torch.equal(layer.dequantized_weight()[1], torch.zeros(64))


def test_plan_follows_overrides_and_skips() -> None:
    model = make_tiny_whisper(max_source_positions=50)
    config = QuantConfig(
        skip=["model.encoder.conv*"],
        override=[Override(match="*.fc1", bits=3, grid="uniform", group_size=0)],
    )
    plan = Recipe(quant=config).plan(model)
    assert "model.encoder.conv1" not in plan and "proj_out" not in plan
    assert plan["model.decoder.layers.1.fc1"] == QuantSpec(bits=3, grid="uniform", group_size=None)
    assert plan["model.decoder.embed_tokens"].bits == 4
    with pytest.raises(dqw.UserError, match="matches no layer"):
        Recipe(quant=QuantConfig(skip=["decoder.fc9"])).plan(model)


def test_quantizing_twice_is_refused() -> None:
    model = dqw.quantize(make_tiny_whisper(max_source_positions=50))
    with pytest.raises(dqw.UserError, match="already"):
        dqw.quantize(model)
    with pytest.raises(dqw.UserError, match="no quantized layers"):
        dqw.freeze(make_tiny_whisper(max_source_positions=50))


def test_a_tied_embedding_that_stays_float_is_stored_once(tmp_path: Path) -> None:
    model = make_tiny_whisper(max_source_positions=50)
    dqw.freeze(dqw.quantize(model, Recipe(quant=QuantConfig(embedding_bits=0))))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = [name for name, tensor in stored.items() if tensor.shape == (120, 64)]
    assert names == ["model.decoder.embed_tokens.weight"]
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert again.proj_out.weight is again.model.decoder.embed_tokens.weight
    torch.testing.assert_close(logits(again), logits(model))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(dqw.UserError, match="format 99"):
        WhisperForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["bfloat16", "int8", "shards"])
def test_a_packed_folder_saved_again_says_what_it_holds(change: str, tmp_path: Path) -> None:
    """The checksum of other bytes and the plan of other settings do not travel along."""
    whisper, processor = tiny(tmp_path / "float")
    first, again = tmp_path / "first", tmp_path / "again"
    save_student(dqw.quantize(whisper), processor, first, {"from": "tiny"})
    dtype = torch.bfloat16 if change == "bfloat16" else torch.float32
    model = WhisperForConditionalGeneration.from_pretrained(first, dtype=dtype)
    if change == "bfloat16":
        with torch.no_grad():
            model.model.decoder.layer_norm.bias += 1
    if change == "int8":
        dqw.set_activations(model, "int8")
    model.save_pretrained(again, max_shard_size="60KB" if change == "shards" else "5GB")
    save_processor(processor, again)
    assert (again / "model.safetensors").is_file() == (change != "shards")
    kept = verify_folder(again)["quantization_config"]
    assert kept["made_by"] == {"from": "tiny"} and "weights_sha256" not in kept
    loaded, _ = load_whisper(again)
    specs = {name: m.spec for name, m in quant_modules(loaded).items()}
    assert specs == {name: m.spec for name, m in quant_modules(model).items()}
    assert any(spec.activations == "int8" for spec in specs.values()) == (change == "int8")
    assert open_engine(again).text([7])


def test_a_dequantized_model_saves_as_an_ordinary_one(tmp_path: Path) -> None:
    for number, back in enumerate((dqw.dequantize, lambda model: model.dequantize())):
        model = dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50)))
        model.save_pretrained(tmp_path / "packed")  # also makes a string of config.dtype
        plain = back(model)
        plain.save_pretrained(tmp_path / str(number))
        found, notes = WhisperForConditionalGeneration.from_pretrained(
            tmp_path / str(number), output_loading_info=True
        )
        assert not hasattr(found.config, "quantization_config") and not notes["missing_keys"]
        assert torch.equal(logits(found), logits(plain))


def test_the_bare_model_is_not_taken_for_damage(tmp_path: Path) -> None:
    dqw.freeze(dqw.quantize(make_tiny_whisper(max_source_positions=50))).save_pretrained(tmp_path)
    with pytest.raises(dqw.UserError, match=r"WhisperForConditionalGeneration and take its .model"):
        AutoModel.from_pretrained(tmp_path)


def test_positions_that_are_a_formula_are_not_stored(tmp_path):
    name = "model.encoder.embed_positions.weight"
    model = make_tiny_whisper(max_source_positions=50)
    exact = model.get_parameter(name).data.clone()
    model.get_parameter(name).data.copy_(exact.half())
    model = dqw.freeze(dqw.quantize(model))
    assert torch.equal(model.get_parameter(name), exact)
    model.save_pretrained(tmp_path / "formula")
    assert name not in load_file(str(tmp_path / "formula" / "model.safetensors"))
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "formula")
    assert torch.equal(loaded.get_parameter(name), exact)
    model.get_parameter(name).data[3] += 0.5  # trained: no formula gives it
    model.save_pretrained(tmp_path / "trained")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert torch.allclose(loaded.get_parameter(name), model.get_parameter(name), atol=1e-3)


def test_a_move_that_fails_loses_nothing() -> None:
    """A GPU that is full: the model goes on where it is."""
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), QuantSpec())
    layer.freeze()
    x = torch.randn(2, 64)
    before = layer(x)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(full)
    assert torch.equal(layer(x), before)
    scale = layer.scale.clone()
    assert torch.equal(layer.half().scale, scale) and layer.dtype == torch.float16
    empty = layer.to("meta").to_empty(device="cpu")
    assert empty.scale.device.type == "cpu" and empty.scale.dtype == scale.dtype
