"""Transcribing with a tiny random Whisper: its words mean nothing, the bookkeeping does."""

import inspect
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from whisper_helpers import TIMES, tiny, tone, write_tone

from dqw.cli_transcribe import transcribe as command
from dqw.errors import UserError
from dqw.whisper import listener as listener_module
from dqw.whisper.engines import PlainEngine
from dqw.whisper.listener import Listener
from dqw.whisper.transcribe import Segment, Transcript, _Decoder, iter_transcripts, transcribe
from dqw.whisper.writers import render


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny"))


def voices(count: int, seconds: float = 0.6) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(2_000, round(16_000 * seconds), count)
    return [0.1 * random.standard_normal(n).astype(np.float32) for n in lengths]


def test_order_and_batches_change_nothing(whisper):
    audios = voices(5)
    alone = [transcribe(*whisper, [audio], "en")[0] for audio in audios]
    assert transcribe(*whisper, audios, "en", batch_size=2) == alone
    assert transcribe(*whisper, audios[::-1], "en") == alone[::-1]
    assert [round(t.seconds * 16_000) for t in alone] == [len(a) for a in audios]
    assert len({t.text for t in alone}) > 1 and all(t.language == "en" for t in alone)


def test_greedy_text_is_that_of_plain_generate(whisper):
    model, processor = whisper
    audio = voices(1)[0]
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    ids = model.generate(features["input_features"], language="de", task="translate")
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert transcribe(model, processor, [audio], "de", "translate")[0].text == text


@pytest.mark.parametrize(
    ("rule", "value"),
    [("no_repeat_ngram_size", 1), ("repetition_penalty", 5.0), ("max_new_tokens", 2)],
)
def test_rules_of_a_checkpoint_are_heeded(whisper, monkeypatch, rule, value):
    model, processor = whisper
    audio = voices(3)[2]
    before = transcribe(model, processor, [audio], "de")[0].text
    monkeypatch.setattr(model.generation_config, rule, value)
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    ids = model.generate(features["input_features"], language="de")
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert transcribe(model, processor, [audio], "de")[0].text == text != before


def test_language_is_detected_where_none_is_given(whisper):
    model, processor = whisper
    audios = voices(3)
    found = transcribe(model, processor, audios, [None, "ja", None])
    features = processor.feature_extractor(audios, sampling_rate=16_000, return_tensors="pt")
    ids = model.detect_language(features["input_features"])
    detected = [processor.tokenizer.decode([i])[2:-2] for i in ids.tolist()]
    assert [t.language for t in found] == [detected[0], "ja", detected[2]]
    again = transcribe(model, processor, audios, [t.language for t in found])
    assert again == found


def test_silence_is_empty_text_and_no_model_run(whisper, monkeypatch):
    monkeypatch.setattr(whisper[0], "generate", lambda **options: pytest.fail("ran the model"))
    silent = np.zeros(8_000, dtype=np.float32)
    assert transcribe(*whisper, [silent], "en") == [Transcript("", "en", 0.5)]
    assert transcribe(*whisper, [silent, silent])[1].text == ""
    assert transcribe(*whisper, []) == []


def test_long_audio_goes_window_by_window(whisper):
    seen = []
    audio = 0.1 * np.random.default_rng(1).standard_normal(40_000).astype(np.float32)
    results = transcribe(*whisper, [audio, audio[:9_000]], progress=seen.append)
    long = results[0]
    assert long.seconds == 2.5 and long.language in ("en", "de", "ja")
    assert long.segments and long.text
    assert all(0 <= s.start < s.end <= 2.5 for s in long.segments)
    assert results[1] == transcribe(*whisper, [audio[:9_000]])[0]
    assert seen == [2.5, 2.5 + 9 / 16]


