"""What distillation minimises: token losses on logits, hidden-state losses on layer outputs.

Every function takes rows that count: padding is dropped before (decoder positions) or does not
exist (encoder frames), so a mean over rows is a mean over what was said. All arithmetic is in
float32, whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100
# Rows of logits worked on at a time: 64 × 51,865 × 4 bytes are 13 MB, which stays in the cache of
# one socket, where the whole (rows, vocabulary) matrices of a batch would not.
CHUNK_ROWS = 64
# A feature that hardly varies is measured against this share of the mean variance at least.
FLOOR = 1e-3
_TINY = torch.finfo(torch.float32).tiny


class _TokenLosses(torch.autograd.Function):
    """The weighted sum of both token losses with its gradient computed on the way.

    One gradient buffer instead of the six (rows, vocabulary) matrices that autograd keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ce_weight: float,
        kl_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = student.shape[0]
        grad = torch.empty_like(student)
        ce_sum = torch.zeros((), dtype=torch.float32, device=student.device)
        kl_sum = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            z = student[part].float()
            label = labels[part].unsqueeze(1)
            log_p = F.log_softmax(z, dim=-1)
            ce_sum -= log_p.gather(1, label).sum()
            p = log_p.exp()
            total = p * ce_weight
            total.scatter_add_(1, label, torch.full_like(label, -ce_weight, dtype=total.dtype))
            if teacher is not None:
                log_q = F.log_softmax(teacher[part].float() / temperature, dim=-1)
                if temperature != 1.0:
                    log_p = F.log_softmax(z / temperature, dim=-1)
                    p = log_p.exp()
                q = log_q.exp()
                # A teacher that rules a token out (−inf) adds nothing: 0 · (−inf − x) is not NaN.
                gap = torch.where(q > 0, log_q.sub_(log_p), 0.0)
                kl_sum += (q * gap).sum() * temperature**2
                total.add_(p.sub_(q), alpha=kl_weight * temperature)
            grad[part] = total.to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return ce_weight * ce_sum + kl_weight * kl_sum, ce_sum, kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None


def token_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    ce_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both token losses over rows without padding, summed (not averaged).

    Args:
        student: (rows, vocabulary) logits that may need a gradient.
        teacher: the same shape, or None when the KL has no part in the loss.
        labels: (rows,) int64, every one a token.

    Returns:
        (ce_weight · CE + kl_weight · T² · KL, CE, KL), each a float32 scalar summed over rows;
        only the first carries a gradient.
    """
    return _TokenLosses.apply(student, teacher, labels, ce_weight, kl_weight, temperature)


def hidden_loss(student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """How far a student layer's rows are from a teacher layer's.

    Args:
        student, teacher: (rows, features), of one width (see `ProjectionBank`).
        kind: `mse`: mean squared error. `relative`: squared error over the teacher's variance
            about its per-feature mean, so 1 is a student that knows the mean alone, and layers of
            any scale compare. `standard`: the same for each feature by itself, then the mean over
            features. In whisper-base one of 512 features holds 63 to 91 % of a late layer's
            variance; `mse` and `relative` see little else. `ffn`: T² · Σ_features (softmax(h_S/T)
            − softmax(h_T/T))², mean over rows (DQ-Whisper, on activations inside the feed-forward
            block).
        temperature: T of `ffn`.

    Returns:
        A float32 scalar.
    """
    student, teacher = student.float(), teacher.float()
    if kind == "mse":
        return F.mse_loss(student, teacher)
    if kind == "relative":
        error = (student - teacher).square().sum()
        spread = (teacher - teacher.mean(dim=0)).square().sum()
        return error / spread.clamp_min(_TINY)
    if kind == "standard":
        error_of = (student - teacher).square().mean(dim=0)
        variance = (teacher - teacher.mean(dim=0)).square().mean(dim=0)
        return (error_of / (variance + FLOOR * variance.mean()).clamp_min(_TINY)).mean()
    if kind == "ffn":
        gap = torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1)
        return temperature**2 * gap.square().sum(dim=-1).mean()
    raise ValueError(f"hidden loss {kind!r} is not one of standard, relative, mse, ffn")


@torch.no_grad()
def pairwise_costs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    kind: str,
    temperature: float = 1.0,
) -> Tensor:
    """`hidden_loss` of every pair: (L_S, L_T) float32, without gradients.

    Args:
        students, teachers: per layer (rows, features), all of the same shape.
    """
    rows = [
        torch.stack([hidden_loss(state, target, kind, temperature) for target in teachers])
        for state in students
    ]
    return torch.stack(rows)


class ProjectionBank(nn.Module):
    """Learned linear maps from the teacher's width to the student's, one bank per stack.

    `shared`: one map for all teacher layers (published; keeps costs of different layers
    comparable under a matching that follows them). `layer`: one map per teacher layer.
    Trained beside the student and thrown away with the trainer. Starts as a random semi-orthogonal
    map, which keeps distances and angles as well as a narrower space can.
    """

    def __init__(
        self, teacher_width: int, student_width: int, teacher_layers: int, mode: str = "shared"
    ) -> None:
        super().__init__()
        count = 1 if mode == "shared" else teacher_layers
        self.maps = nn.ParameterList(
            nn.init.orthogonal_(torch.empty(student_width, teacher_width)) for _ in range(count)
        )

    def forward(self, state: Tensor, layer: int) -> Tensor:
        """(rows, teacher width) of teacher layer `layer` → (rows, student width)."""
        weight = self.maps[min(layer, len(self.maps) - 1)]
        return F.linear(state.to(weight.dtype), weight)
