"""Healing: what a cut student lacks goes into its last matrices, and into nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_tiny_whisper
from kernel_helpers import BF16_SETS, instruction_set, needs_library
from torch import nn

import dqw.heal as healing
from dqw.calls import Call
from dqw.distill.pair import Pair
from dqw.heal import heal
from dqw.probe import Probe
from dqw.stations import heal_student
from dqw.whisper.student import cut_student


def speech(count: int = 4, length: int = 24) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        {
            "input_features": torch.randn(1, 80, 100),
            "decoder_input_ids": torch.randint(3, 120, (1, length)),
            "decoder_mask": torch.ones(1, length, dtype=torch.bool),
        }
        for _ in range(count)
    ]


def tiny(encoder: int, decoder: int) -> Any:
    return make_tiny_whisper(
        encoder_layers=encoder, decoder_layers=decoder, max_source_positions=50
    )


def constant(layer: Any) -> None:
    """The layer adds the same to every state."""
    for name, matrix in layer.named_modules():
        if name == "fc2" or name.endswith("out_proj"):
            matrix.weight.data.zero_()
            matrix.bias.data.normal_(0, 2)


def test_what_one_matrix_can_give_is_given_exactly() -> None:
    teacher, batches = tiny(3, 3), speech()
    for stack in (teacher.model.encoder, teacher.model.decoder):
        constant(stack.layers[1])
    student = cut_student(teacher, 2, 2)
    probe = Probe(teacher, batches)
    before = sum(kl for kl, _ in probe.by_batch(student))
    heal(student, teacher, batches)
    after = sum(kl for kl, _ in probe.by_batch(student))
    assert after < 1e-3 * before


def test_a_student_comes_nearer_to_its_teacher() -> None:
    teacher, batches = tiny(4, 4), speech(12)
    student = cut_student(teacher, 3, 3)
    kept = copy.deepcopy(student)
    probe = Probe(teacher, batches)
    before = sum(kl for kl, _ in probe.by_batch(student))
    layers = 0

    def advance() -> None:
        nonlocal layers
        layers += 1

    heal(student, teacher, batches, advance)
    assert layers == 6
    after = sum(kl for kl, _ in probe.by_batch(student))
    assert after < 0.5 * before
    changed = {
        name
        for name, value in student.state_dict().items()
        if not torch.equal(value, kept.state_dict()[name])
    }
    assert {name.split(".")[-2] for name in changed} == {"fc2", "out_proj"}
    assert "model.encoder.layers.0.fc2.weight" in changed


@torch.no_grad()
def test_rows_count_by_one_over_their_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of states a thousand times as large as the others', and not to be had from what the
    matrix multiplies, does not keep the others from theirs."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(torch.cat([x.sin(), x.cos()], -1))

    monkeypatch.setattr(healing, "RIDGE", 0.01)
    torch.manual_seed(2)
    layer, teacher = Layer(), Layer()
    x = torch.randn(1, 400, 8)
    aim = teacher(x)
    aim[0, ::20] = 1000 * torch.randn(20, 8)
    call = Call(x, (), {})
    others = torch.arange(400) % 20 != 0
    before = (layer(x) - aim)[0, others].square().mean()
    healing._fit(layer, layer.fc2, [call], [Call(aim.detach(), (), {})])
    assert (layer(x) - aim)[0, others].square().mean() < 0.05 * before


def test_a_whole_copy_stays_as_it_is() -> None:
    teacher = tiny(2, 2)
    student = cut_student(teacher, 2, 2)
    heal(student, teacher, speech(1))
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name


@needs_library
@pytest.mark.parametrize("tier", BF16_SETS)
def test_a_whole_copy_stays_so_in_bfloat16(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are heard by the same kernels: what these differ by is nothing to heal."""
    monkeypatch.setattr("dqw.devices.fast_precision", lambda *_: "bf16")
    teacher = tiny(2, 2)
    student = cut_student(teacher, 2, 2)
    with instruction_set(tier):
        heal_student(Pair(teacher, student, None, None), speech(1), print, None)
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name


def test_padding_counts_for_nothing() -> None:
    teacher, batches = tiny(3, 3), speech(3)
    found = []
    for filler in (5, 77):
        for batch in batches:
            batch["decoder_mask"][:, -6:] = False
            batch["decoder_input_ids"][:, -6:] = filler
        student = cut_student(teacher, 3, 2)
        heal(student, teacher, batches)
        found.append(student.model.decoder.layers[0].fc2.weight)
    assert torch.equal(*found)
    assert not torch.equal(found[0], teacher.model.decoder.layers[0].fc2.weight)


def test_few_rows_do_no_harm() -> None:
    """Fewer rows than unknowns: the ridge keeps what was not seen."""
    teacher, batches = tiny(2, 3), speech(1, length=3)
    student = cut_student(teacher, 2, 2)
    heal(student, teacher, batches)
    assert all(p.isfinite().all() for p in student.parameters())
    probe = Probe(teacher, speech(6))
    other = cut_student(teacher, 2, 2)
    healed, plain = (sum(k for k, _ in probe.by_batch(m)) for m in (student, other))
    assert healed < 1.2 * plain
