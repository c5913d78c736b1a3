"""Training data: labels, order, augmentation, what is left out, and what the teacher writes."""

import json
import os
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from kernel_helpers import needs_library
from speech_helpers import Noise, clips, one_thread, tiny_model, tiny_processor  # noqa: F401
from test_trainer import run

from dqw.distill import DistillConfig, TrainConfig
from dqw.distill.config import AugmentConfig
from dqw.distill.cuts import windows
from dqw.distill.data import (
    SHUFFLED,
    Collator,
    EpochSampler,
    LabelEncoder,
    SpeechDataset,
    drawn,
)
from dqw.distill.labels import _writer, is_loop, read_labels, write_labels
from dqw.distill.losses import IGNORE
from dqw.distill.prepare import prepare
from dqw.errors import UserError
from dqw.linear import QuantLinear
from dqw.whisper.data import Item
from dqw.whisper.fast import fast_encoder


def test_labels_are_whispers_sequence_and_forced_tokens_are_not_trained(encoder):
    ids, labels = encoder.encode("hi", "en")
    text = encoder.tokenizer(" hi", add_special_tokens=False).input_ids
    assert ids == [257, 258, 260, 262, *text]
    assert labels == [258, IGNORE, IGNORE, *text, 0]
    spaceless = encoder.tokenizer("あ", add_special_tokens=False).input_ids
    assert encoder.encode("あ", "ja")[0] == [257, 259, 260, 262, *spaceless]
    english = LabelEncoder(encoder.tokenizer, False, 64)
    ids, labels = english.encode("hi", None)
    assert ids == [257, 262, *text] and labels == [IGNORE, *text, 0]
    with pytest.raises(UserError, match=r"<\|xx\|>"):
        encoder.encode("hi", "xx")


