"""What happens beside training: the display, `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from dqw.distill.progress import Display, Pace, StepReport
from dqw.rows import append_rows
from dqw.whisper.files import write_atomic

if TYPE_CHECKING:
    from dqw.distill.trainer import DistillTrainer

SHOWN = ("loss", "ce", "kl", "hidden")


class ReportCallback(TrainerCallback):
    """Feeds the display and appends one line per logged step to `log.jsonl`."""

    def __init__(self, shown: Display, log_path: Path) -> None:
        self.display, self.log_path = shown, log_path
        self.trainer: DistillTrainer | None = None
        self.pace = Pace()
        self.last: StepReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint brings its own intervals
        if state.is_world_process_zero:
            self.display.start(state.max_steps, state.global_step)
        self.pace.tick()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of several processes none tells the order its epoch where it resumes within one."""
        assert self.trainer is not None
        self.trainer.order.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = self.pace.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        assert self.trainer is not None
        choice = self.trainer.guidance.choice
        report = StepReport(
            step=state.global_step,
            total=state.max_steps,
            losses={name: logs[name] for name in SHOWN if name in logs},
            matching=dict(self.trainer.matching),
            quantized=choice.quantized,
            distilled=choice.distilled,
            layers=len(self.trainer.guidance.units),
            learning_rate=logs.get("learning_rate", 0.0),
            seconds_per_step=self.seconds,
        )
        self.last = report
        self.display.report(report)
        row = {"step": report.step, **logs, "seconds_per_step": round(self.seconds, 4)}
        row["matching"] = {stack: list(m) for stack, m in report.matching.items()}
        append_rows(self.log_path, [row])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.stop()


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run writes again, and a torn one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomic(path, "".join(kept))


def tensorboard_callback(folder: Path, resumed_step: int | None) -> TrainerCallback | None:
    """A TensorBoard writer into `folder`, or None where TensorBoard is not installed."""
    from transformers.integrations import TensorBoardCallback, is_tensorboard_available

    if not is_tensorboard_available():
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder), purge_step=resumed_step)
    return TensorBoardCallback(tb_writer=writer)
