"""Word and character error rates by Whisper's conventions, with counts and intervals.

English: words after Whisper's English normalizer. Japanese, Chinese, Korean, Thai, Lao and
Burmese: characters after the basic normalizer, spaces removed (the rule of kotoba-whisper's
scores). Other languages: words after the basic normalizer; diacritics stay, for removing them
would turn が into か. Marks that have no joined form are lost even so, for these normalizers count
them as punctuation: Thai, Lao and Burmese lose tones and many vowels (ที่นี่ → ทน), and Indic words
fall apart (हिन्दी → ह न द). The rates compare with published ones, and are blind to errors there.

Rates are of the whole corpus, (S + D + I) / N, never means of clips. Clips with nothing left in
the reference are dropped and counted. Intervals are the 2.5th to 97.5th percentile of 1000
bootstrap samples over clips (percentile bootstrap, Efron 1979), seeded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from dqw.errors import UserError

CHARACTER_LANGUAGES = ("ja", "zh", "yue", "ko", "th", "lo", "my")
_SAMPLES = 1000


@dataclass(frozen=True)
class Rate:
    """Errors of a set of clips. `metric`: "WER" or "CER"; `units`: reference words or characters;
    `low` and `high`: 95 % interval of `rate`; `empty`: clips dropped for an empty reference."""

    metric: str
    substitutions: int
    deletions: int
    insertions: int
    units: int
    clips: int
    empty: int
    low: float
    high: float

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a reference unit; 0.05 is 5 %. NaN when there are no units."""
        return self.errors / self.units if self.units else float("nan")

    def to_dict(self) -> dict[str, Any]:
        rate = self.rate
        return {
            "metric": self.metric,
            "percent": _percent(rate),
            "low": _percent(self.low),
            "high": _percent(self.high),
            "errors": self.errors,
            "units": self.units,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "clips": self.clips,
            "empty": self.empty,
        }


@dataclass(frozen=True)
class Scores:
    """`languages`: code (or "?") -> Rate. `wer`, `cer`: over all clips that are scored in words or
    in characters; None where there are none."""

    languages: dict[str, Rate]
    wer: Rate | None
    cer: Rate | None

    @property
    def errors(self) -> int:
        return sum(rate.errors for rate in self.languages.values())

    @property
    def units(self) -> int:
        return sum(rate.units for rate in self.languages.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "overall": {r.metric: r.to_dict() for r in (self.wer, self.cer) if r},
            "languages": {code: rate.to_dict() for code, rate in self.languages.items()},
        }


class Normalizers:
    """The text rule of each language.

    `spelling`: British -> American spellings (`tokenizer.english_spelling_normalizer`); without it
    colour and color count as different words.
    """

    def __init__(self, spelling: dict[str, str] | None = None) -> None:
        from transformers.models.whisper.english_normalizer import (
            BasicTextNormalizer,
            EnglishTextNormalizer,
        )

        self._english = EnglishTextNormalizer(spelling or {})
        self._basic = BasicTextNormalizer()

    def __call__(self, text: str, language: str | None) -> str:
        if language == "en":
            return self._english(text).strip()
        text = self._basic(text).strip()
        return text.replace(" ", "") if language in CHARACTER_LANGUAGES else text


def read_spelling(path: str | Path) -> dict[str, str]:
    """British -> American spellings of a normalizer.json, or of the one in a folder.

    Raises UserError where there is none or it is damaged.
    """
    path = Path(path)
    file = path / "normalizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist; name a normalizer.json or a folder that has one")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(word, str) for pair in found.items() for word in pair):
            raise ValueError("a word is no text")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} holds no spellings ({error}); copy it again") from None
    return found


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str | None],
    spelling: dict[str, str] | None = None,
    seed: int = 0,
) -> Scores:
    """Score clip by clip aligned `references` and `hypotheses`; the three have one length."""
    counts: dict[str, list[np.ndarray]] = {}
    rows = clip_counts(references, hypotheses, languages, spelling)
    for row, language in zip(rows, languages, strict=True):
        counts.setdefault(language or "?", []).append(row)
    rates = {
        code: _rate(counts[code], metric_of(code), seed)
        for code in sorted(counts, key=lambda code: (-len(counts[code]), code))
    }

    def overall(metric: str) -> Rate | None:
        rows = [row for code, found in counts.items() if metric_of(code) == metric for row in found]
        return _rate(rows, metric, seed) if rows else None

    return Scores(rates, overall("WER"), overall("CER"))


def clip_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str | None],
    spelling: dict[str, str] | None = None,
) -> list[np.ndarray]:
    """[substitutions, deletions, insertions, units] of each clip; units 0: an empty reference."""
    normalize = Normalizers(spelling)
    return [
        _count(normalize(reference, language), normalize(hypothesis, language), language)
        for reference, hypothesis, language in zip(references, hypotheses, languages, strict=True)
    ]


def metric_of(language: str | None) -> str:
    """What a language is scored in: "CER" or "WER"."""
    return "CER" if language in CHARACTER_LANGUAGES else "WER"


def _count(reference: str, hypothesis: str, language: str | None) -> np.ndarray:
    """[substitutions, deletions, insertions, units]; units 0 marks an empty reference."""
    if not reference:
        return np.zeros(4, dtype=np.int64)
    process: Callable[[str, str], Any] = (
        jiwer.process_characters if language in CHARACTER_LANGUAGES else jiwer.process_words
    )
    out = process(reference, hypothesis)
    units = out.hits + out.substitutions + out.deletions
    return np.array([out.substitutions, out.deletions, out.insertions, units], dtype=np.int64)


_UNKNOWN = math.nan  # this very one, so that two rates without an interval can be equal


def _rate(rows: Sequence[np.ndarray], metric: str, seed: int) -> Rate:
    table = np.stack(rows)
    kept = table[table[:, 3] > 0]
    low = high = _UNKNOWN
    if len(kept) > 1:  # of one clip nothing is known of others
        generator = np.random.default_rng(seed)
        picks = generator.integers(0, len(kept), size=(_SAMPLES, len(kept)))
        errors, units = kept[:, :3].sum(axis=1), kept[:, 3]
        low, high = map(
            float, np.percentile(errors[picks].sum(1) / units[picks].sum(1), [2.5, 97.5])
        )
    s, d, i, n = (int(total) for total in kept.sum(axis=0)) if len(kept) else (0, 0, 0, 0)
    return Rate(metric, s, d, i, n, len(kept), len(table) - len(kept), low, high)


def _percent(rate: float) -> float | None:
    return round(100 * rate, 2) if rate == rate else None  # JSON has no NaN
