"""``python -m bench.grids``: errors that a folder would have, and the search for levels."""

from dataclasses import replace

import pytest
from conftest import make_tiny_whisper

from bench import grids
from dqw.errors import UserError
from dqw.recipe import QuantSpec


def test_grids_are_compared_and_searched() -> None:
    weight = grids.sample(make_tiny_whisper(), rows=8)
    spec = QuantSpec(bits=3, grid="lloyd", group_size=16)
    assert 1.5 < grids.error(weight, spec) < 0.8 * grids.error(weight, replace(spec, grid="apot"))
    with pytest.raises(UserError, match="matches no layer"):
        grids.sample(make_tiny_whisper(), 8, "*.conv1")
    assert grids.search(weight, (1, 2), 5, 16) == [1, 4]  # what dqw.grids has at 2 bits
