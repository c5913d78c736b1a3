"""Error-compensating rounding: a layer's rounding errors made up for by its columns to come.

GPTQ (arXiv 2210.17323): with the layer's inputs X on some speech, columns are rounded one after the
other, and what a rounding did to X Wᵀ is spread over the columns not yet rounded, by the inverse of
H = XᵀX. It fits every grid here: the scales stay, only the choice of level changes. Training starts
from the compensated weights, which lie on the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dqw import ops
from dqw.embedding import TiedProjection
from dqw.fake_quant import FakeQuantize
from dqw.linear import QuantLinear, QuantModule

DAMPING = 0.01  # of H's mean diagonal, as in the paper
BLOCK = 128  # columns whose errors are collected before the rest is updated
ROWS = 4096  # at most this many rows of one input are taken, evenly spaced


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    progress: Callable[[str], object] | None = None,
) -> None:
    """Round the Linear weights of a learning ``model`` with compensation, in place.

    batches: keyword arguments of the model's forward, such as input_features and
    decoder_input_ids. The model is run on them as it is, so inputs are those that quantized layers
    give. The embedding is rounded for its use as the output projection. ``progress`` is called
    with each layer's name.
    """
    moments = _input_moments(model, batches)
    for name, (module, moment) in moments.items():
        if progress is not None:
            progress(name)
        quantizer = module.quantizer
        assert quantizer is not None
        module.weight.copy_(compensated(module.weight.float(), moment, quantizer))


def _input_moments(
    model: nn.Module, batches: Iterable[dict[str, Tensor]]
) -> dict[str, tuple[QuantModule, Tensor]]:
    """Layer name → (layer, XᵀX of its inputs, float32)."""
    moments: dict[str, tuple[QuantModule, Tensor]] = {}

    def watch(name: str, layer: nn.Module, holder: QuantModule) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, holder.cols).float()
            x = x[:: -(-len(x) // ROWS)]
            with torch.autocast(x.device.type, enabled=False):  # sums of thousands: float32
                moments[name][1].addmm_(x.T, x)

        moments[name] = holder, torch.zeros(holder.cols, holder.cols, device=holder.weight.device)
        return layer.register_forward_pre_hook(hook)

    handles = []
    for name, layer in model.named_modules():
        holder = layer.embedding if isinstance(layer, TiedProjection) else layer
        multiplies = isinstance(layer, QuantLinear | TiedProjection)
        if multiplies and not holder.frozen and holder.chosen:
            handles.append(watch(name, layer, holder))
    try:
        for batch in batches:
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return moments


@torch.no_grad()
def compensated(weight: Tensor, moment: Tensor, quantizer: FakeQuantize) -> Tensor:
    """``weight`` (rows, cols) on the quantizer's grid, so that X Wᵀ moves least.

    moment: XᵀX, (cols, cols). Columns go from left to right: with per-group scales an order by
    importance would mix the groups.
    """
    w = weight.clone()
    cols = w.shape[1]
    size = quantizer.group_size or cols
    scale = quantizer.scale().expand(w.shape[0], -1)
    upper = _inverse_factor(moment)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        errors = torch.zeros(w.shape[0], stop - start, device=w.device)
        for i in range(start, stop):
            column = w[:, i : i + 1].contiguous()
            group = i // size if scale.shape[1] > 1 else 0
            rounded = ops.fake_quant(
                column, scale[:, group : group + 1].contiguous(), quantizer.bucket, 0
            )
            error = (column - rounded) / upper[i, i]
            w[:, i : i + 1] = rounded
            w[:, i + 1 : stop] -= error * upper[i, i + 1 : stop]
            errors[:, i - start] = error[:, 0]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹, H = moment + damping. Dead inputs get a unit diagonal."""
    h = moment.double()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal += dead + DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()