def test_silent_windows_of_a_recording_are_passed_over(whisper, monkeypatch):
    """And the language is that of the first window with sound."""
    sound = 0.1 * np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    nothing = np.zeros(32_000, dtype=np.float32)
    encode, windows = PlainEngine.encode, []

    def counting(engine, features):
        windows.append(len(features))
        return encode(engine, features)

    monkeypatch.setattr(PlainEngine, "encode", counting)
    done = []
    found = transcribe(*whisper, [np.concatenate([nothing, sound, nothing])], progress=done.append)
    heard = len(windows)
    assert heard >= 1 and found[0].seconds == 5.0 and done == [5.0]
    assert all(s.start >= 2.0 for s in found[0].segments) and found[0].segments
    transcribe(*whisper, [np.concatenate([sound, nothing])])
    assert found[0].language == transcribe(*whisper, [sound])[0].language
    still = np.full(80_000, 2e-4, dtype=np.float32)  # above the dither: every window is heard
    windows.clear()
    transcribe(*whisper, [still])
    assert len(windows) >= 5


def takes_for_no_speech(monkeypatch, engine, rows=slice(None)):
    """Has ``engine`` find <|nospeech|> the likeliest token behind the start, in some windows."""
    session = engine.session

    @contextmanager
    def quiet(self, states, longest):
        with session(self, states, longest) as plain:
            if longest > 1:
                yield plain
                return

            def step(ids):
                logits = plain.step(ids).clone()
                logits[rows, self.settings.no_timestamps_token_id - 1] = 1e3
                return logits

            yield SimpleNamespace(step=step)

    monkeypatch.setattr(engine, "session", quiet)


def test_what_is_no_speech_is_silence_if_its_words_are_doubted(whisper, monkeypatch):
    audio = voices(2)
    plain = transcribe(*whisper, audio, "en")
    takes_for_no_speech(monkeypatch, PlainEngine, rows=[0])
    found = transcribe(*whisper, audio, "en")  # the shorter is row 1
    shorter = int(len(audio[1]) < len(audio[0]))
    assert plain[0].text and plain[1].text and found[shorter] == plain[shorter]
    assert found[1 - shorter] == replace(plain[1 - shorter], text="")
    assert transcribe(*whisper, audio, "en", no_speech=1.0) == plain
    monkeypatch.setattr(listener_module, "DOUBT", -100.0)
    assert transcribe(*whisper, audio, "en") == plain
    option = inspect.signature(command).parameters["no_speech_threshold"]
    assert option.default == listener_module.NO_SPEECH
    with pytest.raises(UserError, match=r"threshold is 1\.5; give 0 to 1"):
        transcribe(*whisper, audio, no_speech=1.5)


def test_windows_without_speech_move_on_and_have_no_language(whisper, monkeypatch):
    audio = np.concatenate(voices(6, 0.9))
    takes_for_no_speech(monkeypatch, PlainEngine)
    done = []
    (found,) = transcribe(*whisper, [audio], progress=done.append)
    assert found == Transcript("", None, len(audio) / 16_000) and done == [found.seconds]


@torch.no_grad()
@pytest.mark.parametrize("timestamps", [False, True])
def test_sureness_is_that_of_transformers(whisper, timestamps):
    model, processor = whisper
    audio = voices(1)[0]
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    states = model.get_encoder()(features["input_features"])[0]
    listener = Listener(PlainEngine(model, processor))
    prompt = listener.prompts(["de"], timestamps)
    (tokens,) = listener.tokens(states, ["de"], prompt, timestamps)
    rules = listener.rules(prompt.shape[1], timestamps)
    found = listener.sureness(states, prompt[0].tolist(), tokens, rules)
    ids, total, count = [*prompt[0].tolist(), *tokens, listener.end], 0.0, 0
    for at in range(prompt.shape[1], min(len(ids), rules.longest)):
        before = torch.tensor([ids[:at]])
        scores = model(encoder_outputs=(states,), decoder_input_ids=before).logits[:, -1]
        for rule in rules.processors():
            scores = rule(before, scores)
        total, count = total + float(scores.log_softmax(-1)[0, ids[at]]), count + 1
    assert found == pytest.approx(total / count, rel=1e-4) and found < -0.1


def test_what_a_fine_tune_says_of_its_language(whisper, monkeypatch):
    audio = voices(2)
    for named in ("<|ja|>", "ja", "japanese"):
        monkeypatch.setattr(whisper[0].generation_config, "language", named, raising=False)
        assert [t.language for t in transcribe(*whisper, audio)] == ["ja", "ja"]
    assert transcribe(*whisper, audio, "de")[0].language == "de"
    before = transcribe(*whisper, audio, [None, "de"])
    monkeypatch.setattr(whisper[0].generation_config, "language", "klingon", raising=False)
    assert transcribe(*whisper, audio)[0].language in ("en", "de", "ja")  # none that is known
    assert [t.language for t in before] == ["ja", "de"]


