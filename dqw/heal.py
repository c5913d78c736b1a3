"""The layers of a cut student take over what those that left did, by least squares: no training.

Layer k of the teacher stays, those up to layer e leave. The student's states behind it should be
the teacher's behind e. What is missing there is fitted, as an addition to its last matrices, on
speech: by ridge regression from what they multiply. Layer after layer, each on the states that the
healed ones before it give: so each also makes up for what those still lack.

    for each kept layer: teacher's states behind e → fc2 (out_proj, fc2 again) → student's states

A row counts by one over the variance of the teacher's, for which the next LayerNorm divides by it:
behind base's layers 3 to 5 the language token's is 100 to 1000 times the others', and unweighted it
is most of what is fitted. ReplaceMe (arXiv 2505.02819) fits a linear map in the same place.

base cut to 4 + 4 layers, healed, rounded to 4 bits and not trained has a KL of 0.65; what that
depends on, and where healed students end, is in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqw.calls import Call, decoder_call, first_call, hearing
from dqw.compensate import factor
from dqw.whisper.student import kept_layers

# Base cut to 4 + 4 layers, KL on 16 clips (a one-off program): 40 windows 0.87, 160 windows 0.55.
WINDOWS = 160
RIDGE = 0.3  # of the mean of what the inputs' squares sum to


@torch.no_grad()
def heal(
    student: Any,
    teacher: Any,
    batches: Iterable[dict[str, Tensor]],
    progress: Callable[[], object] | None = None,
) -> None:
    """Change the float ``student``, cut from the float ``teacher`` (``cut_student``), in place.

    batches: as for ``calibrate``, at least one. Keeps two states of every position, float32.
    ``progress`` is called after each of the student's layers.
    """
    say = progress or (lambda: None)
    given = [{k: v.to(teacher.device) for k, v in batch.items()} for batch in batches]
    ours, theirs = student.model.encoder, teacher.model.encoder
    aims = [first_call(theirs, hearing(batch)) for batch in given]
    now = [first_call(ours, hearing(batch)) for batch in given]
    _walk(ours, theirs, now, aims, say)
    aims = [decoder_call(teacher.model, b, call) for b, call in zip(given, aims, strict=True)]
    now = [decoder_call(student.model, b, call) for b, call in zip(given, now, strict=True)]
    _walk(student.model.decoder, teacher.model.decoder, now, aims, say)


def _walk(
    ours: Any, theirs: Any, now: list[Call], aims: list[Call], say: Callable[[], object]
) -> None:
    """Heal a stack's layers; the calls end behind the last one."""
    kept, done = kept_layers(len(ours.layers), len(theirs.layers)), 0
    for layer, end in zip(ours.layers, [*kept[1:], len(theirs.layers)], strict=True):
        for aim in aims:
            for taught in theirs.layers[done:end]:
                aim.hidden = aim.run(taught)
        done = end
        if not torch.equal(now[0].run(layer), aims[0].hidden):  # else nothing is missing yet
            for name in _last_matrices(layer):
                _fit(layer, layer.get_submodule(name), now, aims)
        for call in now:
            call.hidden = call.run(layer)
        say()


def _last_matrices(layer: Any) -> list[str]:
    """Those that are fitted, in this order; fc2 again for what a new out_proj changes in it.
    Of the decoder, whose rows are few, fc2 alone (docs/results.md)."""
    return ["fc2"] if hasattr(layer, "encoder_attn") else ["fc2", "self_attn.out_proj", "fc2"]


def _fit(layer: nn.Module, matrix: Any, now: Sequence[Call], aims: Sequence[Call]) -> None:
    """Add to ``matrix`` (rows, cols) and its bias what brings the layer's outputs nearest to the
    aims, as if nothing else in the layer depended on it."""
    rows, cols = matrix.weight.shape
    device = matrix.weight.device
    second = torch.zeros(cols + 1, cols + 1, device=device)
    cross = torch.zeros(cols + 1, rows, device=device)
    seen = list[Tensor]()

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])

    handle = matrix.register_forward_pre_hook(hook)
    try:
        for call, aim in zip(now, aims, strict=True):
            missing = call.rows(aim.hidden - call.run(layer), rows).float()
            x = call.rows(seen.pop(), cols).float()
            root = call.rows(aim.hidden, rows).float().var(-1, keepdim=True).rsqrt()
            x = torch.cat([x, torch.ones_like(root)], 1) * root
            with torch.autocast(device.type, enabled=False):
                second.addmm_(x.T, x)
                cross.addmm_(x.T, missing * root)
    finally:
        handle.remove()
    with torch.autocast(device.type, enabled=False):
        h = second.double()
        h.diagonal().add_(RIDGE * h.diagonal()[:-1].mean() + 1e-12)
        added = torch.cholesky_solve(cross.double(), factor(h)).float()
        matrix.weight += added[:-1].T
        matrix.bias += added[-1]
