"""What a training run shows: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

COUNT_SECONDS = 10.0


@dataclass
class StepReport:
    """One optimizer step as the display and the log see it.

    Attributes:
        step, total: optimizer steps done, and in all.
        losses: loss and its parts (ce, kl, hidden), means since the last report.
        matching: per stack the teacher layer of each student layer, 0-based.
        quantized, distilled: chosen layers by name; `layers` is how many there are.
        seconds_per_step: recent mean; seconds_left follows from it.
    """

    step: int
    total: int
    losses: dict[str, float]
    matching: dict[str, tuple[int, ...]] = field(default_factory=dict)
    quantized: tuple[str, ...] = ()
    distilled: tuple[str, ...] = ()
    layers: int = 0
    learning_rate: float = 0.0
    seconds_per_step: float = 0.0

    @property
    def seconds_left(self) -> float:
        return (self.total - self.step) * self.seconds_per_step


class Pace:
    """Seconds per step over the last steps; the first one, which warms up, weighs little."""

    def __init__(self, window: int = 20) -> None:
        self.times: deque[float] = deque(maxlen=window + 1)

    def tick(self) -> float:
        self.times.append(time.monotonic())
        if len(self.times) < 2:
            return 0.0
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def display(mode: str, callback: Callable[[StepReport], object] | None = None) -> Display:
    """The display for `mode`: `auto` (live on a terminal, else plain), `live`, `plain`, `off`."""
    if callback is not None:
        return CallbackDisplay(callback)
    if mode == "off":
        return Display()
    live = mode == "live" or (mode == "auto" and sys.stderr.isatty())
    return LiveDisplay() if live else PlainDisplay()


class Display:
    """Shows nothing; the base of the others."""

    # The station being counted: its name, when and where counting began, when it was last shown.
    _counted: tuple[str, float, int, float] = ("", 0.0, 0, 0.0)

    def start(self, total: int, done: int = 0) -> None:
        """Training begins (or goes on) at step `done` of `total`."""

    def report(self, report: StepReport) -> None:
        """A step was taken."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def count(self, what: str, done: int, total: int) -> None:
        """How far a station is that takes a while; a line every ten seconds, and its last."""
        now = time.monotonic()
        if self._counted[0] != what:
            self._counted = (what, now, done, 0.0)
        _, began, first, shown = self._counted
        if done < total and now - shown < COUNT_SECONDS:
            return
        self._counted = (what, began, first, now)
        left = ""
        if first < done < total:
            left = f", {(now - began) / (done - first) * (total - done):.0f} s left"
        self.note(f"{what} {done}/{total}{left}")

    def stop(self) -> None:
        """Training ended, or an error ends it; may be called twice."""


class CallbackDisplay(Display):
    """Hands each report to a function."""

    def __init__(self, callback: Callable[[StepReport], object]) -> None:
        self.callback = callback

    def report(self, report: StepReport) -> None:
        self.callback(report)


class PlainDisplay(Display):
    """A line now and then: every 2 % of the steps, or once in 30 seconds, the last one always."""

    def __init__(self) -> None:
        self.shown_step, self.shown_at = 0, 0.0

    def start(self, total: int, done: int = 0) -> None:
        self.shown_step = done

    def report(self, report: StepReport) -> None:
        now = time.monotonic()
        due = report.step - self.shown_step >= max(report.total / 50, 1) and now - self.shown_at > 1
        if not (due or now - self.shown_at > 30 or report.step == report.total):
            return
        self.shown_step, self.shown_at = report.step, now
        print(one_line(report), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LiveDisplay(Display):
    """A bar, the losses, the matching and the chosen layers, redrawn in place."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live: Live | None = None
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[pace]}"),
            console=self.console,
            expand=True,
        )

    def start(self, total: int, done: int = 0) -> None:
        self.task = self.bar.add_task("train", total=total, completed=done, pace="")
        self.live = Live(self.bar, console=self.console, refresh_per_second=4)
        self.live.start()

    def report(self, report: StepReport) -> None:
        if self.live is None:
            self.start(report.total, report.step)
        assert self.live is not None
        self.bar.update(self.task, completed=report.step, pace=_pace(report))
        self.live.update(Group(self.bar, panel(report)))

    def note(self, text: str) -> None:
        self.console.print(text)

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def panel(report: StepReport) -> Table:
    """The table under the bar."""
    table = Table.grid(padding=(0, 2))
    table.add_row("losses", "  ".join(f"{k} {v:.4f}" for k, v in report.losses.items()))
    for stack, matching in report.matching.items():
        table.add_row(f"{stack} ← teacher", " ".join(f"{i}←{j}" for i, j in enumerate(matching)))
    if len(report.quantized) < report.layers:
        table.add_row("quantized", short_names(report.quantized))
    if len(report.distilled) < report.layers:
        table.add_row("distilled", short_names(report.distilled))
    return table


def one_line(report: StepReport) -> str:
    """A report as one plain line."""
    parts = [f"step {report.step}/{report.total}"]
    parts += [f"{name} {value:.4f}" for name, value in report.losses.items()]
    for stack, matching in report.matching.items():
        parts.append(f"{stack}←{','.join(map(str, matching))}")
    if len(report.quantized) < report.layers:
        parts.append(f"quantized {short_names(report.quantized)}")
    if len(report.distilled) < report.layers:
        parts.append(f"distilled {short_names(report.distilled)}")
    return "  ".join([*parts, _pace(report)])


def short_names(layers: tuple[str, ...]) -> str:
    """`model.encoder.layers.3`, `model.decoder.layers.0` → `e3 d0`."""
    return " ".join(f"{n.split('.')[1][0]}{n.rsplit('.', 1)[1]}" for n in layers) or "none"


def _pace(report: StepReport) -> str:
    left = int(report.seconds_left)
    clock = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
    return f"{report.seconds_per_step:.2f} s/step  {clock} left"
