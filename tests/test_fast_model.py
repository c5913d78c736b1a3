"""``generate`` on the native networks: the tokens, scores and beams of the plain model."""

import copy
import pickle

import numpy as np
import pytest
import torch
from kernel_helpers import BF16_SETS, float_products, instruction_set, needs_library
from kernel_helpers import INSTRUCTION_SETS as TIERS
from test_fast import packed, plain
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from whisper_helpers import tiny

from dqw.whisper.coverage import encoder_uncovered, uncovered
from dqw.whisper.fast import Session, fast_decoder, fast_encoder
from dqw.whisper.fast_model import native_decoder
from dqw.whisper.transcribe import transcribe

pytestmark = needs_library


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    model, processor = tiny(tmp_path_factory.mktemp("tiny"))
    return packed(model), processor


def features(processor, count):
    random = np.random.default_rng(0)
    audios = [0.1 * random.standard_normal(4_000 + 2_000 * i) for i in range(count)]
    return processor.feature_extractor(audios, sampling_rate=16_000, return_tensors="pt")


@pytest.mark.parametrize("tier", TIERS)
def test_generate_may_round_and_a_call_may_not(speaking, tier, monkeypatch):
    """On tiers with bfloat16 the encoder and the keys of the audio; elsewhere nothing changes."""
    model, _ = speaking
    torch.manual_seed(0)
    features = torch.randn(2, 80, 100)
    with instruction_set(tier), torch.no_grad():
        native = fast_encoder(model.model.encoder)
        exact, rounded = native(features), native(features, bf16=True)
        assert torch.equal(exact, rounded) == (tier not in BF16_SETS)
        assert torch.equal(model.model.encoder(features)[0], exact)
        heard = []
        monkeypatch.setattr(
            "dqw.whisper.fast.FastDecoder.cross",
            lambda self, states, kind, bf16=False, again=False: (
                heard.append((states, bf16)) or 1 / 0
            ),
        )
        for ask in ({"language": "en"}, {"language": "en", "num_beams": 2}, {}):
            with pytest.raises(ZeroDivisionError):
                model.generate(features, **ask)
            states, bf16 = heard.pop()
            assert bf16 and torch.equal(states, rounded[: len(states)])
        assert torch.equal(model.model.encoder(features)[0], exact)  # after the failures, too


@pytest.mark.parametrize("timestamps", [False, True])
def test_generate_gives_the_same_tokens(speaking, timestamps):
    model, processor = speaking
    batch = features(processor, 5)["input_features"]
    options = {"language": "en", "return_timestamps": timestamps}
    with float_products():
        found = model.generate(batch, **options)
    assert torch.equal(found, plain(model).generate(batch, **options))
    assert len({tuple(row) for row in found.tolist()}) > 1


