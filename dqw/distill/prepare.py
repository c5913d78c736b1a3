"""From items to examples: which clips can be learned from, with which text, and why others not."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqw.distill.config import DistillConfig, TrainConfig
from dqw.distill.cuts import Cuts
from dqw.distill.data import Example, LabelEncoder, SpeechItem
from dqw.distill.labels import write_labels
from dqw.errors import UserError
from dqw.rows import cuts_beside
from dqw.whisper.audio import SAMPLE_RATE
from dqw.whisper.data import language_code

# A clip this little over the window is cut by rounding, not by speech.
SLACK_SECONDS = 0.05
_OWN_TOKEN = re.compile(r"<\|[^|]*\|>")


@dataclass
class Prepared:
    """Examples, and the ids of clips left out, by reason."""

    examples: list[Example] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    fault: str = ""  # of the first clip that cannot be read

    def skip(self, reason: str, item: SpeechItem) -> None:
        self.skipped.setdefault(reason, []).append(item.id)

    def left_out(self) -> list[str]:
        """A line for each reason."""
        lines = [
            f"left out, {reason}: {len(ids)} ({', '.join(ids[:3])}{'…' if ids[3:] else ''})"
            for reason, ids in self.skipped.items()
        ]
        return [*lines, f"the first that cannot be read: {self.fault}"] if self.fault else lines

    def unread(self, item: SpeechItem, error: UserError) -> None:
        """Leave out a clip whose audio cannot be read."""
        self.fault = self.fault or str(error)
        self.skip("cannot be read", item)

    def fingerprint(self) -> str:
        """A hash of ids, texts, languages and lengths in their order: what a resumed run must
        share."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            known = (example.item.id, example.text, example.language, round(example.seconds, 3))
            digest.update(repr(known).encode())
        return digest.hexdigest()


def prepare(
    items: Iterable[SpeechItem],
    encoder: LabelEncoder,
    teacher: Any,
    processor: Any,
    distill: DistillConfig,
    train: TrainConfig,
    labels_path: Path,
    *,
    window: float = 30.0,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> Prepared:
    """Choose, cut and label the clips.

    Labelled clips longer than `window` (what the models hear at once, in seconds) are left out:
    their text would not match what is heard. Unlabelled ones are cut into windows at quiet places
    and labelled by the teacher, with its own `processor`; labels and, beside them, cut points
    (`cuts.jsonl`) are kept in `labels_path`, and not made again. `progress` is called with what is
    counted, how much is done, and of how much. Raises UserError if nothing is left to learn from,
    if a labelled clip has no language and the model needs one, or if two clips that the teacher is
    to label have one id.
    """
    language = None if train.language is None else str(train.language)
    language = language_code(language, "train.language")
    made = Prepared()
    labelled: list[tuple[SpeechItem, float]] = []
    unlabelled: list[tuple[SpeechItem, float]] = []
    for item in items:
        wants_teacher = distill.teacher_labels == "all" or item.text is None
        if wants_teacher and distill.teacher_labels == "never":
            made.skip("no text", item)
            continue
        try:
            seconds = _seconds(item)
        except UserError as error:
            made.unread(item, error)
            continue
        if not encoder.multilingual and not _is_english(item.language or language):
            made.skip("not English, as the student is", item)
            continue
        if not wants_teacher:
            if seconds > window + SLACK_SECONDS:
                made.skip(f"longer than {window:g} s", item)
            else:
                labelled.append((item, seconds))
        else:
            unlabelled.append((item, seconds))
    unlabelled = _cut(unlabelled, window, cuts_beside(labels_path), made, progress)
    texts: dict[str, dict[str, Any]] = {}
    if unlabelled:
        _check_ids([item.id for item, _ in unlabelled])
        texts = write_labels(
            teacher,
            processor,
            [item for item, _ in unlabelled],
            labels_path,
            language=language,
            batch_size=train.label_batch_size,
            progress=lambda done, total: progress("teacher labels", done, total),
            unread=made.unread,
        )
        gone = set(made.skipped.get("cannot be read", ()))
        unlabelled = [pair for pair in unlabelled if pair[0].id not in gone]
    for item, seconds in labelled:
        _add(made, item, seconds, None, encoder, language)
    for item, seconds in unlabelled:
        _add(made, item, seconds, texts.get(item.id), encoder, language)
    if not made.examples:
        reasons = "; ".join(f"{reason}: {len(ids)}" for reason, ids in made.skipped.items())
        fault = f" The first that cannot be read: {made.fault}" if made.fault else ""
        raise UserError(
            f"no clip is left ({reasons or 'the data holds none'}): give clips of "
            f"up to {window:g} s with a text, or allow teacher labels.{fault}"
        )
    return made


def _is_english(language: str | None) -> bool:
    """Unless it says otherwise, or what Whisper does not know."""
    try:
        return language_code(language, "") in (None, "en")
    except UserError:
        return False


def _cut(
    items: list[tuple[SpeechItem, float]],
    window: float,
    path: Path,
    made: Prepared,
    progress: Callable[[str, int, int], object],
) -> list[tuple[SpeechItem, float]]:
    """``items``, each with its length, and in place of those that no window holds their windows."""
    long = sum(seconds > window + SLACK_SECONDS for _, seconds in items)
    if not long:
        return items
    cuts = Cuts(path)
    found: list[tuple[SpeechItem, float]] = []
    done = 0
    for item, seconds in items:
        if seconds <= window + SLACK_SECONDS:
            found.append((item, seconds))
            continue
        try:
            found += [(part, part.seconds) for part in cuts.windows(item, seconds, window)]
        except UserError as error:
            made.unread(item, error)
        done += 1
        progress("recordings cut", done, long)
    return found


def _seconds(item: SpeechItem) -> float:
    """Length of a clip, decoded where nothing else says it."""
    if item.seconds is not None:
        return item.seconds
    stated = getattr(item, "stated_seconds", None)  # another's items may have none
    return float(stated()) if stated is not None else len(item.load()) / SAMPLE_RATE


def _check_ids(ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(key for key, count in Counter(ids).items() if count > 1)
        raise UserError(
            f"two clips without a text have the id {twice!r}, and the teacher's texts are kept by "
            "id: give each clip its own."
        )


def _add(
    made: Prepared,
    item: SpeechItem,
    seconds: float,
    label: dict[str, Any] | None,
    encoder: LabelEncoder,
    default_language: str | None,
) -> None:
    text = item.text if label is None else label["text"]
    language = item.language or default_language or (label or {}).get("language")
    if label is not None and label["fault"]:
        made.skip(f"teacher label {label['fault']}", item)
        return
    if text is None or not text.strip():
        made.skip("empty text", item)
        return
    if _OWN_TOKEN.search(text):  # the tokenizer would take them for what they name
        made.skip("text that holds Whisper's own tokens, as <|0.00|>", item)
        return
    if not encoder.multilingual:
        language = None
    elif language is None:
        raise UserError(
            f"the clip {item.id} has a text but no language, and the model needs one: add it to "
            "the data, or set train.language (--language)."
        )
    else:
        try:
            language = language_code(language, f"the clip {item.id}: the language")
            encoder.prefix(language)
        except UserError:
            made.skip(f"language {language}, which the student has not", item)
            return
    if not encoder.fits(text, language):
        made.skip(f"text of more than {encoder.max_length} tokens", item)
        return
    made.examples.append(Example(item, text, language, seconds))
