"""Which teacher layer a student layer learns from.

A matching is a tuple of L_S teacher indices (0-based), one per student layer. The static rules
need the two depths alone; the others read a cost matrix (L_S, L_T) of pairwise hidden-state
losses. Restrained matchings are monotone, not strictly: a teacher layer may be used again.

`static_odd`, `dynamic` and `restrained` are DQ-Whisper's (arXiv 2305.10788); `restrained` walks
left to right and never looks back, so one early choice of a late layer binds all that follow.
`optimal` minimises the total cost over every monotone map instead.

Ties go to the lowest teacher index, in every strategy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dqw.errors import UserError

Matching = tuple[int, ...]

DIVERGED = (
    "start again in another folder with a lower train.lr, or look at the clips and the teacher."
)


def static_odd(student_layers: int, teacher_layers: int) -> Matching:
    """j = 2i + 1, clipped to the last teacher layer: the published rule."""
    return tuple(min(2 * i + 1, teacher_layers - 1) for i in range(student_layers))


def static_uniform(student_layers: int, teacher_layers: int) -> Matching:
    """j = floor((i + 1) · L_T / L_S) − 1, at least 0: the last layer always learns from the last.

    With 4 student and 12 teacher layers it gives 2, 5, 8, 11, where `static_odd` gives 1, 3, 5, 7
    and leaves the teacher's top four layers unseen.
    """
    return tuple(
        max((i + 1) * teacher_layers // student_layers - 1, 0) for i in range(student_layers)
    )


def dynamic(cost: Tensor) -> Matching:
    """The cheapest teacher layer of each student layer, without restriction."""
    return tuple(_first_argmin(row) for row in _rows(cost))


def restrained(cost: Tensor) -> Matching:
    """Greedy monotone: layer i takes the cheapest teacher layer not below layer i−1's choice."""
    chosen: list[int] = []
    low = 0
    for row in _rows(cost):
        low += _first_argmin(row[low:])
        chosen.append(low)
    return tuple(chosen)


def optimal(cost: Tensor) -> Matching:
    """The monotone map of least total cost, by dynamic programming in O(L_S · L_T).

    best[i][j] = cost[i][j] + min over k ≤ j of best[i−1][k]. Among maps of equal total the one
    is taken whose last index is lowest, then the one before it, and so on.
    """
    rows = _rows(cost)
    width = len(rows[0])
    came_from: list[list[int]] = []
    best = [0.0] * width
    for row in rows:
        arg = 0
        steps: list[int] = []
        for j in range(width):
            if best[j] < best[arg]:
                arg = j
            steps.append(arg)
        best = [row[j] + best[steps[j]] for j in range(width)]
        came_from.append(steps)
    j = _first_argmin(best)
    chosen = [j]
    for i in range(len(rows) - 1, 0, -1):
        j = came_from[i][j]
        chosen.append(j)
    return tuple(reversed(chosen))


STATIC: dict[str, Callable[[int, int], Matching]] = {
    "static_odd": static_odd,
    "static_uniform": static_uniform,
}
FROM_COSTS: dict[str, Callable[[Tensor], Matching]] = {
    "dynamic": dynamic,
    "restrained": restrained,
    "optimal": optimal,
}


def needs_costs(strategy: str) -> bool:
    """Whether `strategy` reads a cost matrix."""
    return strategy in FROM_COSTS


def match(strategy: str, cost: Tensor) -> Matching:
    """The matching of `strategy` for a cost matrix (L_S, L_T); static rules read its shape alone.

    `none` gives an empty tuple. Raises UserError for an unknown strategy or a cost matrix that
    holds a NaN, ValueError for one that is not two-dimensional or is empty.
    """
    if strategy == "none":
        return ()
    if strategy in STATIC:
        return STATIC[strategy](*cost.shape)
    if strategy in FROM_COSTS:
        return FROM_COSTS[strategy](cost)
    known = ", ".join([*STATIC, *FROM_COSTS, "none"])
    raise UserError(f"matching = {strategy!r} is not known: choose one of {known}.")


def _rows(cost: Tensor) -> list[list[float]]:
    if cost.dim() != 2 or cost.numel() == 0:
        raise ValueError(f"a cost matrix has shape (L_S, L_T), not {tuple(cost.shape)}")
    if bool(torch.isnan(cost).any()):
        raise UserError(f"hidden states are no numbers any more: {DIVERGED}")
    rows: list[list[float]] = cost.detach().to("cpu", torch.float64).tolist()
    return rows


def _first_argmin(row: list[float]) -> int:
    return min(range(len(row)), key=row.__getitem__)
