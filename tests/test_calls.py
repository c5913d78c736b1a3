"""What is taken of the inputs of a layer: everything that was heard, little of what pads it."""

from __future__ import annotations

import pytest
import torch

from dqw.calls import PADDING, REACH, ROWS, Call, padding_of


def features(*heard: int) -> torch.Tensor:
    """(batch, 4 mels, 200 frames): so many frames of sound, and silence behind."""
    found = torch.full((len(heard), 4, 200), -1.5)
    for row, frames in zip(found, heard):
        row[:, :frames] = torch.randn(4, frames)
    return found


def call(real: torch.Tensor | None = None, padding: torch.Tensor | None = None) -> Call:
    return Call(torch.zeros(1), (), {}, real, padding)


@pytest.mark.parametrize("heard", [0, 1, 7, 100, 183, 184, 200])
def test_padding_begins_behind_the_last_frame_heard(heard: int) -> None:
    padding = padding_of(features(heard))[0]
    begin = min(-(-heard // 2) + REACH, 100)
    assert padding.tolist() == [False] * begin + [True] * (100 - begin)


def test_silence_inside_a_clip_is_heard() -> None:
    x = features(100)
    x[0, :, 40:60] = -1.5
    assert torch.equal(padding_of(x), padding_of(features(100)))


def test_of_padding_one_row_in_four_is_taken() -> None:
    padding = padding_of(features(40, 200))
    x = torch.arange(200.0).view(2, 100, 1)
    rows = call(padding=padding).rows(x, 1).flatten()
    begin = 20 + REACH
    kept = [*range(begin), *range(100, 200), *range(begin, 100, PADDING)]
    assert rows.tolist() == kept


def test_other_inputs_are_taken_whole() -> None:
    x = torch.randn(2, 30, 5)
    assert torch.equal(call(padding=padding_of(features(40, 200))).rows(x, 5), x.view(60, 5))


def test_the_decoders_own_padding_is_left_out() -> None:
    x, real = torch.randn(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(call(real=real).rows(x, 5), x[real])


def test_many_rows_are_spaced_alike_with_padding_and_without() -> None:
    length = ROWS // 2 + 1  # two of them are more than ROWS
    x = torch.arange(2.0 * length).view(2, length, 1)
    none, half = torch.zeros(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    half[1] = True
    assert torch.equal(call(padding=none).rows(x, 1), x.flatten()[::2, None])
    assert len(call(padding=half).rows(x, 1)) == -(-(length + -(-length // PADDING)) // 2)
