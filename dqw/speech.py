"""Windows of speech to measure a model on: what calibration and sensitivities need.

A window is what Whisper hears at once, 30 s: a clip and others of its language joined to it, with
the tokens it should give. Clips without a text are labelled by the teacher.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from dqw.recipe import Recipe

if TYPE_CHECKING:
    from dqw.distill.data import SpeechItem
    from dqw.distill.pair import Pair

WINDOWS = 96  # where the recipe names no number
BATCH = 4
OF_ONE = 8  # windows of one recording, where there are others enough: they speak differently


class Spoken(Protocol):
    """What has a language, or None."""

    @property
    def language(self) -> str | None: ...


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """At most ``count`` of ``items``, evenly spaced; None: all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def spread_evenly(items: Sequence[Any], count: int | None) -> list[Any]:
    """The same within each language, and one of each at least while ``count`` allows, in their
    order: where languages take turns, every second clip would be of one."""
    first: dict[str | None, int] = {}
    for index, item in enumerate(items):
        first.setdefault(item.language, index)
    by_language = sorted(range(len(items)), key=lambda index: first[items[index].language])
    chosen = spread(by_language, count)
    missing = [i for code, i in first.items() if all(items[c].language != code for c in chosen)]
    for index in missing:  # takes the place of one of the language that has most
        codes = [items[c].language for c in chosen]
        most = max(codes, key=codes.count, default=None)
        if codes.count(most) < 2:
            break
        del chosen[len(codes) - 1 - codes[::-1].index(most)]
        chosen.append(index)
    return [items[i] for i in sorted(chosen)]


def balanced(items: Sequence[Spoken], count: int) -> list[int]:
    """Which at most ``count`` of ``items`` to calibrate on, as sorted indices.

    Languages share in them as the 0.3th power of their clips (as mT5 draws, arXiv 2010.11934),
    evenly spaced within each. base at 39.4 MiB, 160 windows of speech of which seven eighths are
    English: KL of other languages 0.032 instead of 0.037, of English 0.0078 instead of 0.0067.
    """
    places: dict[str | None, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(item.language, []).append(index)
    share = dict.fromkeys(places, 0)
    for _ in range(min(count, len(items))):  # each to the language that lacks most
        open_ones = [code for code in places if share[code] < len(places[code])]
        share[max(open_ones, key=lambda code: len(places[code]) ** 0.3 / (share[code] + 1))] += 1
    return sorted(index for code in places for index in spread(places[code], share[code]))


def stretches(
    items: Sequence[SpeechItem], wanted: int, window: float, teacher_labels: str
) -> list[SpeechItem]:
    """``balanced`` clips for about ``wanted`` windows of ``window`` seconds. A recording that the
    teacher is to write down is several of them, evenly spaced and held in memory, and no more."""

    def count(item: SpeechItem) -> int:
        written = teacher_labels == "never" or (item.text is not None and teacher_labels != "all")
        if written or item.seconds is None or item.seconds < 2 * window:
            return 1
        return int(item.seconds // window)

    counts = [count(item) for item in items]
    chosen = balanced(items, wanted)
    recordings = sum(number > 1 for number in counts)
    if recordings:
        wanted += wanted // 8  # some of them will have no text that can be used
        most = max(OF_ONE, math.ceil(wanted / recordings))
        counts = [min(number, most) for number in counts]
        for number in range(1, len(chosen) + 1):
            chosen = balanced(items, number)
            if sum(counts[index] for index in chosen) >= wanted:
                break
    found: list[SpeechItem] = []
    for index in chosen:
        item = items[index]
        found += [item] if counts[index] == 1 else _held(item, counts[index], window)
    return found


def _held(item: SpeechItem, count: int, window: float) -> list[SpeechItem]:
    from dqw.distill.cuts import windows

    wave = item.load()
    return [part.held(wave) for part in spread(windows(item, window, wave), count)]


def calibration_batches(
    items: Sequence[SpeechItem],
    recipe: Recipe,
    pair: Pair,
    say: Callable[[str], object],
    labels: Path | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of at most 4 windows: input_features (batch, mel, 3000), decoder_input_ids and
    decoder_mask (batch, length), on the CPU.

    ``recipe.distill.calibration_clips`` windows (96 if it is 0), from ``stretches``.
    labels: where the teacher's texts are kept; None: not. Raises UserError if no clip can be used.
    """
    wanted = recipe.distill.calibration_clips or WINDOWS
    joined = replace(recipe.distill.augment, concatenate=0.8, noise=0.0, speed=0.0, redraw=True)
    window = float(pair.processor.feature_extractor.chunk_length)
    chosen = stretches(items, wanted, window, recipe.distill.teacher_labels)
    dataset, collate = _dataset(chosen, recipe, joined, pair, say, labels)
    plenty = wanted < len(items) or wanted < len(chosen)
    count = min(wanted, len(dataset)) if plenty else min(wanted, 2 * len(dataset))
    names = ("input_features", "decoder_input_ids", "decoder_mask")
    batches = []
    for start in range(0, count, BATCH):
        batch = collate([dataset[key] for key in range(start, min(start + BATCH, count))])
        batches.append({name: batch[name] for name in names})
    return batches


def clip_batches(
    items: Sequence[SpeechItem], recipe: Recipe, pair: Pair, say: Callable[[str], object]
) -> Iterator[dict[str, Tensor]]:
    """The same of every clip by itself, in order, each made when it is asked for, and
    ``teacher_features`` where the two models hear with other mel bins. Clips that no window holds
    are left out, and said; texts are those of the data."""
    alone = replace(recipe.distill.augment, concatenate=0.0, noise=0.0, speed=0.0)
    given = replace(recipe, distill=replace(recipe.distill, teacher_labels="never"))
    dataset, collate = _dataset(items, given, alone, pair, say)
    return (collate([dataset.read(key)]) for key in range(len(dataset)))


def _dataset(
    items: Sequence[SpeechItem],
    recipe: Recipe,
    augment: Any,
    pair: Pair,
    say: Callable[[str], object],
    labels: Path | None = None,
) -> tuple[Any, Callable[[list[dict[str, Any]]], dict[str, Tensor]]]:
    """Windows of ``items`` with their tokens, and what stacks some to a batch."""
    from dqw.distill.data import Collator, LabelEncoder, SpeechDataset
    from dqw.distill.pair import is_multilingual
    from dqw.distill.prepare import prepare

    encoder = LabelEncoder(
        pair.processor.tokenizer,
        is_multilingual(pair.student),
        pair.student.config.max_target_positions,
    )
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(
            items, encoder, pair.teacher, pair.teacher_processor, recipe.distill, recipe.train,
            labels or Path(folder) / "labels.jsonl",
            window=float(pair.processor.feature_extractor.chunk_length),
            progress=lambda what, done, total: say(f"{what} {done}/{total}")
            if done == total else None,
        )  # fmt: skip
    for line in made.left_out():
        say(line)
    dataset = SpeechDataset(
        made.examples, encoder, pair.processor.feature_extractor, pair.teacher_extractor,
        augment=augment, seed=recipe.train.seed if augment.seed is None else augment.seed,
    )  # fmt: skip
    return dataset, Collator(pad=encoder.end)