def test_generate_gives_the_same_scores(speaking):
    model, processor = speaking
    batch = features(processor, 2)["input_features"]
    options = {"return_dict_in_generate": True, "output_scores": True, "language": "en"}
    found, wanted = model.generate(batch, **options), plain(model).generate(batch, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    for mine, theirs in zip(found.scores, wanted.scores, strict=True):
        finite = torch.isfinite(theirs)
        assert torch.equal(torch.isfinite(mine), finite)
        running = (mine != 0).any(1)
        apart = (mine - theirs)[running][finite[running]]
        assert apart.abs().max() < 0.05  # bfloat16 keys and values


def test_sampling_runs_plainly(speaking, monkeypatch):
    model, processor = speaking
    batch = features(processor, 2)["input_features"]
    monkeypatch.setattr(Session, "step", lambda *_: pytest.fail("ran natively"))
    torch.manual_seed(1)
    options = {"language": "en", "do_sample": True, "temperature": 0.8}
    found = model.generate(batch, **options)
    torch.manual_seed(1)
    assert torch.equal(found, plain(model).generate(batch, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "return_timestamps": True},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_beams_find_the_same(speaking, options, monkeypatch):
    model, processor = speaking
    batch = features(processor, 3)["input_features"]
    wanted = plain(model).generate(batch, language="en", **options)
    decoder = plain(model).model.decoder
    monkeypatch.setattr(decoder, "forward", lambda *_, **__: pytest.fail("ran plainly"))
    with float_products():
        assert torch.equal(model.generate(batch, language="en", **options), wanted)


def test_the_language_is_detected_once_for_both(speaking, monkeypatch):
    model, processor = speaking
    batch = features(processor, 3)["input_features"]
    wanted = plain(model).detect_language(batch)
    monkeypatch.setattr(model.model.decoder, "forward", lambda *_, **__: pytest.fail("ran plainly"))
    assert torch.equal(model.detect_language(batch), wanted)
    with torch.inference_mode():
        states = model.model.encoder(batch).last_hidden_state
    decoder = fast_decoder(model)
    made = decoder.cross(states, 0, again=True)
    assert decoder.cross(states, 0) is made and decoder.cross(states, 0) is not made
    made = decoder.cross(states, 0, again=True)
    assert decoder.cross(states.clone(), 0) is not made
    decoder.cross(states, 0, again=True)
    del states
    assert decoder._last is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_that_are_written_over_are_decoded_anew(speaking, mode):
    model, processor = speaking
    with mode():
        first, second = model.model.encoder(features(processor, 2)["input_features"])[0].split(1)
        buffer = first.clone()

        def said(states):
            return model.generate(encoder_outputs=BaseModelOutput(states), language="en")

        wanted = said(second)
        assert not torch.equal(said(buffer), wanted)
        buffer.copy_(second)
        assert torch.equal(said(buffer), wanted)
    decoder, buffer = fast_decoder(model), torch.randn(1, 5, 64)
    made = decoder.cross(buffer, 0, again=True)
    buffer.mul_(2)
    assert not torch.equal(decoder.cross(buffer, 0), made)


def test_hooks_are_called(speaking):
    """Of layers and of the model itself: it runs plainly as long as they are there."""
    model, processor = speaking
    batch = features(processor, 1)["input_features"]
    for part, where in (
        (model.model.decoder.layers[0].fc1, "decoder"), (model, "decoder"),
        (model.model.encoder.layers[1].fc1, "encoder"), (model.model.encoder.conv1, "encoder"),
    ):  # fmt: skip
        calls = []
        handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            model.generate(batch, language="en")
            assert calls
            reason = (
                uncovered(model) if where == "decoder" else encoder_uncovered(model.model.encoder)
            )
            assert "has hooks" in reason
        finally:
            handle.remove()
    assert fast_decoder(model) and fast_encoder(model.model.encoder)


def test_hidden_states_that_were_asked_for_once_cost_nothing_later(speaking):
    """transformers' hooks for them stay."""
    model, processor = speaking
    batch = features(processor, 1)["input_features"]
    options = {"language": "en", "return_dict_in_generate": True}
    model.generate(batch, output_hidden_states=True, output_attentions=True, **options)
    assert model.model.encoder.layers[0]._forward_hooks
    assert fast_decoder(model) and fast_encoder(model.model.encoder)


def test_a_folder_loads_with_the_fast_decoder(speaking, tmp_path):
    model, processor = speaking
    model.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert native_decoder(loaded) is not None and native_decoder(plain(loaded)) is None
    assert uncovered(loaded) == "" and type(loaded) is type(model)
    assert loaded.config.architectures == ["WhisperForConditionalGeneration"]
    batch = features(processor, 1)["input_features"]
    assert torch.equal(loaded.generate(batch), model.generate(batch))
    assert loaded.half().dtype == torch.float16 and loaded.float().dtype == torch.float32
    assert torch.equal(loaded.generate(batch), model.generate(batch))


def test_a_model_can_be_pickled_and_copied(speaking, tmp_path):
    model, processor = speaking
    model.save_pretrained(tmp_path)
    # Anew: no model of transformers can be pickled once hidden states were asked for.
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    batch = features(processor, 2)["input_features"]
    wanted = model.generate(batch, language="en")
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model) and type(again.model.encoder) is type(model.model.encoder)
        assert again.model.encoder.conv1 is not model.model.encoder.conv1
        assert native_decoder(again) is not None
        assert torch.equal(again.generate(batch, language="en"), wanted)


def test_transcribe_gives_the_same_text(speaking):
    model, processor = speaking
    random = np.random.default_rng(1)
    audios = [(0.1 * random.standard_normal(n)).astype(np.float32) for n in (9_000, 30_000, 5_000)]
    for timestamps in (False, True):
        with float_products():
            found = transcribe(model, processor, audios, "en", timestamps=timestamps)
        assert found == transcribe(plain(model), processor, audios, "en", timestamps=timestamps)
