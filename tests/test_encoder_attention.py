"""Attention alone, as an operator: every tier against float64."""

import math

import pytest
import torch
from kernel_helpers import BF16_SETS as HALF
from kernel_helpers import INSTRUCTION_SETS, instruction_set, needs_library
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import attention

pytestmark = needs_library
EXACT = tuple(tier for tier in INSTRUCTION_SETS if tier not in HALF)


def inputs(positions: int, heads: int, head_dim: int, spread: float = 1.0) -> list[Tensor]:
    """q (not scaled yet), k and v (positions, heads * head_dim); scores are about ``spread``."""
    torch.manual_seed(positions + head_dim)
    size = math.sqrt(spread)
    factors = (size, size, 1.0)
    return [torch.randn(positions, heads * head_dim) * factor for factor in factors]


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    split = [t.to(dtype).unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v)]
    return scaled_dot_product_attention(*split).transpose(0, 1).flatten(1).double()


def native(tier: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    split = [t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v)]
    split[0] = split[0] / math.sqrt(q.shape[1] / heads)
    with instruction_set(tier):
        return torch.ops.dqw_cpu.attention(*split, True).double().transpose(0, 1).flatten(1)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


SHAPES = [
    (1, 4, 16), (2, 24, 32), (16, 2, 48), (17, 1, 64), (31, 2, 80), (32, 1, 64), (33, 2, 64),
    (50, 2, 64), (127, 1, 96), (128, 1, 64), (129, 2, 64), (161, 1, 256), (250, 1, 240),
    (500, 2, 64), (1500, 1, 64),
]  # fmt: skip


@pytest.mark.parametrize("tier", EXACT)
@pytest.mark.parametrize(("positions", "heads", "head_dim"), SHAPES)
def test_float_tiers_are_exact(tier: str, positions: int, heads: int, head_dim: int) -> None:
    q, k, v = inputs(positions, heads, head_dim)
    wanted = plain(q, k, v, heads, torch.float64)
    apart = (native(tier, q, k, v, heads) - wanted).abs().max()
    assert apart < 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("tier", HALF)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("positions", "heads", "head_dim"), SHAPES)
def test_errors_are_those_of_bfloat16(
    tier: str, positions: int, heads: int, head_dim: int, spread: float
) -> None:
    """As large as those of torch's attention on the same inputs in bfloat16, up to twice."""
    q, k, v = inputs(positions, heads, head_dim, spread)
    wanted = plain(q, k, v, heads, torch.float64)
    error = native(tier, q, k, v, heads) - wanted
    usual = plain(q, k, v, heads, torch.bfloat16) - wanted
    assert 0 < rms(error) < 2 * rms(usual)
    assert error.abs().max() < 3 * usual.abs().max()


@pytest.mark.parametrize("tier", HALF)
def test_tiers_of_bfloat16_agree(tier: str) -> None:
    """They round the same numbers; sums alone differ by their order."""
    q, k, v = inputs(333, 2, 64)
    found = native(tier, q, k, v, 2)
    assert (found - native(HALF[0], q, k, v, 2)).abs().max() < 2e-3 * found.abs().max()


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
def test_equal_scores_give_the_mean(tier: str) -> None:
    _, k, v = inputs(300, 2, 64)
    found = native(tier, torch.zeros_like(k), k, v, 2)
    mean = (v.bfloat16() if tier in HALF else v).double().mean(0).expand_as(found)
    assert (found - mean).abs().max() < 1e-6


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
def test_probabilities_are_powers(tier: str) -> None:
    """Of two positions, one y powers of 2 below the other, y a bfloat16: 1 : 2^-y, rounded once."""
    y = torch.linspace(0.01, 12.0, 1000).bfloat16().double()
    q, k, v = (torch.zeros(1000, 16) for _ in range(3))
    q[:, 0] = 4.0 * y * math.log(2.0)  # native() takes a quarter
    k[1, 0], k[2:, 0], v[1, 0] = -1.0, -1e5, 1.0  # the third and all behind count nothing
    second = native(tier, q, k, v, 1)[:, 0]
    error = second / (1 - second) / 2**-y - 1
    assert error.abs().max() < (2**-8 + 2e-4 if tier in HALF else 1e-5)
    assert error.mean().abs() < 3e-4  # rounding goes both ways


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize("at", [0, 40, 140, 299])
def test_one_score_far_above_the_rest(tier: str, at: int) -> None:
    """Its position alone counts, wherever it lies: hundreds above what came before it, too."""
    _, k, v = inputs(300, 1, 64)
    k[at] = 40.0
    q = torch.ones_like(k) * 5.0  # scores of 1600 and of some tens
    found = native(tier, q, k, v, 1)
    wanted = (v.bfloat16() if tier in HALF else v)[at].double().expand_as(found)
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize("step", [0.5, 3.0])
def test_scores_that_rise_all_the_way(tier: str, step: float) -> None:
    """The largest score so far changes in every block: results so far are scaled anew."""
    positions = 700
    _, k, v = inputs(positions, 1, 16)
    k[:] = 0.0
    k[:, 0] = torch.arange(positions) * step
    q = torch.zeros_like(k)
    q[:, 0] = torch.linspace(-4.0, 4.0, positions)  # scores up to 2100, rising or falling
    # Steps of a score must survive bfloat16, or the two compute something else.
    q, k = q.bfloat16().float(), k.bfloat16().float()
    wanted = plain(q, k, v, 1, torch.float64)
    error = native(tier, q, k, v, 1) - wanted
    limit = 2 * rms(plain(q, k, v, 1, torch.bfloat16) - wanted) if tier in HALF else 1e-4
    assert rms(error) < limit


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(tier: str, threads: int) -> None:
    q, k, v = inputs(100, 3, 32)
    wanted, before = native(tier, q, k, v, 3), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native(tier, q, k, v, 3), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
