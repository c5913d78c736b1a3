"""Matchings: the static rules, monotonicity, dynamic programming against brute force, ties."""

import itertools

import pytest
import torch

from dqw.distill.matching import (
    dynamic,
    match,
    needs_costs,
    optimal,
    restrained,
    static_odd,
    static_uniform,
)
from dqw.errors import UserError

SHAPES = [(1, 1), (1, 6), (2, 2), (3, 5), (4, 4), (4, 3), (5, 2), (6, 1)]


def random_costs(shape, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(shape, generator=generator)
    return (cost * 4).floor() if ties else cost


def is_monotone(matching):
    return all(a <= b for a, b in itertools.pairwise(matching))


def total(cost, matching):
    return sum(cost[i, j].item() for i, j in enumerate(matching))


def monotone_maps(student_layers, teacher_layers):
    return itertools.combinations_with_replacement(range(teacher_layers), student_layers)


def test_static_rules_are_the_published_ones():
    assert static_odd(6, 12) == (1, 3, 5, 7, 9, 11)
    assert static_odd(4, 12) == (1, 3, 5, 7)
    assert static_odd(6, 6) == (1, 3, 5, 5, 5, 5)
    assert static_uniform(6, 12) == (1, 3, 5, 7, 9, 11)
    assert static_uniform(4, 12) == (2, 5, 8, 11)
    assert static_uniform(6, 6) == (0, 1, 2, 3, 4, 5)
    assert static_uniform(4, 2) == (0, 0, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ties", [False, True])
def test_restrained_matchings_are_monotone(shape, ties):
    for seed in range(50):
        cost = random_costs(shape, seed, ties)
        for strategy in ("restrained", "optimal", "static_odd", "static_uniform"):
            matching = match(strategy, cost)
            assert len(matching) == shape[0]
            assert all(0 <= j < shape[1] for j in matching)
            assert is_monotone(matching), (strategy, matching)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ties", [False, True])
def test_dynamic_programming_equals_brute_force(shape, ties):
    for seed in range(50):
        cost = random_costs(shape, seed, ties)
        best = min(total(cost, candidate) for candidate in monotone_maps(*shape))
        matching = optimal(cost)
        assert total(cost, matching) == pytest.approx(best, abs=1e-12)
        # The tie rule: among the best maps, lowest last index first, then the one before it.
        tied = [m for m in monotone_maps(*shape) if total(cost, m) <= best + 1e-12]
        assert matching == min(tied, key=lambda m: m[::-1])


def test_optimal_is_never_worse_than_greedy_and_sometimes_better():
    better = 0
    for seed in range(100):
        cost = random_costs((5, 6), seed)
        assert total(cost, optimal(cost)) <= total(cost, restrained(cost)) + 1e-12
        assert total(cost, dynamic(cost)) <= total(cost, optimal(cost)) + 1e-12
        better += total(cost, optimal(cost)) < total(cost, restrained(cost)) - 1e-6
    assert better > 20


def test_restrained_is_greedy_from_the_left():
    # The first layer's choice of 2 binds the second, although (0, 0) would be cheaper in all.
    cost = torch.tensor([[1.0, 2.0, 0.9], [0.0, 5.0, 9.0]])
    assert restrained(cost) == (2, 2)
    assert optimal(cost) == (0, 0)
    assert dynamic(cost) == (2, 0)


def test_ties_go_to_the_lowest_teacher_layer():
    flat = torch.ones(3, 4)
    assert dynamic(flat) == restrained(flat) == optimal(flat) == (0, 0, 0)


def test_equal_depth_with_equal_layers_is_the_identity():
    cost = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs().float()
    for strategy in ("dynamic", "restrained", "optimal", "static_uniform"):
        assert match(strategy, cost) == (0, 1, 2, 3, 4)


def test_none_and_mistakes():
    assert match("none", torch.ones(2, 3)) == ()
    assert needs_costs("optimal") and not needs_costs("static_odd")
    with pytest.raises(UserError, match="choose one of static_odd"):
        match("best", torch.ones(2, 3))
    with pytest.raises(UserError, match="no numbers any more"):
        match("optimal", torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="shape"):
        match("dynamic", torch.ones(3))
