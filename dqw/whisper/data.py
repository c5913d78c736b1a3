"""Speech to train and to score on: a manifest, a folder of audio, or a Hugging Face dataset.

Manifest: one JSON object a line, with `audio` (a path relative to the manifest), and optionally
`id`, `text` (null: no transcript; a teacher can write one), `language` (a code such as "ja") and
`seconds`. Other keys are left alone. Everything is validated before the first clip is decoded,
and audio is decoded one clip at a time, when `Item.load` is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dqw.errors import UserError
from dqw.whisper.audio import (
    EncodedAudio,
    audio_seconds,
    load_audio,
    load_stretch,
    readable_suffixes,
)
from dqw.whisper.inputs import audio_files

_TEXT_COLUMNS = (
    *("text", "sentence", "transcription", "transcript", "normalized_text"),
    *("raw_text", "raw_transcription", "reference"),
)
_LANGUAGE_COLUMNS = ("language", "locale")
# Codes of FLEURS and Common Voice for what Whisper calls otherwise.
_ALIASES = {"nb": "no", "cmn": "zh", "fil": "tl", "jv": "jw", "iw": "he"}


@dataclass(frozen=True)
class Item:
    """One clip. `text` None: unlabelled. `language`: a Whisper code, or None when not known.
    `seconds` is None only where knowing it would mean decoding (Hugging Face datasets)."""

    id: str
    audio: Path | EncodedAudio
    text: str | None = None
    language: str | None = None
    seconds: float | None = None

    def load(self) -> np.ndarray:
        """Mono float32 samples at 16 kHz; raises UserError naming the file."""
        return load_audio(self.audio)

    def load_part(self, start: int, stop: int) -> np.ndarray:
        """Samples ``start`` to ``stop`` of these, without decoding the rest."""
        return load_stretch(self.audio, start, stop)

    def stated_seconds(self) -> float:
        """``seconds``, or what the headers say where that is not known."""
        return audio_seconds(self.audio) if self.seconds is None else self.seconds


@dataclass(frozen=True)
class DatasetAudio:
    """The audio of one row of a Hugging Face dataset, read when asked for."""

    dataset: Any
    row: int
    column: str
    name: str

    def read_bytes(self) -> bytes:
        cell = self.dataset[self.row][self.column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        path = cell.get("path")
        if not path or not Path(path).is_file():
            why = f"{path} is not there" if path else "its cell is empty"
            raise UserError(f"{self.name} has no audio ({why}); leave that row out")
        return Path(path).read_bytes()

    def __str__(self) -> str:
        return self.name


def load_items(
    data: str | Path,
    language: str | None = None,
    *,
    need_text: bool = False,
    limit: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Item]:
    """The clips of `data`, in its order.

    `data`: a manifest.jsonl, a folder of audio (the transcript of NAME.wav is NAME.txt beside it;
    a manifest.jsonl inside is used when there is one), a folder that `Dataset.save_to_disk` wrote,
    or a Hugging Face dataset as name[:config][:split].
    `language`: keep only the clips of this language; clips that name none are taken to be in it.
    `need_text`: leave out clips without a transcript (an error when none has one).
    `limit`: at most this many clips. `say` hears how many were left out for lack of a text, or, of
    a folder, as they cannot be read, and where a dataset has no texts.
    Raises UserError with the row or file and the cure.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; give at least 1 clip")
    code = language_code(language, "the language option")
    items = _read(data, say)
    if code is not None:
        languages = sorted({item.language for item in items if item.language})
        items = [replace(i, language=code) for i in items if i.language in (None, code)]
        if not items:
            raise UserError(f"{data} has no clip in '{code}'; it has {', '.join(languages)}")
    if need_text:
        with_text = [item for item in items if item.text is not None]
        left = len(items) - len(with_text)
        if not with_text:
            raise UserError(
                f"no clip of {data} has a text; scoring needs transcripts: the key 'text' of a "
                "manifest's row, or NAME.txt beside NAME.wav"
            )
        if left:
            say(f"{left} of {len(items)} clips are left out, as they have no text")
        items = with_text
    return items[:limit]