def test_a_nan_stays_in_its_head(tier: str) -> None:
    q, k, v = inputs(70, 2, 32)
    whole = native(tier, q, k, v, 2)
    for t in (q, k, v):
        t[40, 3] = float("nan")
    found = native(tier, q, k, v, 2)
    assert found[:, 3].isnan().all()  # as every tier has it: through the values
    assert torch.equal(found[:, 32:], whole[:, 32:])


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_nan_in_a_query_or_a_key_alone(tier: str, exact: bool) -> None:
    """As torch: a query's makes its own row NaN, a key's makes all."""
    for place, rows in ((0, [9]), (1, list(range(40)))):
        torch.manual_seed(place)
        parts = [torch.randn(1, 1, 40, 32) for _ in range(3)]
        parts[place][0, 0, 9, 3] = float("nan")
        with instruction_set(tier):
            found = torch.ops.dqw_cpu.attention(*parts, not exact)
        bad = found[0, 0].isnan().all(1).nonzero().flatten().tolist()
        assert bad == rows and found[0, 0].isnan().any(1).sum() == len(rows)


@pytest.mark.parametrize("tier", INSTRUCTION_SETS)
@pytest.mark.parametrize(("queries", "positions"), [(1, 40), (7, 1500), (30, 33), (60, 1)])
def test_queries_may_be_others_than_the_positions(tier: str, queries: int, positions: int) -> None:
    """Two clips of two heads, as a decoder attends to the audio."""
    torch.manual_seed(queries)
    q, k, v = (torch.randn(2, 2, n, 32) for n in (queries, positions, positions))
    wanted = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    with instruction_set(tier):
        found = torch.ops.dqw_cpu.attention(q, k, v, True)
        exact = torch.ops.dqw_cpu.attention(q, k, v)
    usual = scaled_dot_product_attention(*(t.bfloat16() for t in (q, k, v)), scale=1.0)
    assert found.shape == q.shape
    limit = 3 * float((usual - wanted).abs().max()) if tier in HALF else 1e-5
    assert (found - wanted).abs().max() < limit
    assert (exact - wanted).abs().max() < 1e-5  # without the flag, every tier is exact


def test_unfit_arguments_are_refused() -> None:
    operator = torch.ops.dqw_cpu.attention
    x = torch.randn(2, 5, 64)
    with pytest.raises(RuntimeError, match="width of q"):
        operator(x, x[:, :4], x)
    with pytest.raises(RuntimeError, match="heads"):
        operator(x, x[:1], x[:1])
    with pytest.raises(RuntimeError, match="one position or more"):
        operator(x, x[:, :0], x[:, :0])
    with pytest.raises(RuntimeError, match="multiples of 16"):
        operator(x[..., :8], x[..., :8], x[..., :8])
    assert operator(x[:, :0], x, x).shape == (2, 0, 64)


def test_the_benchmark_compares_every_tier() -> None:
    before = torch.ops.dqw_cpu.instruction_set()
    found = {name: (ms, error) for name, ms, _, error in attention.compare(40, 64, quick=True)}
    tiers = torch.ops.dqw_cpu.instruction_sets().split()
    assert set(found) == {"torch float32", "torch bfloat16", *(f"dqw {tier}" for tier in tiers)}
    assert all(ms > 0 for ms, _ in found.values())
    assert found["dqw scalar"][1] < 1e-5 < found["torch bfloat16"][1] < 2e-2
    assert torch.ops.dqw_cpu.instruction_set() == before