def test_tokens_to_suppress_may_be_beyond_the_vocabulary(whisper, monkeypatch):
    """A list that is older than the vocabulary, as transformers takes it."""
    audio, settings = voices(2), whisper[0].generation_config
    own = transcribe(*whisper, audio, "en")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        monkeypatch.setattr(settings, name, [*(getattr(settings, name) or []), -1, 99_999])
    assert transcribe(*whisper, audio, "en") == own


def test_what_was_named_first_comes_first(whisper):
    audios = voices(7)
    steps = iter_transcripts(PlainEngine(*whisper), audios, "en", batch_size=2, ahead=3)
    order = [index for index, _ in steps]
    assert sorted(order[:3]) == [0, 1, 2] and sorted(order[3:6]) == [3, 4, 5] and order[6] == 6


def test_timestamps_lie_within_the_clip(whisper):
    audio = voices(1)[0]
    found = transcribe(*whisper, [audio], "en", timestamps=True)[0]
    assert found.segments
    for segment in found.segments:
        assert 0 <= segment.start <= segment.end <= round(found.seconds, 2)
        assert segment.text in found.text


def test_segments_from_tokens(whisper):
    _, processor = whisper
    decoder = _Decoder(Listener(PlainEngine(*whisper)), True)
    first = processor.tokenizer.convert_tokens_to_ids(TIMES[0])
    word = processor.tokenizer(" world", add_special_tokens=False).input_ids
    segments = decoder._segments([first, *word, first + 20, first + 25, *word], 0.9)
    assert segments == [Segment(0.0, 0.4, "world"), Segment(0.5, 0.9, "world")]
    assert decoder._segments([first, first + 5], 0.9) == []
    assert decoder._segments(word, 0.9) == [Segment(0.0, 0.9, "world")]


def test_speech_heard_behind_the_end_gets_a_cue_of_some_length(whisper):
    from dqw.whisper.engines import PlainEngine
    from dqw.whisper.transcribe import _Clip, _Decoder
    from dqw.whisper.windows import Stretch

    decoder = _Decoder(Listener(PlainEngine(*whisper)), True)
    first = whisper[1].tokenizer.convert_tokens_to_ids(TIMES[0])
    word = whisper[1].tokenizer(" world", add_special_tokens=False).input_ids
    last = Segment(0.28, 0.3, "world")
    for start, end in ((15, 15), (15, 20), (40, 45)):
        assert decoder._segments([first + start, *word, first + end], 0.3) == [last]
        clip = _Clip(0, np.zeros(4800, dtype=np.float32), "en")
        stretch = Stretch(start * 0.02, end * 0.02, [first + start, *word, first + end])
        assert decoder._joined(clip, "en", [stretch]).segments == [last]
    assert decoder._segments([first + 5, *word, first + 5], 0.3) == [Segment(0.1, 0.12, "world")]


def test_a_loop_is_cut(whisper):
    """A model whose every step says the same token stops early and says it once."""
    model, processor = tiny_that_loops(whisper)
    audio = voices(1)[0]
    assert transcribe(model, processor, [audio], "en")[0].text == "A"
    assert transcribe(model, processor, [audio], "en", beam_size=2)[0].text == "A"


def tiny_that_loops(whisper):
    import copy

    model, processor = copy.deepcopy(whisper[0]), whisper[1]
    token = processor.tokenizer("A", add_special_tokens=False).input_ids[0]
    model.generation_config.max_length = model.config.max_target_positions = 64
    positions = torch.nn.Embedding(64, 64).to(model.dtype)
    model.model.decoder.embed_positions.weight = torch.nn.Parameter(positions.weight.detach())
    model.model.decoder.layer_norm.weight.data.zero_()
    model.model.decoder.layer_norm.bias.data.copy_(
        10 * model.model.decoder.embed_tokens.weight.data[token]
    )
    return model, processor