def language_code(language: str | None, where: str) -> str | None:
    """Whisper's code for a code, an English name ("japanese") or a locale ("pt-BR", "ja_jp").

    Raises UserError, starting with `where`, for anything else.
    """
    if language is None:
        return None
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    word = language.strip().lower().strip("<|>")
    for guess in (word, word.replace("_", "-").split("-")[0]):
        guess = _ALIASES.get(guess, guess)
        if guess in LANGUAGES:
            return guess
        if guess in TO_LANGUAGE_CODE:
            return TO_LANGUAGE_CODE[guess]
    raise UserError(
        f"{where} is '{language}', which Whisper does not know; give a code such as en, de or ja"
    )


def _read(data: str | Path, say: Callable[[str], object]) -> list[Item]:
    path = Path(data)
    if path.is_dir():
        if (path / "manifest.jsonl").is_file():
            return _read_manifest(path / "manifest.jsonl")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            from datasets import Dataset

            return _from_dataset(Dataset.load_from_disk(str(path)), str(path), say)
        if (path / "dataset_dict.json").is_file():
            splits = sorted(f.name for f in path.iterdir() if (f / "state.json").is_file())
            raise UserError(
                f"{path} holds the splits {', '.join(splits)}; give one, as {path}/NAME"
            )
        return _read_folder(path, say)
    if path.is_file():
        if path.suffix.lower() in readable_suffixes():
            raise UserError(f"{path} is one audio file; give its folder or a manifest.jsonl")
        return _read_manifest(path)
    if path.suffix == ".jsonl" or path.is_absolute() or str(data).startswith((".", "~")):
        raise UserError(f"{path} does not exist; give a manifest.jsonl, a folder or a dataset name")
    return _read_hub(str(data), say)


def _read_manifest(path: Path) -> list[Item]:
    items: list[Item] = []
    first_row: dict[str, int] = {}
    try:
        # Not splitlines(): inside a JSON string U+2028 and the like end no line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the manifest as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} row {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg}); write one object a line") from None
        item = _manifest_item(row, path.parent, where)
        if item.id in first_row:
            raise UserError(
                f"{where}: the id '{item.id}' stands in row {first_row[item.id]} already; "
                "give each row its own"
            )
        first_row[item.id] = number
        items.append(item)
    if not items:
        raise UserError(f"{path} has no rows; write one JSON object a line")
    return items


