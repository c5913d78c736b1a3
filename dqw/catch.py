"""What a module is called with, without the rest of the pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn


class _Seen(Exception):
    """A module has been given what was to be caught: the rest of the pass is not needed."""


def given_to(
    module: nn.Module, run: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``module`` is called with where ``run`` runs, which goes no further."""
    found = list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((inputs, named))
        raise _Seen

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Seen):
            run()
    finally:
        handle.remove()
    return found[0]