@pytest.mark.parametrize("beams", [1, 2])
def test_a_prompt_stands_before_each_window(whisper, beams):
    """As OpenAI's initial_prompt: <|startofprev|>, a space, the text."""
    model, processor = whisper
    audio = voices(1)[0]
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    said = processor.get_prompt_ids("hello", return_tensors="pt")
    ids = model.generate(
        features["input_features"], language="de", prompt_ids=said, num_beams=beams
    )
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    found = transcribe(model, processor, [audio], "de", beam_size=beams, prompt=" hello ")[0]
    assert (
        found.text == text != transcribe(model, processor, [audio], "de", beam_size=beams)[0].text
    )
    long = [audio, np.concatenate(voices(6))]
    for timestamps in (False, True):
        options = {"timestamps": timestamps, "beam_size": beams, "language": "en"}
        plain = transcribe(model, processor, long, **options)
        told = transcribe(model, processor, long, prompt="hello", **options)
        assert [a.text != b.text for a, b in zip(plain, told, strict=True)] == [True, True]
        assert (
            "hello" not in told[0].text
            and transcribe(model, processor, long, prompt=" ", **options) == plain
        )


def test_beam_search_runs(whisper):
    assert isinstance(transcribe(*whisper, voices(2), "en", beam_size=3)[1].text, str)


def test_nothing_is_printed(whisper, capfd, recwarn):
    transcribe(*whisper, voices(3), timestamps=True)
    transcribe(*whisper, voices(3), "en", beam_size=2)
    transcribe(*whisper, [np.concatenate(voices(6))])
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert not [w for w in recwarn if issubclass(w.category, UserWarning | FutureWarning)]


def test_bad_options(whisper, tmp_path):
    audio = [write_tone(tmp_path / "a.wav")]
    for arguments, words in (
        ({"task": "sing"}, "task is 'sing'"),
        ({"language": "xx"}, "'xx', which Whisper does not know"),
        ({"language": "fr"}, "does not know the language 'fr'"),
        ({"language": ["en", "de"]}, "2 languages for 1 audios"),
        ({"beam_size": 0}, "beam size is 0"),
        ({"batch_size": -1}, "batch size is -1"),
        ({"prompt": "hello " * 9}, "the prompt has 18 tokens; 11 is the most"),
        ({"prompt": "a<|endoftext|>b"}, "holds one of Whisper's own tokens"),
    ):
        with pytest.raises(UserError, match=words):
            transcribe(*whisper, audio, **arguments)
    with pytest.raises(UserError, match=r"none\.wav does not exist"):
        transcribe(*whisper, [*audio, tmp_path / "none.wav"])


def test_an_english_only_model(whisper, monkeypatch):
    model, processor = whisper
    monkeypatch.setattr(model.generation_config, "is_multilingual", False)
    found = transcribe(model, processor, [tone(0.5)])[0]
    assert found.language == "en" and isinstance(found.text, str)
    assert transcribe(model, processor, [tone(0.5)], "en")[0] == found
    with pytest.raises(UserError, match="does not know the language 'de'"):
        transcribe(model, processor, [tone(0.5)], "de")
    with pytest.raises(UserError, match="can't translate"):
        transcribe(model, processor, [tone(0.5)], task="translate")


TALK = Transcript(
    "One. Two.", "en", 3700.0, [Segment(0.0, 1.5, "One."), Segment(3661.25, 3700.0, "Two.")]
)


def test_writers():
    assert render(TALK, "txt") == "One. Two.\n"
    assert render(TALK, "txt", timestamps=True).splitlines()[0] == (
        "[00:00:00.000 --> 00:00:01.500] One."
    )
    assert render(TALK, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne.\n\n2\n01:01:01,250 --> 01:01:40,000\nTwo.\n"
    )
    assert render(TALK, "vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne.\n\n01:01")
    assert '"start": 3661.25' in render(TALK, "json")
    assert render(Transcript("", None, 1.0), "srt") == ""
    whole = render(Transcript("Hi.", "en", 1.0), "srt")
    assert whole == "1\n00:00:00,000 --> 00:00:01,000\nHi.\n"
    for said in (["Hi."], []):  # of whatever length the audio is
        rows = json.loads(render(Transcript("".join(said), "en", 1.0), "json"))["segments"]
        assert [(row["start"], row["end"], row["text"]) for row in rows] == [
            (0.0, 1.0, text) for text in said
        ]
