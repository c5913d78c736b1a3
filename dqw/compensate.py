"""Error-compensating rounding of one layer: its rounding errors made up for by its columns to come.

With a layer's inputs X on some speech, weights are rounded so that X Wᵀ moves least, in five steps,
of which all but the first lower one number, tr(D H Dᵀ) of the rounding error D and the inputs'
moment H:

0. Where the layers before are rounded already, X is no longer what the float model has, Y. Then
   W is first replaced by the matrix that gives Y Wᵀ best from X (arXiv 2504.02692 calls the
   calibration asymmetric): the layer makes up for those before it, too.
1. GPTQ (arXiv 2210.17323): columns are rounded one after the other, and what a rounding did to
   X Wᵀ is spread over the columns not yet rounded, by the inverse of H. Each group's scale is
   searched when its turn comes, on the weights as they have become.
2. Scales by least squares, all groups of a row at once, for the levels found.
3. Every level once more, with all the others known (coordinate descent); 2 and 3 are repeated.
4. The mean of what is left goes into the bias. So H is that of the centred inputs wherever a bias
   can take the mean; also for keys, whose mean the softmax over keys does not see.

It fits every grid. ``dqw.calibrate`` walks through a model with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dqw import ops
from dqw.codebook import CodebookQuantize
from dqw.embedding import QuantEmbedding
from dqw.fake_quant import FakeQuantize, search_near
from dqw.linear import QuantModule

DAMPING = 0.01  # of H's mean diagonal, as in the paper
# The same, of step 0, whose matrix is fitted to few windows and should stay near the identity. base
# at 33 MiB, 80 windows, KL on 40 held-out clips: 0.0333 at 0.01, 0.0266 at 0.1, 0.0205 at 1, and
# 0.0246 without step 0.
CARRY_DAMPING = 1.0
# An embedding's rows are inputs as well, where every column counts alike: base's KL on 2,429
# held-out tokens is 0.0112 at 0.01, 0.0107 at 0.05, 0.0099 at 0.1, 0.0098 at 0.3 (groups of 32).
EMBEDDING_DAMPING = 0.15
SCRATCH = 2**18  # floats that step 2 works on at once, 1 MiB: they stay in a core's L2
BLOCK = 64  # columns whose errors are collected before the rest is updated
FINE = 6  # bits from which a copy of the teacher starts off the grid, too
FINE_STEP = 0.12  # up to which it does: 6 bits a row give base's weights steps of 3.7 / 31
ROUNDS = 3  # of steps 2 and 3; the first takes 25 % off the error, the second 4 %, the third 2 %


@dataclass
class Moment:
    """What a layer's inputs x are like, and those y of the float model, row by row: Σ w x xᵀ and
    Σ w y xᵀ (cols, cols), Σ w x and Σ w y (cols,), and Σ w, float32. Without y, y is x."""

    second: Tensor
    first: Tensor
    count: float = 0.0
    cross: Tensor | None = None
    first_float: Tensor | None = None

    @classmethod
    def empty(cls, cols: int, device: torch.device | str = "cpu") -> Moment:
        return cls(torch.zeros(cols, cols, device=device), torch.zeros(cols, device=device))

    def add(self, x: Tensor, weight: Tensor | None = None, y: Tensor | None = None) -> None:
        """Rows x (n, cols) of equal weight, or ``weight`` (n,); y of the same shape."""
        root = None if weight is None else weight.float().sqrt()[:, None]
        # Sums of thousands: in float32, though of bfloat16 products under autocast. Rounded first,
        # so that all are moments of the same inputs: centred() needs that.
        lower = torch.is_autocast_enabled(x.device.type)
        x = _weighed(x, root, lower)
        with torch.autocast(x.device.type, enabled=False):
            add_moments(self.second, self.first, x, root)
            if y is not None:
                self._take_float(_weighed(y, root, lower), root, x)
        self.count += len(x) if weight is None else float(weight.sum())

    def _take_float(self, y: Tensor, root: Tensor | None, x: Tensor) -> None:
        if self.cross is None or self.first_float is None:
            self.cross, self.first_float = (
                torch.zeros_like(self.second),
                torch.zeros_like(self.first),
            )
        add_moments(self.cross, self.first_float, x, root, y)

    def centred(self) -> Moment:
        """The same of x and y less their means."""
        n = max(self.count, 1e-12)
        second = self.second - torch.outer(self.first, self.first) / n
        if self.cross is None or self.first_float is None:
            return Moment(second, self.first, self.count)
        cross = self.cross - torch.outer(self.first_float, self.first) / n
        return Moment(second, self.first, self.count, cross, self.first_float)

    def mean(self) -> Tensor:
        return self.first / max(self.count, 1e-12)

    def mean_float(self) -> Tensor:
        return (self.first if self.first_float is None else self.first_float) / max(
            self.count, 1e-12
        )


def add_moments(
    second: Tensor, first: Tensor, x: Tensor, root: Tensor | None, y: Tensor | None = None
) -> None:
    """``add_product`` to ``second``, and to ``first`` (cols,) the sums of y's columns, without y of
    x's; root (n, 1): what rows were multiplied by, and are once more for the sums."""
    if root is None:
        add_product(second, x, y, first)
    else:
        add_product(second, x, y)
        first += ((x if y is None else y) * root).sum(0)


