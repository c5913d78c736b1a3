"""The native encoder and decoder against the plain model: logits within rounding, same tokens."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from kernel_helpers import BF16_SETS, instruction_set, needs_library
from kernel_helpers import INSTRUCTION_SETS as TIERS
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_helpers import tiny

import dqw
from dqw.convert import set_activations
from dqw.recipe import Override, QuantConfig, Recipe
from dqw.whisper.checkpoint import save_processor
from dqw.whisper.coverage import uncovered
from dqw.whisper.fast import (
    CROSS_TYPES,
    FastEncoder,
    Session,
    fast_decoder,
    fast_encoder,
)
from dqw.whisper.transcribe import transcribe

pytestmark = needs_library
CHECKS = ("test_schema", "test_faketensor")


def packed(model, **quant):
    """``model``, frozen with 4-bit APoT in groups of 64 unless ``quant`` says otherwise."""
    return dqw.freeze(dqw.quantize(model, Recipe(quant=QuantConfig(**quant))))


def save_packed(path, **quant):
    """``tiny`` packed, as a folder."""
    model, processor = tiny(path)
    packed(model, **quant).save_pretrained(path)
    save_processor(processor, path)
    return path


def plain(model):
    """The same modules without the native networks."""
    twin = copy.copy(model)
    twin.__class__ = WhisperForConditionalGeneration
    return twin


@pytest.fixture(scope="module")
def small():
    return packed(make_tiny_whisper())


def ids_and_states(clips=2, tokens=9, positions=37, width=64):
    torch.manual_seed(0)
    return torch.randint(3, 120, (clips, tokens)), torch.randn(clips, positions, width)


def stepwise(session, ids, prompt=4):
    """Logits of the last prompt token and of every token behind it."""
    found = [session.step(ids[:, :prompt])]
    found += [session.step(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1])]
    return torch.stack(found, dim=1)


def reference(model, ids, states, prompt=4):
    with torch.inference_mode():
        logits = plain(model)(encoder_outputs=(states,), decoder_input_ids=ids).logits
    return logits[:, prompt - 1 :]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("prompt", [1, 4, 9])
def test_logits_are_those_of_the_plain_decoder(small, tier, prompt):
    ids, states = ids_and_states()
    with instruction_set(tier):
        session = Session(fast_decoder(small), states, 16, cross_type="float32")
        found = stepwise(session, ids, prompt)
        wanted = reference(small, ids, states, prompt)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 16, 32, 64])
def test_every_packing(bits, group):
    grid = "uniform" if bits > 6 else "apot"
    model = packed(
        make_tiny_whisper(), bits=bits, grid=grid, group_size=group, embedding_bits=min(bits, 6)
    )
    ids, states = ids_and_states()
    found = stepwise(Session(fast_decoder(model), states, 16, cross_type="float32"), ids)
    wanted = reference(model, ids, states)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("tier", TIERS)
def test_int8_activations_differ_by_their_own_rounding(tier):
    """Both round each token's activations; which way a tie falls is chance, so the distance to the
    float model is compared, not the logits."""
    model = packed(make_tiny_whisper())
    ids, states = ids_and_states()
    exact = reference(model, ids, states)
    set_activations(model, "int8")
    rounded = (reference(model, ids, states) - exact).abs().mean()
    with instruction_set(tier):
        session = Session(fast_decoder(model), states, 16, cross_type="float32")
        found = (stepwise(session, ids) - exact).abs().mean()
    assert 0 < found < 1.5 * rounded


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("cross", "limit"), [("bfloat16", 4e-3), ("int8", 8e-3)])
def test_small_caches_cost_little(small, tier, cross, limit):
    ids, states = ids_and_states()
    with instruction_set(tier):
        found = stepwise(Session(fast_decoder(small), states, 16, cross_type=cross), ids)
    wanted = reference(small, ids, states)
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert 1e-6 < error < limit


@pytest.mark.parametrize("positions", [1, 15, 16, 33])
@pytest.mark.parametrize("cross", CROSS_TYPES)
def test_audio_of_any_length(small, positions, cross):
    ids, states = ids_and_states(positions=positions)
    found = stepwise(Session(fast_decoder(small), states, 16, cross_type=cross), ids)
    wanted = reference(small, ids, states)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cross", CROSS_TYPES)
def test_a_nan_in_the_states_is_one_in_the_logits(small, tier, cross):
    ids, states = ids_and_states()
    states[0, 20, 3] = float("nan")
    with instruction_set(tier):
        found = stepwise(Session(fast_decoder(small), states, 16, cross_type=cross), ids)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_ids_may_be_of_any_integer_type(small):
    ids, states = ids_and_states()
    found = stepwise(Session(fast_decoder(small), states, 16), ids.int())
    assert torch.equal(found, stepwise(Session(fast_decoder(small), states, 16), ids))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_nothing(small, threads):
    ids, states = ids_and_states(clips=3)
    before = torch.get_num_threads()
    one = stepwise(Session(fast_decoder(small), states, 16), ids)
    torch.set_num_threads(threads)
    try:
        found = stepwise(Session(fast_decoder(small), states, 16), ids)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, one)


def test_beams_go_on_from_another_and_sequences_leave(small):
    ids, states = ids_and_states(clips=1)
    other = ids.flip(1)
    session = Session(fast_decoder(small), states, 16, per_clip=2, cross_type="float32")
    session.step(torch.cat([ids[:, :4], other[:, :4]]))
    session.reorder_cache(torch.tensor([1, 1]))  # both go on from the second
    both = session.step(torch.cat([ids[:, 4:5], other[:, 4:5]]))
    session.keep(torch.tensor([1]))
    last = session.step(ids[:, 5:6])
    ways = [
        torch.cat([other[:, :4], ids[:, 4:5]], dim=1),
        torch.cat([other[:, :4], other[:, 4:5]], dim=1),
        torch.cat([other[:, :5], ids[:, 5:6]], dim=1),
    ]
    for found, way in zip((both[0], both[1], last[0]), ways, strict=True):
        wanted = reference(small, way, states)[0, -1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# ---- the encoder ----


def encoded(model, batch):
    with torch.inference_mode():
        return model.model.encoder(batch).last_hidden_state


def plainly_encoded(model, batch):
    with torch.inference_mode():
        return WhisperEncoder.forward(model.model.encoder, batch).last_hidden_state


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("positions", "heads"), [(50, 2), (33, 4), (1, 1)])
def test_states_are_those_of_the_plain_encoder(tier, positions, heads):
    model = packed(make_tiny_whisper(max_source_positions=positions, encoder_attention_heads=heads))
    batch = torch.randn(2, 80, 2 * positions)
    with instruction_set(tier):
        found, wanted = encoded(model, batch), plainly_encoded(model, batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("tier", BF16_SETS)
@pytest.mark.parametrize("group", [0, 16])
def test_where_bfloat16_stands_in_for_int8(tier, group):
    """In tiles; else int8 is faster, and no further from the float model than it is without
    bfloat16."""
    model = packed(make_tiny_whisper(max_source_positions=50), group_size=group)
    batch = torch.randn(2, 80, 100)
    wanted = plainly_encoded(model, batch)
    with instruction_set(tier):
        rounded = fast_encoder(model.model.encoder)(batch, bf16=True)
        set_activations(model.model.encoder, "int8")
        found = fast_encoder(model.model.encoder)(batch, bf16=True)
        int8 = fast_encoder(model.model.encoder)(batch)
    assert torch.equal(found, rounded) == (tier == "amx")
    # Attention is of bfloat16 in any case: what it changes, int8 may round to the next level.
    assert tier == "amx" or (found - int8).norm() < 1.5 * (int8 - wanted).norm()
    assert (found - wanted).norm() < 1.5 * (int8 - wanted).norm()


@pytest.mark.parametrize("tier", BF16_SETS)
@pytest.mark.parametrize("group", [0, 16])
def test_keys_and_values_do_too(tier, group):
    model = packed(make_tiny_whisper(), group_size=group)
    states = ids_and_states()[1]
    with instruction_set(tier):
        rounded = fast_decoder(model).cross(states, CROSS_TYPES.index("float32"), bf16=True)
        set_activations(model, "int8")
        found = fast_decoder(model).cross(states, CROSS_TYPES.index("float32"), bf16=True)
        int8 = fast_decoder(model).cross(states, CROSS_TYPES.index("float32"))
    assert torch.equal(found, rounded if tier == "amx" else int8)
    assert not torch.equal(rounded, int8)


@pytest.mark.parametrize("width", [48, 96])
def test_a_width_that_no_block_divides(width):
    model = packed(
        make_tiny_whisper(
            d_model=width, encoder_attention_heads=1, decoder_attention_heads=1,
            encoder_ffn_dim=100, decoder_ffn_dim=100, max_source_positions=20,
        )
    )  # fmt: skip
    batch = torch.randn(1, 80, 40)
    found, wanted = encoded(model, batch), plainly_encoded(model, batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    ids, states = ids_and_states(width=width)
    found = stepwise(Session(fast_decoder(model), states, 16, cross_type="float32"), ids)
    wanted = reference(model, ids, states)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_an_embedding_may_have_finer_groups(tmp_path):
    model, processor = tiny(tmp_path)
    rule = Override(match="*embed_tokens", group_size=16)
    packed(model, override=[rule]).save_pretrained(tmp_path / "small")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert loaded.model.decoder.embed_tokens.group_size == 16 and uncovered(loaded) == ""
    noise = [np.random.default_rng(1).standard_normal(9_000).astype(np.float32)]
    found = transcribe(loaded, processor, noise, "en")
    assert found == transcribe(plain(loaded), processor, noise, "en")


def test_two_threads_of_python_at_once(small):
    """Each has its own sequence; scratch of one must not be the other's."""
    from concurrent.futures import ThreadPoolExecutor

    ids, states = ids_and_states()
    decoder, encoder = fast_decoder(small), fast_encoder(small.model.encoder)
    features = torch.randn(2, 80, 40)

    def run(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        session = Session(decoder, states, 16, cross_type="float32")
        return stepwise(session, ids), encoder(features, bf16=False)

    wanted = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(24)):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_operators_keep_their_schemas(small):
    ids, states = ids_and_states()
    decoder, encoder = fast_decoder(small).network.handle, fast_encoder(small.model.encoder)
    operators = torch.ops.dqw_cpu
    torch.library.opcheck(
        operators.encoder, (encoder.network.handle, torch.randn(1, 80, 20)), test_utils=CHECKS
    )
    for cross_type in range(3):
        torch.library.opcheck(
            operators.decoder_cross, (decoder, states, cross_type), test_utils=CHECKS
        )
        session = Session(fast_decoder(small), states, 8, cross_type=CROSS_TYPES[cross_type])
        integers = [torch.tensor(x, dtype=torch.int32) for x in ([0, 0], [0, 1], [0, 1])]
        arguments = (
            decoder, ids[:, 0].contiguous(), integers[0], integers[1], session.sources,
            session.cache.zero_(), session.cross, session.audio, cross_type, integers[2],
        )  # fmt: skip
        torch.library.opcheck(operators.decoder_step, arguments, test_utils=CHECKS)


