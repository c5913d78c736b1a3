"""Weights as a short name that tells one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]], *more: object) -> str:
    """32 letters of named tensors, their dtypes and shapes, and of the ``repr`` of ``more``. A
    gigabyte takes a second."""
    found = hashlib.blake2b(repr(more).encode(), digest_size=16)
    for name, tensor in tensors:
        found.update(repr((name, tensor.dtype, tensor.shape)).encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def weights_digest(model: Any, *more: object) -> str:
    """The digest of a module's state."""
    return digest(sorted(model.state_dict().items()), *more)
