"""Manifests, folders and datasets: what is read, and the row and cure of every mistake."""

import json

import numpy as np
import pytest
from whisper_helpers import write_tone

from dqw.errors import UserError
from dqw.whisper import media
from dqw.whisper.data import DatasetAudio, language_code, load_items


@pytest.fixture
def folder(tmp_path):
    write_tone(tmp_path / "audio" / "a.wav", 0.5)
    write_tone(tmp_path / "audio" / "b.flac", 0.25)
    return tmp_path


def manifest(folder, *rows):
    path = folder / "manifest.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_manifest_rows(folder):
    path = manifest(
        folder,
        {"id": "first", "audio": "audio/a.wav", "text": "Hello.", "language": "en", "speaker": 3},
        "",
        {"audio": "audio/b.flac", "text": None, "language": "Japanese", "seconds": 9},
    )
    first, second = load_items(path)
    assert (first.id, first.text, first.language, first.seconds) == ("first", "Hello.", "en", 0.5)
    assert (second.id, second.text, second.language) == ("audio/b", None, "ja")
    assert second.seconds == 0.25 and len(second.load()) == 4_000
    assert load_items(folder) == [first, second]  # the folder's manifest is used
    assert load_items(path, need_text=True) == [first]
    assert load_items(path, limit=1) == [first]


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "/nowhere/a.wav"}, {}])
def test_a_row_of_a_dataset_without_audio(cell):
    audio = DatasetAudio([{"audio": cell}], 0, "audio", "speech row 0")
    with pytest.raises(UserError, match=r"speech row 0 has no audio \(.*\); leave that row out"):
        audio.read_bytes()


