"""Calibrated rounding of a student before its first step."""

from __future__ import annotations

import itertools
from typing import Any

from dqw.calibrate import calibrate, layer_count
from dqw.devices import lowered
from dqw.distill.config import DistillConfig, GuidanceConfig
from dqw.distill.data import Collator, SpeechDataset
from dqw.distill.pair import is_copy
from dqw.distill.progress import Display
from dqw.speech import balanced


def starts_off_grid(student: Any, teacher: Any, guidance: GuidanceConfig) -> bool:
    """Whether weights begin between the float ones and what rounding found: where they have far to
    go, and where guidance chooses by the rounding errors, which weights on the grid do not have."""
    return guidance.mode != "all" or not is_copy(student, teacher)


def round_student(
    student: Any,
    dataset: SpeechDataset,
    collate: Collator,
    config: DistillConfig,
    shown: Display,
    off_grid: bool,
) -> None:
    """Round with error compensation on some windows; a resumed run has that behind it."""
    size = 4
    # Each window once, if they are few.
    keys = balanced(dataset.examples, config.calibration_clips)
    names = ("input_features", "decoder_input_ids", "decoder_mask")
    batches = []  # made before autocast begins: the mel filters must not run in bf16
    for start in range(0, len(keys), size):
        made = collate([dataset[key] for key in keys[start : start + size]])
        batches.append({name: made[name].to(student.device) for name in names})

    layers, done = layer_count(student), itertools.count(1)
    student.eval()
    with lowered(student):
        calibrate(
            student,
            batches,
            lambda name: shown.count("error compensation, layers rounded", next(done), layers),
            off_grid=off_grid,
        )