def test_wrong_arguments_are_refused(small):
    ids, states = ids_and_states()
    session = Session(fast_decoder(small), states, 4)
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        session.step(torch.full((2, 1), 120))
    session.step(ids[:, :4])
    with pytest.raises(RuntimeError, match="outside the cache"):
        session.step(ids[:, 4:5])
    with pytest.raises(RuntimeError, match="states must be"):
        Session(fast_decoder(small), torch.randn(1, 5, 32), 4)
    for audio in (0, 70_000, 2**61):
        session.audio = audio
        with pytest.raises(RuntimeError, match="audio of"):
            session.step(ids[:, :1])
    encoder = copy.deepcopy(small.model.encoder)
    encoder.layers[1].final_layer_norm.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="norm tensor 6 of the encoder has 1 elements, not 64"):
        FastEncoder(encoder)(torch.randn(1, 80, 20))
    with pytest.raises(RuntimeError, match="one part or more"):
        torch.ops.dqw_cpu.ceiling_read(torch.zeros(64), 0, 1)
    with pytest.raises(RuntimeError, match="rows and columns, not"):
        nothing, levels = torch.empty(0, dtype=torch.uint8), torch.zeros(16, dtype=torch.int16)
        torch.ops.dqw.dequantize(nothing, torch.ones(1, 1), levels, 2**59, 64, 4, 0)
    with pytest.raises(RuntimeError, match="freed"):
        torch.ops.dqw_cpu.decoder_cross(10**9, states, 0)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (2, int32(0, -1), "position -1 of row 1 lies outside"),
        (3, int32(0, 2), "clip 2 is not there"),
        (4, int32(*[0] * 8, *[9] * 8).view(2, 8), "slot 9 of row 1 is not there"),
        (5, torch.zeros(2, 2, 2, 8, 32), "cache must be float32"),
        (6, torch.zeros(100, dtype=torch.uint8), "cross must be what decoder_cross gave"),
        (9, int32(0, 2), "row 2 is wanted but not there"),
        (9, int32(-1), "row -1 is wanted but not there"),
    ],
)
def test_a_step_reads_and_writes_inside_its_memory_alone(small, place, value, words):
    """Every index that comes from outside is checked before it is used."""
    ids, states = ids_and_states()
    session = Session(fast_decoder(small), states, 8)
    arguments = [
        session.network.handle, ids[:, 0].contiguous(), int32(0, 0), int32(0, 1),
        session.sources, session.cache.zero_(), session.cross, session.audio,
        session.type, int32(0, 1),
    ]  # fmt: skip
    torch.ops.dqw_cpu.decoder_step(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.dqw_cpu.decoder_step(*arguments)
