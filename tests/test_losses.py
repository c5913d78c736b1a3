"""Losses against formulas written out by hand; gradients; padding; projections."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dqw.distill.losses import (
    IGNORE,
    ProjectionBank,
    hidden_loss,
    pairwise_costs,
    token_losses,
)

ROWS, VOCABULARY = 150, 37  # more rows than one chunk of the fused loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log softmax(logits)[label] over the labels that are not −100.

    Args:
        logits: (..., vocabulary).
        labels: (...) int64; −100 marks padding.
    """
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=IGNORE
    )


def logits_kl(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """T² · KL(softmax(z_T/T) ‖ softmax(z_S/T)), mean over the positions that are not padded.

    Args:
        student, teacher: logits (..., vocabulary) of the same shape.
        labels: (...) int64; positions with −100 do not count. None: all count.
        temperature: T. The factor T² keeps the gradient's size as T grows (Hinton et al. 2015).
    """
    student = student.reshape(-1, student.shape[-1])
    teacher = teacher.reshape(-1, teacher.shape[-1])
    if labels is not None:
        keep = (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)
        student, teacher = student.index_select(0, keep), teacher.index_select(0, keep)
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return temperature**2 * total / max(student.shape[0], 1)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, VOCABULARY, generator=generator) * 2
    teacher = torch.randn(ROWS, VOCABULARY, generator=generator) * 2
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return student, teacher, labels


def softmax(row):
    exps = [math.exp(x) for x in row]
    return [e / sum(exps) for e in exps]


