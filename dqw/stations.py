"""The stations of a compression before training: each has its bar, and says a line when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dqw.bars import progress_bar
from dqw.devices import lowered
from dqw.kept import Kept
from dqw.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import WhisperForConditionalGeneration

    from dqw.distill.pair import Pair
    from dqw.whisper.data import Item

Say = Callable[[str], object]


def listen(
    items: list[Item], recipe: Recipe, pair: Pair, rounds: bool, heals: bool, say: Say,
    kept: Kept | None,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Windows of speech to measure layers on; those to round them on, and to heal on, if need be.
    (A run of training makes its own.)"""
    from dqw import budget, heal
    from dqw.speech import calibration_batches

    wanted = recipe.distill.calibration_clips if rounds else budget.WINDOWS
    wanted = max(wanted, heal.WINDOWS if heals else 0)
    listening = replace(recipe.distill, calibration_clips=wanted)
    labels = None if kept is None else kept.labels
    return calibration_batches(items, replace(recipe, distill=listening), pair, say, labels)


def basis(pair: Pair, batches: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What rounding and healing follow from: weights, and windows of speech."""
    for model in {id(m): m for m in (pair.teacher, pair.student)}.values():
        yield from model.state_dict().items()
    for batch in batches:
        yield from batch.items()


def heal_student(pair: Pair, batches: list[dict[str, Tensor]], say: Say, kept: Kept | None) -> None:
    """Fit what a cut student lacks into its layers (``dqw.heal``), in place."""
    from dqw.heal import heal

    if kept is not None and kept.has("healed"):
        kept.load("healed", pair.student)
        say(f"healed already: {kept.folder}")
        return
    start = time.monotonic()
    config = pair.student.config
    layers = config.encoder_layers + config.decoder_layers
    with progress_bar("healing", layers, "layers") as advance, lowered(pair.teacher, pair.student):
        heal(pair.student, pair.teacher, batches, advance)
    clips = sum(len(batch["decoder_input_ids"]) for batch in batches)
    if kept is not None:
        kept.save("healed", pair.student)
    say(f"healed {layers} layers on {clips} windows of speech in {time.monotonic() - start:.0f} s")


def quantize_student(student: WhisperForConditionalGeneration, recipe: Recipe, say: Say) -> None:
    """Swap in the learning modules; their clips start at the least squared error."""
    from dqw.convert import quant_modules, quantize

    start = time.monotonic()
    with progress_bar("clips", len(recipe.plan(student))) as advance:
        quantize(student, recipe, progress=advance)
    count = len(quant_modules(student))
    say(
        f"quantized {count} layers at their least squared error in {time.monotonic() - start:.0f} s"
    )


def calibrate_student(
    student: WhisperForConditionalGeneration,
    batches: list[dict[str, Tensor]],
    say: Say,
    kept: Kept | None,
) -> None:
    """Round with error compensation (``dqw.calibrate``), in place."""
    from dqw.calibrate import FIRST, calibrate, layer_count

    start = time.monotonic()
    if kept is not None and kept.has(FIRST):
        say(f"layers rounded before are in {kept.folder}")
    student.eval()
    with progress_bar("rounding", layer_count(student)) as advance, lowered(student):
        calibrate(student, batches, progress=advance, kept=kept)
    clips = sum(len(batch["decoder_input_ids"]) for batch in batches)
    say(f"rounded on {clips} windows of speech in {time.monotonic() - start:.0f} s")
