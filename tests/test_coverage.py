"""Which models the native networks serve, and that these follow the models."""

import copy

import pytest
import torch
from conftest import make_tiny_whisper
from kernel_helpers import needs_library
from test_fast import ids_and_states, packed, reference, stepwise

from dqw.convert import set_activations
from dqw.whisper.coverage import coverage, encoder_uncovered, uncovered
from dqw.whisper.fast import (
    FastDecoder,
    Session,
    fast_decoder,
    fast_encoder,
)

pytestmark = needs_library


@pytest.fixture(scope="module")
def small():
    return packed(make_tiny_whisper())


def test_the_encoder_that_is_asked_for_more_runs_plainly(small):
    batch = torch.randn(1, 80, 3000)
    encoder = small.model.encoder
    assert encoder(batch).last_hidden_state.requires_grad  # as in training what stays float
    with torch.inference_mode():
        assert len(encoder(batch, output_hidden_states=True).hidden_states) == 3
        with pytest.raises(ValueError, match="3000"):
            encoder(batch[:, :, :200])
    assert fast_encoder(encoder) is not None
    with pytest.raises(RuntimeError, match="mel bins"):
        fast_encoder(encoder)(torch.randn(1, 8, 3000))


def test_info_says_who_serves_a_folder(small):
    config = small.config.to_dict()
    assert coverage(config) == {"encoder": "native", "decoder": "native"}
    wide = {"grid": "pot", "bits": 6, "activations": "int8"}
    config["quantization_config"]["plan"]["model.encoder.conv2"] |= wide
    assert coverage(config)["encoder"] == "plain: its conv2 has levels beyond 8 bits"
    del config["quantization_config"]["plan"]["model.encoder.conv1"]
    assert coverage(config)["encoder"] == "plain: its conv1 is not packed"
    del config["quantization_config"]
    assert "not packed" in coverage(config)["decoder"]


def test_a_network_follows_its_model(small):
    model = copy.deepcopy(small)
    part = fast_decoder(model)
    assert fast_decoder(model) is part and part is not fast_decoder(small)
    set_activations(model, "int8")
    assert fast_decoder(model) is not part
    assert "training mode" in uncovered(model.train()) and fast_decoder(model) is None
    assert "float32" in uncovered(model.eval().to(torch.bfloat16))
    assert "vocabulary" in uncovered(packed(make_tiny_whisper(), embedding_bits=0))
    skipped = packed(make_tiny_whisper(), skip=["*decoder.layers.1.fc1"])
    assert "layers.1.fc1 is not packed" in uncovered(skipped)
    assert "heads" in uncovered(packed(make_tiny_whisper(decoder_attention_heads=8)))


def test_a_network_follows_its_scales_and_levels(small):
    """Another tensor in their place, as load_state_dict(assign=True) puts it there."""
    model = copy.deepcopy(small)
    ids, states = ids_and_states()
    for name in ("scale", "levels"):
        layer = model.model.decoder.layers[1].fc2
        setattr(layer, name, getattr(layer, name) * 2)
        session = Session(fast_decoder(model), states, 16, cross_type="float32")
        found, wanted = stepwise(session, ids), reference(model, ids, states)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_a_network_follows_levels_that_are_written_over(small):
    """As load_state_dict puts another checkpoint's there: the same memory, and other values."""
    model = copy.deepcopy(small)
    ids, states = ids_and_states()
    before = stepwise(Session(fast_decoder(model), states, 16, cross_type="float32"), ids)
    other = {k: v * 2 if k.endswith(".levels") else v for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    found = stepwise(Session(fast_decoder(model), states, 16, cross_type="float32"), ids)
    wanted = reference(model, ids, states)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert not torch.allclose(found, before, rtol=0, atol=1e-3 * float(wanted.abs().max()))


def test_norms_of_another_kind_run_plainly(small):
    for change in ("eps", "bias", "type"):
        model = copy.deepcopy(small)
        for part in (model.model.decoder, model.model.encoder):
            norm = part.layers[1].final_layer_norm
            if change == "eps":
                norm.eps = 1e-3
            elif change == "bias":
                norm.bias = None
            else:
                part.layers[1].final_layer_norm = torch.nn.RMSNorm(64)
        assert "norm is not Whisper's" in uncovered(model), change
        assert "norm is not Whisper's" in encoder_uncovered(model.model.encoder), change
        assert fast_decoder(model) is None and fast_encoder(model.model.encoder) is None


@pytest.mark.parametrize("name", ["scale", "levels", "bias"])
def test_a_model_that_lies_elsewhere_in_part_runs_plainly(small, name):
    model = copy.deepcopy(small)
    for part in (model.model.decoder, model.model.encoder):
        layer = part.layers[1].fc1
        moved = getattr(layer, name).detach().to("meta")
        setattr(layer, name, torch.nn.Parameter(moved) if name == "bias" else moved)
    assert fast_decoder(model) is None and fast_encoder(model.model.encoder) is None
    with pytest.raises(RuntimeError, match="on the CPU"):
        FastDecoder(model)
