"""Whisper's tokenizer from a bare tokenizer.json, and the ids that decoding needs from it."""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqw.errors import UserError

if TYPE_CHECKING:
    from transformers import WhisperTokenizer


def load_tokenizer(folder: Path) -> WhisperTokenizer:
    """The tokenizer of a folder's tokenizer.json, with its special tokens in Whisper's order.

    Raises UserError when the file is missing or damaged, or when ids come out differently (a
    tokenizer.json that lacks merges encodes wrongly without a word).
    """
    from tokenizers import AddedToken
    from transformers import WhisperTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} lacks tokenizer.json; copy it from the model's page (openai/whisper-*)"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        vocab = stored["model"]["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in
                  stored["model"]["merges"]]  # fmt: skip
        added = sorted(stored["added_tokens"], key=lambda token: token["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
    names = {token["content"]: token["id"] for token in added}
    end = "<|endoftext|>"
    if end not in names or "<|notimestamps|>" not in names:
        raise UserError(
            f"{path} is not Whisper's: it lacks {end} or <|notimestamps|>; copy it again"
        )
    # Byte-level BPE: one piece a byte, one a merge, so the counts must agree.
    pieces = sum(1 for piece in vocab if piece and piece not in names)
    if pieces != 256 + len(merges):
        raise UserError(
            f"{path} has {pieces} pieces for {len(merges)} merges, which do not fit: text would be "
            "encoded wrongly; take the tokenizer.json of openai/whisper-*"
        )  # fmt: skip
    special = [AddedToken(t, normalized=False, special=True) for t in names if not _is_time(t)]
    normalizer = folder / "normalizer.json"
    tokenizer = WhisperTokenizer(
        vocab=vocab,
        merges=merges,
        normalizer_file=str(normalizer) if normalizer.is_file() else None,
        extra_special_tokens=special,
        model_max_length=448,
    )
    # Older files stop before the timestamps; their ids follow in any Whisper.
    times = [t for t in names if _is_time(t)] or [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in times])
    for token, number in names.items():
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise UserError(
                f"{path}: the token {token} has id {number}, out of order; copy it again"
            )
    return tokenizer


class Pieces:
    """Tokens to text with the vocabulary of a tokenizer.json, and no more: the library that also
    encodes needs 40 MB for it, an eighth of what transcribing takes. Merges are not even parsed:
    what they would leave behind takes 11 MB. ``tokens`` alone asks the library."""

    def __init__(self, file: Path) -> None:
        """Raises UserError if the file holds no vocabulary, or only a part of it."""
        self.file = file
        stored = file.read_bytes()
        try:
            ids: dict[str, int] = _value(stored, _VOCABULARY, _MERGES)
            added = _value(stored, _ADDED, _VOCABULARY)
            special = {token["id"] for token in added if token["special"]}
            own = {token["id"]: _as_letters(token["content"]) for token in added}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); copy it again") from None
        del stored
        pieces = [""] * (max(*ids.values(), *own) + 1)
        for number, piece in (*((n, p) for p, n in ids.items()), *own.items()):
            pieces[number] = "" if number in special else piece
        # Side by side: as strings of their own they would take five times as much.
        self._letters = "".join(pieces)
        self._ends = array("L", itertools.accumulate(map(len, pieces), initial=0))

    def text(self, tokens: Sequence[int]) -> str:
        """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        ends = self._ends
        letters = "".join(self._letters[ends[token] : ends[token + 1]] for token in tokens)
        return letters.translate(_BYTES).encode("latin-1").decode("utf-8", "replace")

    def tokens(self, text: str) -> list[int]:
        """Those of a text, without any before and after it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.file)).encode(text, add_special_tokens=False).ids


# Strings in JSON cannot look like a key and what it opens.
_ADDED, _VOCABULARY, _MERGES = (
    re.compile(rb'"%s"\s*:\s*(?=%s)' % key)
    for key in ((b"added_tokens", rb"\["), (b"vocab", rb"\{"), (b"merges", rb"\["))
)


def _value(stored: bytes, key: re.Pattern[bytes], until: re.Pattern[bytes]) -> Any:
    """What ``key`` of a JSON text stands for; nothing is decoded from ``until`` on."""
    found = key.search(stored)
    if found is None:
        raise ValueError("it holds no vocabulary")
    rest = until.search(stored, found.end())
    text = stored[found.end() : rest.start() if rest else None].decode("utf-8")
    return json.JSONDecoder().raw_decode(text)[0]


def _byte_letters() -> dict[int, int]:
    """Byte-level BPE's letter for each byte → the byte: itself where it can be seen, the others
    from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {byte: byte for byte in seen} | {0x100 + i: byte for i, byte in enumerate(rest)}


_BYTES = _byte_letters()
_LETTERS = {byte: chr(letter) for letter, byte in _BYTES.items()}


def _as_letters(text: str) -> str:
    """A token that was added stands there as it is, not as letters for its bytes."""
    return text if text.isascii() else "".join(_LETTERS[byte] for byte in text.encode())


def prompt_ids(tokenizer: WhisperTokenizer) -> dict[str, Any]:
    """The generation settings that are ids of special tokens: languages, tasks, timestamps. And the
    task, which `generate` would otherwise leave out of the prompt where no language is given.

    A multilingual vocabulary starts its special tokens at 50257, an English-only one at 50256.
    """
    ids = tokenizer.get_added_vocab()
    start, translate = ids["<|startoftranscript|>"], ids["<|translate|>"]
    multilingual = tokenizer.convert_tokens_to_ids("<|endoftext|>") != 50256
    settings: dict[str, Any] = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
    }
    if multilingual:
        settings["lang_to_id"] = {t: i for t, i in ids.items() if start < i < translate}
        settings["task_to_id"] = {"transcribe": ids["<|transcribe|>"], "translate": translate}
        settings["task"] = "transcribe"
    return settings


def _is_time(token: str) -> bool:
    return token[2:-2].replace(".", "", 1).isdigit()
