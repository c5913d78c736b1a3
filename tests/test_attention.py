"""Attention of float Whispers on the kernel: where it serves, and that it leaves no trace."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_whisper
from kernel_helpers import BF16_SETS, instruction_set, needs_library
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.whisper.modeling_whisper import WhisperAttention

import dqw
from dqw import attention
from dqw.attention import attend, native_attention
from dqw.convert import quant_modules
from dqw.devices import lowered

pytestmark = needs_library
POSITIONS = 50


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of every call of ``attend``, whether the kernel serves it."""
    seen: list[bool] = []
    serves = attention._serves

    def note(*given: torch.Tensor) -> bool:
        seen.append(serves(*given))
        return seen[-1]

    monkeypatch.setattr(attention, "_serves", note)
    return seen


def hear(model: torch.nn.Module, low: bool) -> torch.Tensor:
    torch.manual_seed(0)
    features, ids = torch.randn(2, 80, 2 * POSITIONS), torch.randint(0, 120, (2, 7))
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        logits: torch.Tensor = model(input_features=features, decoder_input_ids=ids).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("tier", BF16_SETS)
def test_a_model_in_bfloat16_runs_on_the_kernel(tier: str, asked: list[bool]) -> None:
    model = make_tiny_whisper(max_source_positions=POSITIONS, d_model=64).eval()
    exact, plain = hear(model, False), hear(model, True)
    with instruction_set(tier), native_attention(model):
        found = hear(model, True)
    layers = model.config.encoder_layers + model.config.decoder_layers
    assert asked == [True] * layers  # the decoder's own tokens have a mask
    assert not torch.equal(found, plain)
    assert (found - exact).norm() < 2 * (plain - exact).norm()
    asked.clear()
    assert torch.equal(hear(model, True), plain) and not asked


@torch.no_grad()
@pytest.mark.parametrize("tier", BF16_SETS)
def test_lowered_models_do(tier: str, asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    model, other = (make_tiny_whisper(max_source_positions=POSITIONS).eval() for _ in range(2))
    with instruction_set(tier), lowered(model, other):
        for either in (model, other):
            either.model.encoder(torch.randn(1, 80, 2 * POSITIONS))
    assert asked == [True] * 2 * model.config.encoder_layers


@torch.no_grad()
def test_lowered_layers_round_their_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    model = make_tiny_whisper(max_source_positions=POSITIONS).eval()
    seen = list[torch.dtype]()
    for name, module in model.model.encoder.layers.named_modules():
        if name.endswith(("q_proj", "v_proj", "fc1")):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    features = torch.randn(1, 80, 2 * POSITIONS)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.model.encoder(features)[0]
    assert set(seen) == {torch.float32}
    seen.clear()
    with lowered(model), instruction_set("scalar"):  # attention is torch's, as it was
        last = model.model.encoder(features)[0]
    assert set(seen) == {torch.bfloat16}
    assert last.dtype == torch.float32 and torch.equal(last, plain)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model.model.encoder(features)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_take_float32_get_it(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    model = dqw.quantize(make_tiny_whisper(max_source_positions=POSITIONS).eval())
    if frozen:
        dqw.freeze(model)
    norms = [m for m in model.model.encoder.layers.modules() if isinstance(m, nn.LayerNorm)]
    with lowered(model):
        assert all(bool(m._forward_hooks) != frozen for m in norms)
    for module in quant_modules(model).values():
        module.spec = replace(module.spec, activations="int8")
    with lowered(model):
        assert not any(m._forward_hooks for m in norms)


@torch.no_grad()
@pytest.mark.parametrize("tier", ["avx512", "avx2", "scalar"])
def test_others_go_through_torch(tier: str, asked: list[bool]) -> None:
    model = make_tiny_whisper(max_source_positions=POSITIONS).eval()
    plain = hear(model, True)
    with instruction_set(tier), native_attention(model):
        assert torch.equal(hear(model, True), plain)
    assert asked and not any(asked)


@torch.no_grad()
def test_float32_stays_exact(asked: list[bool]) -> None:
    model = make_tiny_whisper(max_source_positions=POSITIONS).eval()
    plain = hear(model, False)
    with native_attention(model):
        assert torch.equal(hear(model, False), plain)
    assert asked and not any(asked)


def test_learning_goes_through_torch(asked: list[bool]) -> None:
    model = make_tiny_whisper(max_source_positions=POSITIONS)
    hear(model, True).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with native_attention(model):
        hear(model, True).sum().backward()
    assert asked and not any(asked)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_models_are_as_before() -> None:
    model, eager = (make_tiny_whisper(max_source_positions=POSITIONS) for _ in range(2))
    eager.set_attn_implementation("eager")

    def ways(m: torch.nn.Module) -> list[str]:
        return [
            str(part.config._attn_implementation)  # type: ignore[union-attr]
            for part in m.modules()
            if isinstance(part, WhisperAttention)
        ]

    with pytest.raises(ValueError, match="stop"), native_attention(model, eager):
        assert ways(model).count("dqw") == 4 and ways(model).count("sdpa") == 2
        assert set(ways(eager)) == {"eager"}
        assert model.config._attn_implementation == "sdpa"
        own = [p.config for p in model.modules() if isinstance(p, WhisperAttention)]
        raise ValueError("stop")
    assert set(ways(model)) == {"sdpa"}
    with native_attention(model):  # the same copies, or a compiled model would be compiled again
        again = [p.config for p in model.modules() if isinstance(p, WhisperAttention)]
    assert all(a is b for a, b in zip(own, again, strict=True))
    assert all(p.config is model.config for p in model.modules() if isinstance(p, WhisperAttention))


@torch.no_grad()
@pytest.mark.parametrize("scaling", [None, 1.0, 0.3])
def test_scaling_and_masks_are_those_of_torch(scaling: float | None) -> None:
    module = make_tiny_whisper().model.encoder.layers[0].self_attn
    q, k, v = (torch.randn(1, 2, n, 16).bfloat16() for n in (5, 9, 9))
    mask = torch.zeros(1, 1, 5, 9, dtype=torch.bfloat16)
    mask[..., 4:] = -1e9
    for given in (None, mask):
        found, weights = attend(module, q, k, v, given, scaling=scaling)
        wanted = scaled_dot_product_attention(q, k, v, given, scale=scaling).transpose(1, 2)
        assert weights is None and found.shape == wanted.shape and found.dtype == q.dtype
        assert (found - wanted).abs().max() < 0.03


@torch.no_grad()
def test_a_causal_call_is_not_the_kernels() -> None:
    """transformers makes no mask for an attention whose name it does not know."""
    q, k, v = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    causal, free = make_tiny_whisper().model.decoder.layers[0].self_attn, nn.Module()
    free.is_causal = False  # type: ignore[assignment]
    assert causal.is_causal
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    for module, given in ((causal, {}), (free, {"is_causal": True})):
        found, _ = attend(module, q, k, v, None, **given)
        assert (found - wanted).abs().max() < 0.03
    every = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert (attend(free, q, k, v, None)[0] - every).abs().max() < 0.03
    assert (every - wanted).abs().max() > 0.1