def test_collator_pads_and_masks():
    features = torch.zeros(80, 100, dtype=torch.float16)
    batch = Collator(pad=0)(
        [
            {"input_features": features, "ids": [7, 8, 9], "labels": [8, IGNORE, 0]},
            {"input_features": features, "ids": [7], "labels": [5]},
        ]
    )
    assert batch["decoder_input_ids"].tolist() == [[7, 8, 9], [7, 0, 0]]
    assert batch["labels"].tolist() == [[8, IGNORE, 0], [5, IGNORE, IGNORE]]
    assert batch["decoder_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["input_features"].dtype == torch.float32


def test_epoch_order_depends_on_seed_and_epoch_alone():
    sampler, again = EpochSampler(10, 3), EpochSampler(10, 3)
    first = list(sampler)
    random.seed(1)
    assert first == list(again) and sorted(first) == list(range(10))
    again.set_epoch(2)
    third = list(again)
    assert sorted(third) == list(range(20, 30)) and [key - 20 for key in third] != first


def test_cached_features_are_the_fresh_ones_and_augmentation_is_reproducible(encoder):
    made = prepare(clips(4), encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    extractor = tiny_processor().feature_extractor
    cached = SpeechDataset(made.examples, encoder, extractor, cache=True)
    fresh = SpeechDataset(made.examples, encoder, extractor)
    for key in (1, 5, 1):
        assert torch.equal(cached[key]["input_features"], fresh[key]["input_features"])
    assert cached[5]["ids"] == cached[1]["ids"]
    augment = AugmentConfig(noise=1.0, speed=0.1)
    loud = SpeechDataset(made.examples, encoder, extractor, augment=augment, seed=1, cache=True)
    assert torch.equal(loud[1]["input_features"], loud[1]["input_features"])
    assert not torch.equal(loud[1]["input_features"], loud[5]["input_features"])
    short = [Noise(f"s{i}", f"t{i}", seed=i, seconds=0.2, real_seconds=0.2) for i in range(4)]
    made = prepare(short, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    augment = AugmentConfig(concatenate=1.0, pause_seconds=0.05)
    joined = SpeechDataset(made.examples, encoder, extractor, augment=augment)
    wave, text = joined._augmented(0, random.Random(0))
    assert len(text.split()) == 4 and text.startswith("t0 ") and len(wave) == int(16_000 * 0.95)


def test_what_is_left_out_and_why(encoder):
    items = [
        *clips(2),
        Noise("long", seconds=2.0, real_seconds=2.0),
        Noise("blank", " "),
        Noise("wordy", "x" * 100),
        Noise("silent", None),
    ]
    config = DistillConfig(teacher_labels="never")
    made = prepare(items, encoder, None, None, config, TrainConfig(), Path("unused"), window=1.0)
    assert [example.item.id for example in made.examples] == ["clip0", "clip1"]
    assert made.skipped == {
        "longer than 1 s": ["long"],
        "empty text": ["blank"],
        "text of more than 64 tokens": ["wordy"],
        "no text": ["silent"],
    }
    with pytest.raises(UserError, match=r"no clip is left.*empty text: 1"):
        prepare([Noise("a", " ")], encoder, None, None, config, TrainConfig(), Path("unused"))
    with pytest.raises(UserError, match=r"clip a has a text but no language.*--language"):
        prepare([Noise("a", language=None)], encoder, None, None, config, TrainConfig(), Path("x"))


def test_texts_and_languages_that_the_student_cannot_learn_are_left_out(encoder):
    """The tokenizer would make of "<|0.00|>" in a text the token that it names."""
    items = [
        *clips(1),
        Noise("timed", "<|0.00|> hello<|2.00|>"),
        Noise("welsh", language="cy"),
        Noise("klingon", language="tlh"),
        Noise("locale", "yes", language="en-US"),
    ]
    made = prepare(items, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    assert [example.item.id for example in made.examples] == ["clip0", "locale"]
    assert made.examples[1].language == "en"
    assert made.skipped == {
        "text that holds Whisper's own tokens, as <|0.00|>": ["timed"],
        "language cy, which the student has not": ["welsh"],
        "language tlh, which the student has not": ["klingon"],
    }


@dataclass(frozen=True)
class Broken(Noise):
    """A clip whose header can be read, and nothing else."""

    def load(self) -> np.ndarray:
        raise UserError(f"{self.id}.flac is corrupt")


def test_clips_that_cannot_be_read_are_left_out_and_named(encoder, tmp_path):
    items = [*clips(2), Broken("bad", seconds=None), Broken("mute", None), Noise("told", None)]
    where = DistillConfig(), TrainConfig(), tmp_path / "labels.jsonl"
    made = prepare(items, encoder, tiny_model(), tiny_processor(), *where)
    assert made.skipped.pop("cannot be read") == ["bad", "mute"]
    assert made.fault == "bad.flac is corrupt"
    assert {example.item.id for example in made.examples} <= {"clip0", "clip1", "told"}
    with pytest.raises(UserError, match=r"cannot be read: 1\).*first.*: bad.flac is corrupt"):
        prepare([items[2]], encoder, None, None, *where)


def test_other_clips_stand_in_for_one_that_has_been_damaged(encoder):
    items = [*clips(2), Broken("bad"), *clips(4)[2:]]
    made = prepare(items, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    extractor = tiny_processor().feature_extractor
    dataset = SpeechDataset(made.examples, encoder, extractor)
    with pytest.warns(RuntimeWarning, match=r"bad.flac is corrupt. Other clips stand in for it"):
        assert dataset[2]["ids"] == dataset[3]["ids"]
    joining = AugmentConfig(concatenate=1.0, pause_seconds=0.0)
    dataset = SpeechDataset(made.examples, encoder, extractor, augment=joining)
    with pytest.warns(RuntimeWarning, match=r"bad.flac is corrupt"):
        for key in range(10):
            dataset[key]
    alone = SpeechDataset([made.examples[2]] * 3, encoder, extractor)
    with pytest.raises(UserError, match=r"bad.flac is corrupt"), pytest.warns(RuntimeWarning):
        alone[0]


def test_clips_that_will_not_fit_are_not_loaded(encoder):
    loaded = []

    @dataclass(frozen=True)
    class Noted(Noise):
        def load(self) -> np.ndarray:
            loaded.append(self.id)
            return super().load()

    long = [Noted(f"l{i}", f"t{i}", seconds=0.9, real_seconds=0.9, seed=i) for i in range(5)]
    wordy = [Noted(f"w{i}", "x" * 40, seconds=0.1, real_seconds=0.1, seed=i) for i in range(5)]
    for items, length in ((long, 0.9), (wordy, 0.1)):
        made = prepare(items, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
        joining = AugmentConfig(concatenate=1.0)
        extractor = tiny_processor().feature_extractor
        dataset = SpeechDataset(made.examples, encoder, extractor, augment=joining)
        loaded.clear()
        assert float(dataset[0]["seconds"]) == pytest.approx(length)
        assert loaded == [items[0].id]


@pytest.mark.parametrize("count", [50, SHUFFLED, SHUFFLED + 50])
def test_clips_to_join_come_once_each_in_an_order_of_chance(count):
    places = np.arange(count) * 3
    order = list(drawn(places, random.Random(1)))
    assert sorted(order) == places.tolist() != order
    assert order == list(drawn(places, random.Random(1)))
    assert order[:9] != list(drawn(places, random.Random(2)))[:9]


def test_labels_of_another_teacher_or_language_are_written_anew(tmp_path, monkeypatch):
    from dqw.distill import labels

    def texts(teacher, processor, waves, code):
        return [{"text": f"{teacher.name} {code}", "language": code, "fault": ""} for _ in waves]

    monkeypatch.setattr(labels, "_transcribe", texts)
    path, items = tmp_path / "labels.jsonl", [Noise("a", None, None), Noise("b", None, "ja")]
    first, second = tiny_model(), tiny_model()
    with torch.no_grad():
        next(second.parameters()).add_(1)
    found = []
    for name, teacher, language in (
        ("one", first, "en"), ("again", first, "en"), ("third", first, "ja"), ("two", second, "ja"),
    ):  # fmt: skip
        teacher.name = name
        made = write_labels(teacher, None, items, path, language=language)
        found.append([made[item.id]["text"] for item in items])
    assert found == [
        ["one en", "one ja"], ["one en", "one ja"], ["third ja", "one ja"], ["two ja", "two ja"],
    ]  # fmt: skip


def test_clips_to_label_have_ids_of_their_own(encoder):
    items = [Noise("a", None), Noise("a", None, seed=1)]
    with pytest.raises(UserError, match="two clips without a text have the id 'a'"):
        prepare(items, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))


def test_windows_read_their_stretch_alone(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 3).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    item = Item("a", tmp_path / "a.wav")
    parts = windows(item, 1.0)
    (tmp_path / "a.wav").unlink()
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Item, "load", lambda self: pytest.fail("decoded whole"))
        assert np.array_equal(np.concatenate([part.load() for part in parts]), wave)
        assert item.seconds is None and item.stated_seconds() == 3.0


def test_an_english_model_learns_english_alone(encoder):
    items = [*clips(2), Noise("german", language="de"), Noise("unnamed", language=None)]
    english = LabelEncoder(encoder.tokenizer, False, 64)
    made = prepare(items, english, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    assert [example.item.id for example in made.examples] == ["clip0", "clip1", "unnamed"]
    assert made.skipped == {"not English, as the student is": ["german"]}


def test_lengths_are_known_where_items_do_not_say(encoder):
    items = [Noise(f"n{i}", seconds=None, real_seconds=0.2 + i / 10, seed=i) for i in range(4)]
    made = prepare(items, encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"))
    dataset = SpeechDataset(made.examples, encoder, tiny_processor().feature_extractor)
    assert dataset.seconds == pytest.approx([0.2, 0.3, 0.4, 0.5])
    other = prepare(
        [*items[:3], Noise("n3", seconds=None, real_seconds=0.4, seed=3)],
        encoder, None, None, DistillConfig(), TrainConfig(), Path("unused"),
    )  # fmt: skip
    assert made.fingerprint() != other.fingerprint()


def test_a_text_of_the_data_counts_more_than_an_old_label(encoder, tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"id": i, "text": "old", "language": "en", "fault": ""} for i in ("a", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [Noise("a", "new"), Noise("b", None)]
    made = prepare(items, encoder, tiny_model(), None, DistillConfig(), TrainConfig(), path)
    assert [example.text for example in made.examples] == ["new", "old"]


def test_labels_may_hold_line_separators(tmp_path):
    path = tmp_path / "labels.jsonl"
    row = {"id": "a", "text": "one\u2028two\x85three", "language": "en", "fault": ""}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_labels(path)["a"]["text"] == row["text"]


def test_clips_may_have_names_that_are_not_utf_8(tmp_path):
    path, odd = tmp_path / "labels.jsonl", os.fsdecode(b"caf\xe9.wav")
    found = write_labels(tiny_model(), tiny_processor(), [Noise(odd, None)], path)
    assert read_labels(path) == found and odd in found


def test_long_unlabelled_audio_is_cut_at_quiet_places():
    class Speech(Noise):
        def load(self):
            wave = super().load()
            wave[14_500:15_500] = 0
            return wave

    cut = windows(Speech("long", None, seconds=2.5, real_seconds=2.5), 1.0)
    assert cut[0].start == 0 and 13_300 < cut[0].stop < 15_900
    assert all(a.stop == b.start for a, b in pairwise(cut))
    assert cut[-1].stop == 40_000 and all(len(w.load()) <= 16_000 for w in cut)
    assert cut[1].id == f"long@{cut[1].start}"


def test_recordings_are_cut_once(encoder, tmp_path):
    class Recording(Noise):
        reads = 0

        def load(self):
            type(self).reads += 1
            return super().load()

        def load_part(self, start, stop):
            return super().load()[start:stop]

    def made(seconds: float) -> list[str]:
        items = [
            *clips(1),
            Noise("a", None),
            Recording("b", None, seconds=seconds, real_seconds=seconds),
        ]
        found = prepare(
            items, encoder, teacher, tiny_processor(), DistillConfig(), TrainConfig(),
            tmp_path / "labels.jsonl", window=1.0, progress=lambda *counted: seen.append(counted),
        )  # fmt: skip
        ids = [example.item.id for example in found.examples]
        return ids + [id for group in found.skipped.values() for id in group]

    teacher, seen = tiny_model(), list[tuple[str, int, int]]()
    first = made(2.5)
    assert len(first) == 5 and first[2] == "b@0" and Recording.reads == 1
    assert seen[0] == ("recordings cut", 1, 1) and seen[-1] == ("teacher labels", 4, 4)
    path = tmp_path / "cuts.jsonl"
    path.write_text(path.read_text() + '{"id": "c", "sec')  # killed here
    assert made(2.5) == first and Recording.reads == 1
    assert made(3.75) != first and Recording.reads == 2  # another length: another recording
    path.write_text("{}\n")
    with pytest.raises(UserError, match="row 1 is not a recording's cut points: delete the file"):
        made(2.5)


def test_teacher_labels_are_written_once_and_survive_a_torn_line(tmp_path):
    teacher, processor = tiny_model(), tiny_processor()
    items = [Noise("a", None, seed=1), Noise("b", None, seed=2), Noise("c", None, None, seed=3)]
    path = tmp_path / "labels.jsonl"
    seen = []
    first = write_labels(
        teacher, processor, items, path, batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert set(first) == {"a", "b", "c"} and seen == [(1, 3), (3, 3)]
    assert all(label["fault"] in ("", "empty", "loop") for label in first.values())
    assert first["c"]["language"] in ("en", "ja")
    whole = path.read_text()
    path.write_text(whole + '{"id": "d", "te')
    assert read_labels(path) == first and path.read_text() == whole
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert write_labels(teacher, processor, items, path) == first
    path.write_text("no json\n")
    with pytest.raises(UserError, match="row 1 is not a teacher label"):
        read_labels(path)


@needs_library
def test_texts_are_written_by_an_int8_encoder_and_a_float_decoder() -> None:
    teacher = tiny_model().eval()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    writer = _writer(teacher)
    for part, activations in ((writer.model.encoder, "int8"), (writer.model.decoder, "float")):
        found = {m.spec.activations for m in part.modules() if isinstance(m, QuantLinear)}
        assert found == {activations}
    assert fast_encoder(writer.model.encoder) is not None
    assert all(torch.equal(before[n], w) for n, w in teacher.state_dict().items())


def test_loops_are_told_from_speech():
    assert is_loop("la la " * 30) and not is_loop("The quick brown fox jumps over the lazy dog.")


def test_training_on_teacher_labels(tmp_path, monkeypatch):
    from dqw.distill import labels

    def texts(teacher, processor, waves, code):
        return [{"text": f"t {len(wave)}", "language": "ja", "fault": ""} for wave in waves]

    monkeypatch.setattr(labels, "_transcribe", texts)
    seconds = [0.3, 0.4, 0.5]
    items = [Noise(f"u{i}", None, None, s, i, s) for i, s in enumerate(seconds)] + clips(1)
    result = run(tmp_path / "a", items=items)
    assert result.examples == 4
    rows = [json.loads(line) for line in (tmp_path / "a/teacher_labels.jsonl").open()]
    wanted = {f"u{i}": f"t {int(16_000 * s)}" for i, s in enumerate(seconds)}
    assert {row["id"]: row["text"] for row in rows} == wanted
    run(tmp_path / "b", items=items, config=DistillConfig(teacher_labels="all"))
    assert len((tmp_path / "b/teacher_labels.jsonl").read_text().splitlines()) == 4
