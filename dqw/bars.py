"""The console on stderr, and a progress bar on it: what is done, of how many, and the time left.

Lines printed on ``err`` while a bar is shown go above it. Of several processes one is heard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from dqw.processes import is_main

err = Console(stderr=True, highlight=False, quiet=not is_main())


class Bar:
    """What `progress_bar` yields: called, it advances by one; ``say`` changes its words."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def __call__(self, name: str = "") -> None:
        self._bar.update(self._task, advance=1)

    def say(self, words: str) -> None:
        self._bar.update(self._task, description=words)


@contextmanager
def progress_bar(what: str, total: int, unit: str = "") -> Iterator[Bar]:
    """A bar of ``total`` steps, gone when the block ends; ``unit`` follows the count."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
    bar = Progress(*columns, TimeRemainingColumn(), console=err, transient=True)
    with bar:
        yield Bar(bar, bar.add_task(what, total=total))
