"""Layers of a cut student: those that leave are those that do least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_whisper

from dqw.errors import UserError
from dqw.prune import choose_layers, passes
from dqw.whisper.student import Kept, cut_student, kept_layers, spaced_evenly


def batches(model: Any) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        {
            "input_features": torch.randn(1, 80, 3000),
            "decoder_input_ids": torch.randint(3, 120, (1, 9)),
            "decoder_mask": torch.ones(1, 9, dtype=torch.bool),
        }
    ]


def idle(layer: Any, share: float = 0.0) -> None:
    """The layer adds ``share`` of what it added."""
    attentions = [
        layer.self_attn,
        *([layer.encoder_attn] if hasattr(layer, "encoder_attn") else []),
    ]
    for matrix in (layer.fc2, *(a.out_proj for a in attentions)):
        matrix.weight.data *= share
        matrix.bias.data *= share


def test_layers_that_do_nothing_leave_first() -> None:
    teacher = make_tiny_whisper(encoder_layers=4, decoder_layers=3)
    idle(teacher.model.encoder.layers[0])
    idle(teacher.model.encoder.layers[2], 1e-4)
    idle(teacher.model.decoder.layers[1])
    before = teacher.model.encoder.layers, teacher.model.decoder.layers
    calls = 0

    def advance() -> None:
        nonlocal calls
        calls += 1

    kept = choose_layers(teacher, batches(teacher), (2, 2), advance)
    assert kept == Kept([1, 3], [0, 2])
    assert choose_layers(teacher, batches(teacher), (3, 3)) == Kept([1, 2, 3], [0, 1, 2])
    assert calls == passes(teacher, (2, 2)) == 4 + 3 + 3
    assert teacher.model.encoder.layers is before[0] and teacher.model.decoder.layers is before[1]


def test_the_teacher_is_whole_again_after_a_failure() -> None:
    teacher = make_tiny_whisper(decoder_layers=3)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_layers(teacher, batches(teacher), (1, 2), stop)
    assert len(teacher.model.encoder.layers) == 2


def test_evenly_spaced_layers_and_a_student_of_them() -> None:
    teacher = make_tiny_whisper(encoder_layers=6, decoder_layers=6)
    assert kept_layers(4, 6) == [0, 2, 3, 5] and kept_layers(2, 6) == [0, 5]
    assert spaced_evenly(teacher, 4, 2) == Kept([0, 2, 3, 5], [0, 5])
    with pytest.raises(UserError, match="asks for 7 encoder layers, and the teacher has 6"):
        spaced_evenly(teacher, 7, 2)
    teacher.generation_config.alignment_heads = [[1, 0], [2, 1], [4, 0]]
    student = cut_student(teacher, Kept([0, 1, 5], [2, 4]))
    same = student.model.decoder.layers[1].fc1.weight, teacher.model.decoder.layers[4].fc1.weight
    assert torch.equal(*same) and same[0] is not same[1]
    assert student.config.encoder_layers == 3 and student.config.decoder_layers == 2
    assert student.generation_config.alignment_heads == [[0, 1], [1, 0]]
    assert student.generate(torch.randn(1, 80, 3000), max_new_tokens=3).shape[0] == 1


def test_a_resumed_run_keeps_the_layers_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dqw import compress, prune
    from dqw.distill.pair import Pair
    from dqw.recipe import Recipe

    teacher = make_tiny_whisper(encoder_layers=3, decoder_layers=3)
    monkeypatch.setattr(prune, "choose_layers", None)  # would be called
    job = compress.Job("t", tmp_path / "out", student_layers=(2, 2), resume=True)
    job.run.mkdir()
    (job.run / "recipe.json").write_text(
        json.dumps({"kept_layers": {"encoder": [1, 2], "decoder": [0, 2]}})
    )
    pair = Pair(teacher, teacher, None, None)
    job, pair = compress.choose_student(job, Recipe(), pair, [], lambda line: None)
    assert job.kept == Kept([1, 2], [0, 2]) and compress.provenance(job, Recipe())["kept_layers"]
    fc1 = teacher.model.encoder.layers[1].fc1
    assert torch.equal(pair.student.model.encoder.layers[0].fc1.weight, fc1.weight)