def test_language_keeps_its_clips_and_the_unlabelled(folder):
    rows = [
        {"id": "1", "audio": "audio/a.wav", "language": "en"},
        {"id": "2", "audio": "audio/a.wav", "language": "ja"},
        {"id": "3", "audio": "audio/b.flac"},
    ]
    path = manifest(folder, *rows)
    assert [(i.id, i.language) for i in load_items(path, "ja")] == [("2", "ja"), ("3", "ja")]
    assert [i.language for i in load_items(path)] == ["en", "ja", None]
    with pytest.raises(UserError, match="no clip in 'de'; it has en, ja"):
        load_items(manifest(folder, *rows[:2]), "de")
    with pytest.raises(UserError, match="scoring needs transcripts"):
        load_items(path, need_text=True)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"path": "audio/a.wav", "text": "x"}, r"lacks the key 'audio' \(its keys: 'path', 'text'"),
        ({"audio": "audio/none.wav"}, "none.wav does not exist"),
        ({"audio": ""}, "'audio' is empty"),
        ({"audio": "audio/a.wav", "text": "  "}, "the text is empty; write null"),
        ({"audio": "audio/a.wav", "text": 5}, "'text' is 5, not a string"),
        ({"audio": "audio/a.wav", "language": "klingon"}, "'klingon', which Whisper does not know"),
        ({"id": "one", "audio": "audio/a.wav"}, "the id 'one' stands in row 1 already"),
        ("{'audio': 1}", "is not JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_its_cure(folder, row, words):
    good = {"id": "one", "audio": "audio/a.wav", "text": "x"}
    with pytest.raises(UserError, match=words) as caught:
        load_items(manifest(folder, good, row))
    assert "manifest.jsonl row 2" in str(caught.value)


def test_a_bad_manifest(folder):
    with pytest.raises(UserError, match="has no rows"):
        load_items(manifest(folder, ""))
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        load_items(folder / "none.jsonl")
    with pytest.raises(UserError, match="one audio file"):
        load_items(folder / "audio" / "a.wav")
    (folder / "latin.jsonl").write_bytes(b'{"audio": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_items(folder / "latin.jsonl")
    with pytest.raises(UserError, match="limit is 0"):
        load_items(folder, limit=0)


def test_audio_folder_with_texts_beside(folder):
    (folder / "audio" / "a.txt").write_text("Hello.\n")
    first, second = load_items(folder / "audio")
    assert (first.id, first.text, second.id, second.text) == ("a.wav", "Hello.", "b.flac", None)
    (folder / "audio" / "b.txt").write_text("\n")
    with pytest.raises(UserError, match=r"b\.txt: the text is empty"):
        load_items(folder / "audio")
    (folder / "none").mkdir()
    with pytest.raises(UserError, match="holds no audio"):
        load_items(folder / "none")


def test_a_folder_with_files_that_cannot_be_read(folder, monkeypatch):
    monkeypatch.setattr(media, "installed", lambda: False)
    said = []
    (folder / "audio" / "c.mp3").write_bytes(b"<html>not found</html>")
    (folder / "audio" / "d.m4a").write_bytes(b"0000ftypM4A ")
    items = load_items(folder / "audio", say=said.append)
    assert [item.id for item in items] == ["a.wav", "b.flac"]
    assert any("1 of 3 files cannot be read and are left out" in s and "c.mp3" in s for s in said)
    assert any("1 files such as d.m4a are of a type that PyAV reads" in s for s in said)
    for name in ("a.wav", "b.flac"):
        (folder / "audio" / name).unlink()
    with pytest.raises(UserError, match=r"c\.mp3 does not hold audio"):
        load_items(folder / "audio")
    (folder / "audio" / "c.mp3").unlink()
    with pytest.raises(UserError, match=r"holds no audio; 1 files such as d.m4a are of a type"):
        load_items(folder / "audio")


def test_text_files_as_windows_writes_them(folder):
    (folder / "audio" / "a.txt").write_text("Hello there.", encoding="utf-8-sig")
    assert load_items(folder / "audio")[0].text == "Hello there."
    (folder / "audio" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text"):
        load_items(folder / "audio")


def test_manifests_with_a_mark_in_front_and_line_separators_in_a_text(folder):
    text = "One.\u2028Two.\u2029Three.\x85"
    row = json.dumps({"audio": "audio/a.wav", "text": text}, ensure_ascii=False)
    path = folder / "manifest.jsonl"
    path.write_text(f"{row}\n", encoding="utf-8-sig", newline="\r\n")
    assert [item.text for item in load_items(path)] == [text]


def test_hidden_files_are_no_clips(folder):
    (folder / "audio" / "._a.wav").write_bytes(b"Mac OS X resource fork")
    assert [item.id for item in load_items(folder / "audio")] == ["a.wav", "b.flac"]


@pytest.fixture
def dataset(folder):
    from datasets import Audio, Dataset

    rows = {
        "audio": [str(folder / "audio" / "a.wav"), str(folder / "audio" / "b.flac")],
        "sentence": ["Hello.", "Welt"],
        "locale": ["en-US", "xx"],
    }
    return Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))


def test_dataset_rows_are_decoded_when_asked_for(folder, dataset):
    dataset.save_to_disk(folder / "saved")
    first, second = load_items(folder / "saved")
    assert (first.text, first.language, first.seconds) == ("Hello.", "en", None)
    assert (second.text, second.language) == ("Welt", None)
    assert len(first.load()) == 8_000 and np.abs(second.load()).max() > 0.2


def test_a_dataset_of_several_splits_and_of_more_audio(folder, dataset):
    from datasets import Audio, DatasetDict

    DatasetDict(train=dataset, test=dataset).save_to_disk(folder / "both")
    with pytest.raises(UserError, match=r"both holds the splits test, train; give one, as"):
        load_items(folder / "both")
    (folder / "other.wav").write_bytes(b"no audio")
    more = dataset.add_column("noisy", [str(folder / "other.wav")] * 2)
    more.cast_column("noisy", Audio()).save_to_disk(folder / "saved")
    assert len(load_items(folder / "saved")[0].load()) == 8_000  # the other column is left alone


def test_dataset_rows_without_text_and_with_one_id(folder, dataset):
    said = []
    dataset.remove_columns("sentence").save_to_disk(folder / "mute")
    assert load_items(folder / "mute", say=said.append)[0].text is None
    assert "has no column of texts that is known" in said[0] and "audio, locale" in said[0]
    for texts, kept in ((["Hello.", " "], ["Hello.", None]), ([7, 8], [None, None])):
        rows = dataset.remove_columns("sentence").add_column("text", texts)
        rows = rows.add_column("id", ["same", "same"])
        rows.save_to_disk(folder / f"saved{texts[0]}")
        items = load_items(folder / f"saved{texts[0]}")
        assert [item.text for item in items] == kept
        assert [item.id for item in items] == ["same#0", "same#1"]


def test_a_damaged_dataset_row_is_named_when_decoded(monkeypatch, folder, dataset):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: dataset)
    first, second = load_items("org/set")
    assert len(first.load()) == 8_000  # by its path: the dataset holds no bytes
    (folder / "audio" / "b.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match="org/set row 2 is corrupt"):
        second.load()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set:test", ("org/set", None, "test")),
        ("org/set:train[:5%]", ("org/set", None, "train[:5%]")),
        ("org/set:ja_jp", ("org/set", "ja_jp", "train")),
        ("org/set:ja_jp:validation", ("org/set", "ja_jp", "validation")),
    ],
)
def test_dataset_names(monkeypatch, dataset, name, asked):
    seen = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda path, config, split: seen.append((path, config, split)) or dataset,
    )
    assert len(load_items(name)) == 2 and seen == [asked]


def test_a_dataset_that_cannot_be_had(monkeypatch, dataset):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        UserError, match=r"org/set is neither .*no route to host\); check"
    ) as caught:
        load_items("org/set")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no dataset name"):
        load_items("a:b:c:d")
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: dataset.remove_columns("audio"))
    with pytest.raises(UserError, match="no audio column"):
        load_items("org/set")


def test_language_codes():
    codes = [language_code(x, "it") for x in ("en", "English", "pt-BR", "ja_jp", "<|de|>", None)]
    assert codes == ["en", "en", "pt", "ja", "de", None]
    aliases = [language_code(x, "it") for x in ("nb-NO", "cmn_hans_cn", "fil_ph", "jv", "iw")]
    assert aliases == ["no", "zh", "tl", "jw", "he"]
    with pytest.raises(UserError, match="it is 'xx'"):
        language_code("xx", "it")