def add_product(
    total: Tensor, x: Tensor, y: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """total (cols, cols) float32 += yᵀ x of rows (n, cols); without y, xᵀ x, and ``total`` must be
    symmetric. Products are of the dtype of x and y, float32 or bfloat16; sums are float32. columns
    (cols,) float32 += the sums of y's columns, without y of x's."""
    lower, device = x.dtype == torch.bfloat16, x.device.type
    # 2048 columns, 3000 rows, two cores of a Zen 4: 36 and with y 63 ms, in torch 137.
    native = getattr(torch.ops.dqw_cpu, "add_moment", None)
    if lower and device == "cpu" and native is not None and native(total, x, y, columns):
        return
    if columns is not None:
        columns += (x if y is None else y).sum(0, dtype=torch.float32)
    # 2048 columns, AMX: 40 ms in bfloat16, 102 in float32.
    products: Any = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul
    before = products.fp32_precision
    products.fp32_precision = ("tf32" if device == "cuda" else "bf16") if lower else before
    right = x.float()
    left = right if y is None else y.float()
    try:
        total.addmm_(left.T, right)
    finally:
        products.fp32_precision = before


def _weighed(x: Tensor, root: Tensor | None, lower: bool) -> Tensor:
    x = x if root is None else x.float() * root
    return x.bfloat16() if lower else x.float()


@torch.no_grad()
def round_layers(
    layers: Mapping[str, QuantModule],
    moment: Moment,
    off_grid: bool = False,
    say: Callable[[str], object] = lambda name: None,
) -> None:
    """Round the weights of layers that share their inputs with compensation, in place; biases take
    the mean error. ``off_grid``: see ``latent``; ``say`` gets each name before its turn."""
    made = dict[tuple[bool, float], tuple[Moment, Curvature]]()
    for name, module in layers.items():
        say(name)
        quantizer = module.quantizer
        assert quantizer is not None
        before = module.weight.float()
        bias: Tensor | None = getattr(module, "bias", None)  # an embedding has none
        free_mean = bias is not None or name.endswith("k_proj")
        damping = EMBEDDING_DAMPING if isinstance(module, QuantEmbedding) else DAMPING
        # The model may run in bfloat16; what is solved here may not (base: KL 5 instead of 0.03).
        with torch.autocast(before.device.type, enabled=False):
            if (free_mean, damping) not in made:
                seen = moment.centred() if free_mean else moment
                made[free_mean, damping] = seen, Curvature.of(seen.second, damping)
            seen, curvature = made[free_mean, damping]
            aim = before
            if seen.cross is not None:
                aim = carried_over(before, seen.second, seen.cross)
            after = compensated(aim, curvature, quantizer)
            if bias is not None:
                bias += (before @ moment.mean_float() - after @ moment.mean()).to(bias.dtype)
            module.weight.copy_(latent(before, after, quantizer, off_grid))


@torch.no_grad()
def latent(
    weight: Tensor, rounded: Tensor, quantizer: FakeQuantize, off_grid: bool = False
) -> Tensor:
    """What training starts from: on a fine grid, or ``off_grid``, as near to the float ``weight``
    as tenths of the way allow, where it still rounds to ``rounded``, both (rows, cols).

    On the grid each weight has half a step to go before anything changes, and small learning rates
    get few of them there. A student that has far to go loses by it: cut from base to four decoder
    layers, 60 steps, the KL is 0.56 from here and 1.44 from the grid at 4 bits (float 0.52). A copy
    of its teacher is where it should be, and at less than ``FINE`` bits this start undoes what
    calibration found: base at 4 bits, KL of a batch after five steps 0.49, from the grid 0.065.
    """
    found = rounded.clone()
    spec = quantizer.spec
    fine = spec.bits >= FINE if spec.step is None else spec.step <= FINE_STEP
    if not fine and not off_grid:
        return found
    for tenths in range(1, 11):
        tried = torch.lerp(rounded, weight, tenths / 10)
        found = torch.where(quantizer(tried) == rounded, tried, found)
    return found


def carried_over(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The matrix (rows, cols), float32, that does to x most nearly what ``weight`` does to y.
    moment: XᵀX; cross: YᵀX. Damped towards ``weight``, so that directions which were hardly seen
    stay as they are."""
    h = moment.double()
    h.diagonal().add_(CARRY_DAMPING * h.diagonal().mean() + 1e-12)
    lacking = (weight @ (cross - moment)).double()
    return weight + torch.cholesky_solve(lacking.T, factor(h)).T.float()


def factor(h: Tensor) -> Tensor:
    """The lower Cholesky factor of a damped moment ``h``, (n, n) float64. Where inputs hardly vary,
    float32 sums can leave it a little indefinite: then of ``h`` with more damping."""
    found, failed = torch.linalg.cholesky_ex(h)
    more = 1e-6 * h.diagonal().mean()
    while bool(failed) and more < h.diagonal().mean():
        h = h + more * torch.eye(len(h), dtype=h.dtype, device=h.device)
        found, failed = torch.linalg.cholesky_ex(h)
        more = more * 10
    return torch.linalg.cholesky(h) if failed else found  # it says what is wrong


class Curvature(NamedTuple):
    """H of a layer's inputs with its damping, and ``upper``, triangular, for which upperᵀ upper is
    H⁻¹; both (cols, cols) float32."""

    h: Tensor
    upper: Tensor

    @classmethod
    def of(cls, moment: Tensor, damping: float = DAMPING) -> Curvature:
        """moment: XᵀX, (cols, cols). damping: share of its mean diagonal added to it. Dead inputs
        get a unit diagonal."""
        h = moment.double()
        diagonal = h.diagonal()
        dead = diagonal <= 0
        diagonal += dead + damping * diagonal.mean()
        # H = V Vᵀ with an upper V, the Cholesky factor from the other end, gives H⁻¹ = V⁻ᵀ V⁻¹.
        v = factor(h.flip(0, 1)).flip(0, 1).float()
        eye = torch.eye(len(h), device=h.device)
        return cls(h.float(), torch.linalg.solve_triangular(v, eye, upper=True))


@torch.no_grad()
def compensated(weight: Tensor, curvature: Curvature, quantizer: FakeQuantize) -> Tensor:
    """``weight`` (rows, cols) on the quantizer's grid, so that X Wᵀ moves least; sets its clips.

    Columns go from left to right: with per-group scales an order by importance would mix the
    groups. Clips per tensor stay as they are, but learned levels and their clips are found anew.
    """
    h = curvature.h
    size = quantizer.group_size or weight.shape[1]
    # All is transposed from here on, W (cols, rows) and its scales (groups, rows): what belongs to
    # a column of the layer lies at a stretch.
    w = weight.T.contiguous()
    pull = h @ w
    if isinstance(quantizer, CodebookQuantize):
        quantizer.fit(weight, curvature.upper.diagonal().square().reciprocal())
    q, scale = _gptq(w, curvature.upper, quantizer, size)
    for _ in range(ROUNDS):
        if not quantizer.spec.per_tensor:
            q, scale = _fit_scales(pull, q, scale, h, quantizer, size)
        q = _descend(pull, q, scale, h, quantizer, size)
    if not quantizer.spec.per_tensor:
        quantizer.set_scale(scale.T.contiguous())
    return quantizer(q.T.contiguous())  # the same levels; the scale may be another by its last bit


def _of_columns(scale: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Scales (groups, rows) of the columns from ``start`` to ``stop``, (columns, rows)."""
    group = torch.arange(start, stop, device=scale.device) // size
    return scale[group.clamp(max=len(scale) - 1)]


def _gptq(
    weight: Tensor, upper: Tensor, quantizer: FakeQuantize, size: int
) -> tuple[Tensor, Tensor]:
    """Step 1: the rounded weight and its scales."""
    w = weight.clone()
    cols, rows = w.shape
    scale = quantizer.scale().expand(rows, -1).T.clone(memory_format=torch.contiguous_format)
    importance = upper.diagonal().square().reciprocal()  # what an error in a column will cost
    searched = not quantizer.spec.per_tensor
    stop = 0
    while stop < cols:
        # A group's scale is searched when all before it has been updated.
        start, group = stop, stop // size
        stop = min(start + BLOCK, (group + 1) * size, cols)
        if searched and start % size == 0:
            part = slice(start, min(start + size, cols))
            near = search_near(w[part].T, scale[group][:, None], quantizer, importance[part])
            scale[group] = near[:, 0]
        here = slice(start, stop)
        w[here], errors = ops.round_columns(
            w[here], None, upper.diagonal()[here], upper[here, here],
            _of_columns(scale, start, stop, size), quantizer.bucket,
        )  # fmt: skip
        w[stop:].addmm_(upper[here, stop:].T, errors, alpha=-1)
    return w, scale


def _fit_scales(
    pull: Tensor, q: Tensor, scale: Tensor, h: Tensor, quantizer: FakeQuantize, size: int
) -> tuple[Tensor, Tensor]:
    """Step 2: scales of least squares for the levels of ``q``, and the weight they give.
    pull: H Wᵀ.

    A scale that would fall below a third of itself, or turn negative, stays.
    """
    (cols, rows), groups = q.shape, len(scale)
    spare = groups * size - cols
    h = nn.functional.pad(h, (0, spare, 0, spare)) if spare else h
    shared = size if size < cols else 0
    level = ops.quantize(q.T.contiguous(), scale.T.contiguous(), quantizer.bucket, shared)
    level = level.T.contiguous()
    fitted, chunk = scale.clone(), max(SCRATCH // cols, 1)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        own = _grouped(level[:, part].float(), groups, size)
        target = (_grouped(pull[:, part], groups, size) * own).sum(1)
        normal = own.new_zeros(groups, groups, own.shape[2])  # its upper triangle
        for g in range(groups):
            at = g * size
            carried = h[at:, at : at + size] @ own[g]  # what group g does to those from g on
            torch.sum(carried.view(-1, *own.shape[1:]).mul_(own[g:]), 1, out=normal[g, g:])
        diagonal = normal.diagonal()
        diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-12
        # (r, groups, groups), upper triangles; of their transposes LAPACK takes the lower ones
        normal = normal.flatten(0, 1).T.contiguous().view(-1, groups, groups)
        factor, failed = torch.linalg.cholesky_ex(normal.mT)
        found = torch.cholesky_solve(target.T[:, :, None], factor)[:, :, 0]
        fitted[:, part] = torch.where(failed == 0, found.T, scale[:, part])
    fitted = quantizer.stored(fitted)
    found = torch.where(fitted > scale / 3, fitted, scale)
    return _of_columns(found, 0, cols, size).mul_(level), found


def _grouped(x: Tensor, groups: int, size: int) -> Tensor:
    """(cols, rows) → (groups, size, rows), contiguous, zeros at the end."""
    spare = groups * size - len(x)
    x = nn.functional.pad(x, (0, 0, 0, spare)) if spare else x.contiguous()
    return x.unflatten(0, (groups, size))


def _descend(
    pull: Tensor, q: Tensor, scale: Tensor, h: Tensor, quantizer: FakeQuantize, size: int
) -> Tensor:
    """Step 3: each column of ``q`` rounded anew to where the error is least, the others as they
    are; in place. pull: H Wᵀ."""
    pull = torch.addmm(pull, h, q, alpha=-1)  # minus half the gradient
    for start in range(0, len(q), BLOCK):
        stop = min(start + BLOCK, len(q))
        here = slice(start, stop)
        q[here], moved = ops.round_columns(
            pull[here], q[here], h.diagonal()[here], h[here, here],
            _of_columns(scale, start, stop, size), quantizer.bucket,
        )  # fmt: skip
        pull[stop:].addmm_(h[stop:, here], moved, alpha=-1)
    return q