def test_cross_entropy_by_hand_and_padding_is_masked():
    logits = torch.tensor([[[1.0, 2.0, 0.5], [0.0, 0.0, 3.0], [9.0, -9.0, 9.0]]])
    labels = torch.tensor([[1, 0, IGNORE]])
    by_hand = -(math.log(softmax([1.0, 2.0, 0.5])[1]) + math.log(softmax([0.0, 0.0, 3.0])[0])) / 2
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_by_hand_and_padding_is_masked(temperature):
    student = [[1.0, 2.0, 0.5], [0.0, 0.0, 3.0], [5.0, 5.0, 5.0]]
    teacher = [[0.5, 2.5, 0.0], [1.0, -1.0, 2.0], [-7.0, 7.0, 0.0]]
    by_hand = 0.0
    for z_s, z_t in zip(student[:2], teacher[:2], strict=True):
        p = softmax([z / temperature for z in z_t])
        q = softmax([z / temperature for z in z_s])
        by_hand += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    by_hand *= temperature**2 / 2
    loss = logits_kl(
        torch.tensor([student]),
        torch.tensor([teacher]),
        torch.tensor([[2, 2, IGNORE]]),
        temperature,
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_kl_is_zero_for_equal_logits_and_positive_else(logits):
    student, teacher, _ = logits
    assert logits_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert logits_kl(student, teacher).item() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_token_losses_equal_autograd(logits, temperature):
    student, teacher, labels = logits
    plain = student.clone().requires_grad_()
    loss = ROWS * (
        0.3 * cross_entropy(plain, labels) + 0.7 * logits_kl(plain, teacher, None, temperature)
    )
    (loss / 5).backward()
    fused = student.clone().requires_grad_()
    total, ce, kl = token_losses(
        fused, teacher, labels, ce_weight=0.3, kl_weight=0.7, temperature=temperature
    )
    (total / 5).backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (0.3 * ce + 0.7 * kl).item() == pytest.approx(loss.item(), rel=1e-5)
    assert not ce.requires_grad and not kl.requires_grad
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_fused_token_losses_without_teacher_and_with_impossible_tokens(logits):
    student, teacher, labels = logits
    alone = student.clone().requires_grad_()
    total, _, kl = token_losses(alone, None, labels, ce_weight=1.0, kl_weight=0.0)
    total.backward()
    assert kl.item() == 0.0
    assert total.item() / ROWS == pytest.approx(cross_entropy(student, labels).item(), rel=1e-5)
    teacher[:, 3] = float("-inf")
    total, _, kl = token_losses(student, teacher, labels, ce_weight=1.0, kl_weight=1.0)
    assert math.isfinite(total.item()) and math.isfinite(kl.item())


def test_half_precision_logits_keep_their_dtype(logits):
    student, teacher, labels = logits
    half = student.bfloat16().requires_grad_()
    total, _, _ = token_losses(half, teacher.bfloat16(), labels, ce_weight=0.5, kl_weight=0.5)
    total.backward()
    assert total.dtype == torch.float32 and half.grad.dtype == torch.bfloat16


def test_hidden_losses_by_hand():
    student = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    teacher = torch.tensor([[0.0, 2.0], [4.0, 4.0]])
    assert hidden_loss(student, teacher, "mse").item() == pytest.approx((1 + 0 + 1 + 1) / 4)
    # Variance about the means 2 and 3: 4 + 4 + 1 + 1.
    assert hidden_loss(student, teacher, "relative").item() == pytest.approx(3 / 10)
    # Feature by feature, errors 2/2 and 1/2 over variances 4 and 1, each raised by 0.001 · 2.5.
    by_hand = (1.0 / 4.0025 + 0.5 / 1.0025) / 2
    assert hidden_loss(student, teacher, "standard").item() == pytest.approx(by_hand)
    by_hand = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax([x / 2 for x in s]), softmax([x / 2 for x in t])
        by_hand += 4 * sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 2
    assert hidden_loss(student, teacher, "ffn", 2.0).item() == pytest.approx(by_hand, rel=1e-5)
    with pytest.raises(ValueError, match="relative"):
        hidden_loss(student, teacher, "cosine")


@pytest.mark.parametrize("kind", ["relative", "standard"])
def test_variance_losses_do_not_see_scale_or_offset(kind):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(50, 8, generator=generator)
    student = teacher + 0.1 * torch.randn(50, 8, generator=generator)
    base = hidden_loss(student, teacher, kind)
    moved = hidden_loss(student * 30 + 7, teacher * 30 + 7, kind)
    torch.testing.assert_close(base, moved, rtol=1e-3, atol=0)
    constant = teacher.mean(dim=0).expand_as(teacher)
    assert hidden_loss(constant, teacher, kind).item() == pytest.approx(1.0, rel=2e-3)


def test_standard_loss_sees_features_beside_a_massive_one():
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(200, 16, generator=generator)
    teacher[:, 0] *= 100
    student = teacher.clone()
    student[:, 1:] = 0
    assert hidden_loss(student, teacher, "relative").item() < 0.01
    assert hidden_loss(student, teacher, "standard").item() > 0.5


@pytest.mark.parametrize("kind", ["mse", "relative", "standard", "ffn"])
def test_pairwise_costs(kind):
    generator = torch.Generator().manual_seed(2)
    students = [torch.randn(40, 6, generator=generator).requires_grad_() for _ in range(2)]
    teachers = [torch.randn(40, 6, generator=generator) for _ in range(3)]
    cost = pairwise_costs(students, teachers, kind)
    assert cost.shape == (2, 3) and not cost.requires_grad
    assert cost[1, 2].item() == hidden_loss(students[1], teachers[2], kind).item()


@pytest.mark.parametrize(("mode", "maps"), [("shared", 1), ("layer", 3)])
def test_projection_bank_learns(mode, maps):
    torch.manual_seed(0)
    bank = ProjectionBank(8, 5, 3, mode)
    assert len(bank.maps) == maps
    weight = bank.maps[0]
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-5)
    state = torch.randn(10, 8, dtype=torch.float16)
    out = bank(state, 2)
    assert out.shape == (10, 5) and out.dtype == torch.float32
    hidden_loss(torch.randn(10, 5), out, "relative").backward()
    assert bank.maps[-1].grad.abs().sum() > 0
