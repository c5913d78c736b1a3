"""Which values a code may take: APoT, PoT, uniform, Lloyd, stretched and learned grids, as exact
integers.

A b-bit code is a sign and b-1 bits of magnitude, so a grid is its sorted list of unsigned
magnitudes; multiplied by one scale they are the weights a layer may hold. Magnitudes are integers
(a grid's values times their common denominator), which keeps products with int8 activations exact.

The nearest level of x has one rule everywhere, in this file's ``bucket`` table: with
y = |x| / scale, level = bucket[floor(2 y)]. Levels are integers, so the midpoints between them are
half-integers, and a tie goes to the larger magnitude.

A grid is a name, or its magnitudes spelled out, "3,10,18,31": what a learned grid, a codebook of
each layer's own (``dqw.codebook``), is in the plan of a packed folder.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from dqw.errors import UserError

GRIDS = ("apot", "pot", "uniform", "lloyd", "stretched")
LEARNED = "learned"  # each layer's own levels, which begin as Lloyd's
CODEBOOK_TOP = 127  # the largest level of a learned grid: an int8
_NO_ZERO = ("lloyd", "stretched", LEARNED)  # all 2^bits codes count

# Lloyd-Max levels (Lloyd 1982, "Least squares quantization in PCM") of Whisper's weights in groups,
# each with its best scale. No level is 0, so all 2^bits codes count, where a grid with a zero has
# two of it. Integers of at most 31 up to 4 bits, where the int8 kernels are fastest: finer ones,
# such as 5, 15, 25, 36, 49, 65, 84, 109, would take 2 to 3 % off the error at 4 bits, and the
# layers' own searches end at nearly the same levels, so there is one table for all
# (``bench.grids --search 4 --top 110 --layers GLOB``). Relative squared error over whisper-base's
# layers in %, groups of 16 / 64 (``bench.grids``):
#   bits   lloyd          apot           uniform
#   2      10.62 / 13.61   17.40 / 20.44   17.40 / 20.44
#   3       2.31 /  3.62    3.03 /  4.55    3.52 /  5.22
#   4      0.534 / 0.870   0.634 / 1.023   0.737 / 1.300
#   5      0.126 / 0.211   0.321 / 0.440   0.169 / 0.314
_LLOYD = {
    2: (1, 4),
    3: (3, 10, 18, 31),
    4: (1, 3, 5, 7, 10, 13, 17, 22),
    5: (1, 3, 5, 7, 9, 11, 14, 17, 20, 23, 26, 30, 35, 40, 47, 51),
}

# PoT keeps levels down to 2**-14 of the clip. The published grid goes on to 2**-126 at 8 bits,
# levels no weight can tell from zero; cut here, every level of every grid fits int16.
_POT_SMALLEST_EXPONENT = -14


def widths(grid: str) -> range:
    """The bits that a known grid has."""
    told = _spelled_out(grid)
    if told:
        bits = len(told).bit_length()
        return range(bits, bits + 1)
    return range(2, 6) if grid in _NO_ZERO else range(2, 9)


def at_bits(grid: str, bits: int) -> str:
    """``grid``, or uniform where it has no such width."""
    known = grid in (*GRIDS, LEARNED) or is_spelled_out(grid)
    return grid if not known or bits in widths(grid) else "uniform"


def check_grid(grid: str, bits: int) -> None:
    """Raise UserError unless ``grid`` is a known grid, or levels spelled out, and has ``bits``."""
    names = (*GRIDS, LEARNED)
    if not (grid in names or is_spelled_out(grid)):
        raise UserError(
            f"grid {grid!r} is not known: choose one of {', '.join(names)}, or give 2, 4, 8 … 128 "
            f"rising magnitudes of at most {CODEBOOK_TOP}, as in '1,3'."
        )
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise UserError(f"bits is {bits!r}, but a weight code has 2 to 8 bits: choose 2 to 8.")
    if bits not in widths(grid):
        has = widths(grid)
        some = f"{has[0]} to {has[-1]}" if len(has) > 1 else str(has[0])
        raise UserError(
            f"the {grid} grid has {some} bits, not {bits}: choose "
            + ("uniform from 6 on." if grid in names else "one of the widths it has.")
        )


def is_spelled_out(grid: object) -> bool:
    """Whether ``grid`` lists magnitudes."""
    return isinstance(grid, str) and bool(_spelled_out(grid))


def _spelled_out(grid: str) -> tuple[int, ...]:
    """The magnitudes that ``grid`` lists; none where it lists no grid."""
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})+", grid):
        return ()
    values = tuple(map(int, grid.split(",")))
    rises = all(low < high for low, high in pairwise(values))
    whole = len(values) & (len(values) - 1) == 0  # a power of two
    return values if rises and whole and values[-1] <= CODEBOOK_TOP else ()


def spelled_out(values: Sequence[int]) -> str:
    """The grid of these magnitudes."""
    return ",".join(map(str, values))


@lru_cache(maxsize=None, typed=True)
def magnitudes(grid: str, bits: int) -> tuple[int, ...]:
    """Sorted unsigned integer levels of a signed ``bits``-bit grid.

    ``apot``: sums of one power of two from each term (Li et al., ICLR 2020, arXiv 1909.13144,
    k = 2, as in the authors' release for 3 to 7 bits; 8 bits by the same rule). 2 bits have one
    bit of magnitude, where APoT, PoT and uniform are the same ternary grid, as in that release.
    ``pot``: zero and powers of two down to 2**-14 of the largest. ``uniform``: 0 to 2**(bits-1)-1.
    These start with 0; of the others nothing is rounded to 0, unless levels spelled out say so.
    ``lloyd``: least squared error for weights in groups (``_LLOYD``). ``stretched``: the odd
    integers, evenly spaced around 0 (StretchedElasticQuant of ParetoQ, arXiv 2502.02631, which
    uses it at 2 bits). ``learned``: what it begins with, Lloyd's as large as an int8 can be.
    Raises UserError for an unknown grid or a width that it does not have.
    """
    check_grid(grid, bits)
    if grid == "lloyd":
        return _LLOYD[bits]
    if grid == "stretched":
        return tuple(range(1, 2**bits, 2))
    if grid == LEARNED:
        return tuple(round(CODEBOOK_TOP * value / _LLOYD[bits][-1]) for value in _LLOYD[bits])
    if told := _spelled_out(grid):
        return told
    magnitude_bits = bits - 1
    if grid == "uniform" or magnitude_bits == 1:
        return tuple(range(2**magnitude_bits))
    if grid == "pot":
        smallest = max(-(2**magnitude_bits - 2), _POT_SMALLEST_EXPONENT)
        return (0, *(2 ** (e - smallest) for e in range(smallest, 1)))
    return _apot_magnitudes(magnitude_bits)


def _apot_magnitudes(magnitude_bits: int) -> tuple[int, ...]:
    """Levels of unsigned APoT with k = 2, as integers without a common factor of two.

    n = magnitude_bits // 2 terms of two bits: {0, 2^-i, 2^-(i+n), 2^-(i+2n)}, i < n. An odd width
    moves the last power to 2^-(i+2n+1) and adds a one-bit term {0, 2^-2n}.
    """
    n, odd = divmod(magnitude_bits, 2)
    unit = 3 * n + odd  # every power is a multiple of 2^-unit
    terms = [(0, *(2 ** (unit - e) for e in (i, i + n, i + 2 * n + odd))) for i in range(n)]
    if odd:
        terms.append((0, 2 ** (unit - 2 * n)))
    sums = sorted({sum(choice) for choice in product(*terms)})
    common = min(s & -s for s in sums if s)  # the largest power of two that divides them all
    return tuple(s // common for s in sums)


def level_max(grid: str, bits: int) -> int:
    """The largest level: weight = scale × level, and clip = scale × level_max."""
    return magnitudes(grid, bits)[-1]


@lru_cache(maxsize=None, typed=True)
def levels(grid: str, bits: int) -> Tensor:
    """The signed level of every code, int16 of shape (2**bits,).

    code = sign << (bits-1) | index into ``magnitudes``. Codes that stand for nothing (-0, and the
    tail that PoT does not use) are level 0.
    """
    half = torch.zeros(2 ** (bits - 1), dtype=torch.int16)
    values = magnitudes(grid, bits)
    half[: len(values)] = torch.tensor(values, dtype=torch.int16)
    return torch.cat([half, -half])


@lru_cache(maxsize=None, typed=True)
def bucket(grid: str, bits: int) -> Tensor:
    """The rounding table: level = bucket[floor(2 |x| / scale)], int16 of (2 × level_max + 1,)."""
    return rounding_table(magnitudes(grid, bits))


def rounding_table(values: Sequence[int] | Tensor) -> Tensor:
    """``bucket`` for any sorted magnitudes; of a tensor, on its device, the last of which is
    ``CODEBOOK_TOP``: nothing waits for it."""
    levels = torch.as_tensor(values)
    top = CODEBOOK_TOP if isinstance(values, Tensor) else values[-1]
    twice_midpoints = levels[1:] + levels[:-1]
    doubled = torch.arange(2 * top + 1, device=levels.device)
    index = torch.searchsorted(twice_midpoints, doubled, right=True)  # a tie goes up
    return levels[index].to(torch.int16)


def codes(level: Tensor, grid: str, bits: int) -> Tensor:
    """The code, uint8, of each of ``level`` (int16, any shape), all levels of the grid."""
    return code_of_level(grid, bits).to(level.device)[level.long() + level_max(grid, bits)]


@lru_cache(maxsize=None, typed=True)
def code_of_level(grid: str, bits: int) -> Tensor:
    """The code of every level, uint8 of (2 × level_max + 1,), indexed by level + level_max.

    0 where there is no such level."""
    values = magnitudes(grid, bits)
    top = values[-1]
    table = torch.zeros(2 * top + 1, dtype=torch.uint8)
    for index, value in enumerate(values):
        table[top - value] = index | 1 << (bits - 1)
        table[top + value] = index  # after the negative one, so that level 0 has code 0
    return table