def _manifest_item(row: Any, folder: Path, where: str) -> Item:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write {{"audio": …, "text": …}}')
    if "audio" not in row:
        keys = ", ".join(f"'{key}'" for key in row) or "none"
        raise UserError(f"{where} lacks the key 'audio' (its keys: {keys}); rename the one that "
                        "holds the file's path")  # fmt: skip
    for key in ("audio", "text", "language", "id"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' is {row[key]!r}, not a string; put it in quotes")
    audio = row["audio"]
    if not audio:
        raise UserError(f"{where}: 'audio' is empty; give the file's path")
    text = _checked_text(row.get("text"), where, "write null where there is no transcript")
    try:
        seconds = audio_seconds(folder / audio)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Item(
        id=row.get("id") or Path(audio).with_suffix("").as_posix(),
        audio=folder / audio,
        text=text,
        language=language_code(row.get("language"), f"{where}: 'language'"),
        seconds=seconds,
    )


def _checked_text(text: str | None, where: str, cure: str) -> str | None:
    if text is not None and not text.strip():
        raise UserError(f"{where}: the text is empty; {cure}")
    return text


def _read_folder(folder: Path, say: Callable[[str], object]) -> list[Item]:
    """Its audio; files that cannot be read are left out and said, unless all are so."""
    files, other = audio_files(folder)
    if not files:
        raise UserError(
            f"{folder} holds no audio; {other or 'put wav, flac, mp3 or ogg files there'}"
        )
    if other:
        say(f"{other}; they are left out")
    items, faults = [], list[UserError]()
    for file in files:
        beside = file.with_suffix(".txt")
        text = _read_transcript(beside) if beside.is_file() else None
        try:
            seconds = audio_seconds(file)
        except UserError as error:
            faults.append(error)
            continue
        items.append(Item(file.relative_to(folder).as_posix(), file, text, None, seconds))
    if not items:
        raise faults[0]
    if faults:
        say(f"{len(faults)} of {len(files)} files cannot be read and are left out: {faults[0]}")
    return items


def _read_transcript(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save the transcript as UTF-8") from None
    return _checked_text(text, str(file), "write the transcript or delete the file")


def _read_hub(name: str, say: Callable[[str], object]) -> list[Item]:
    parts = re.split(r":(?![^\[]*\])", name)  # a split may be a slice, train[:5%]
    if len(parts) > 3 or not all(parts):
        raise UserError(f"'{name}' is no dataset name; write name, name:split or name:config:split")
    config, split = None, "train"
    if len(parts) == 3:
        config, split = parts[1:]
    elif len(parts) == 2:
        looks_like_split = parts[1].split("[")[0] in ("train", "validation", "dev", "test", "all")
        config, split = (None, parts[1]) if looks_like_split else (parts[1], "train")
    from datasets import load_dataset

    from dqw.whisper.checkpoint import quiet_transformers

    try:
        with quiet_transformers():
            dataset = load_dataset(parts[0], config, split=split)
    except Exception as error:  # datasets raises dozens of kinds; the first line says which
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{name} is neither a file here nor a dataset that could be loaded ({reason}); check "
            "the path, or the dataset's name:config:split and the network"
        ) from None
    return _from_dataset(dataset, name, say)


def _column(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    names = set(names)
    return next((name for name in wanted if name in names), None)


def _from_dataset(dataset: Any, name: str, say: Callable[[str], object]) -> list[Item]:
    from datasets import Audio

    features = dataset.features
    column = next((key for key, value in features.items() if isinstance(value, Audio)), None)
    if column is None:
        raise UserError(f"{name} has no audio column (it has {', '.join(features)}); pick another")
    # Alone: a row's other columns would be decoded with it.
    audio = dataset.select_columns([column]).cast_column(column, Audio(decode=False))
    text_column = _column(features, _TEXT_COLUMNS)
    if text_column is None:
        say(f"{name} has no column of texts that is known ({', '.join(_TEXT_COLUMNS)}; it has "
            f"{', '.join(features)}): its clips count as unlabelled")  # fmt: skip
    language_column = _column(features, _LANGUAGE_COLUMNS)
    labels = dataset.select_columns(
        [c for c in (text_column, language_column, "id") if c in features]
    )
    items = []
    for row in range(len(dataset)):
        values = labels[row] if labels.column_names else {}
        where = f"{name} row {row + 1}"
        text = values.get(text_column) if text_column else None
        spoken = values.get(language_column) if language_column else None
        key = values.get("id")
        items.append(
            Item(
                id=key if isinstance(key, str) and key else str(row),
                audio=DatasetAudio(audio, row, column, where),
                text=text if isinstance(text, str) and text.strip() else None,
                language=_known_language(spoken),
            )
        )
    if not items:
        raise UserError(f"{name} has no rows; pick another split")
    if len({item.id for item in items}) < len(items):  # labels are kept by id
        items = [replace(item, id=f"{item.id}#{n}") for n, item in enumerate(items)]
    return items


def _known_language(name: Any) -> str | None:
    """A dataset's own language labels are a help, not a promise: unknown ones count as none."""
    try:
        return language_code(name, "") if isinstance(name, str) else None
    except UserError:
        return None
