"""Parts of an optimizer step: parameter groups, random seeds, SpecAugment, the schedule's state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dqw.distill.config import SpecAugmentConfig, TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in four groups; empty ones are left out.

    Weight decay is for matrices alone. Clips and codebooks have their own learning rate and never
    decay: pulling a clip to zero would cut its weights off.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "matrix": [],
        "vector": [],
        "clip": [],
        "projection": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("projections."):
            kind = "projection"
        elif name.endswith((".clip", ".codebook")):
            kind = "clip"
        else:
            kind = "matrix" if parameter.dim() > 1 else "vector"
        groups[kind].append(parameter)
    rates = {"clip": config.clip_lr, "projection": config.projection_lr}
    return [
        {
            "params": parameters,
            "lr": rates.get(kind, config.lr),
            "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators for one micro-step.

    So dropout and SpecAugment depend on where a run is, not on how it got there: nothing of them
    has to be saved, and a resumed run draws what an unbroken one would have drawn.
    """
    value = random.Random(f"{seed} {step} {micro} {rank}").getrandbits(32)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def spec_augment(config: Any, wanted: SpecAugmentConfig) -> Iterator[None]:
    """Inside, a Whisper config asks for `wanted`; afterwards it is as before."""
    values = {"apply_spec_augment": True}
    for axis in ("time", "feature"):
        for key in ("prob", "length", "min_masks"):
            values[f"mask_{axis}_{key}"] = getattr(wanted, f"{axis}_{key}")
    kept = {key: getattr(config, key) for key in values}
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in kept.items():
            setattr(config, key, value)


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's state as plain JSON (its functions have no state of their own)."""
    state = {k: v for k, v in scheduler.state_dict().items() if not k.startswith("lr_lambdas")}
    return {**state, "lr_lambdas": [None] * len(scheduler.base_lrs)}
