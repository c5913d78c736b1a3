"""`DistillTrainer`: joint distillation and quantization on transformers' Seq2SeqTrainer.

What differs from its base: the loss comes from two models; the optimizer has a group for the
learned clips and one for the projections; every micro-step seeds the random generators from its
own number; checkpoints are this package's own. On a CPU a run that was killed and resumed ends
with the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import PrinterCallback

from dqw.distill import checkpoint as store
from dqw.distill.config import DistillConfig, GuidanceConfig, TrainConfig
from dqw.distill.data import EpochSampler
from dqw.distill.guidance import Guidance, Losses, QuantLossProbe
from dqw.distill.layers import LayerTap, layer_name
from dqw.distill.matching import DIVERGED, Matching, needs_costs
from dqw.distill.model import (
    Batch,
    DistillModel,
    StepLosses,
    forward_pass,
    teacher_pass,
    teacher_recalled,
)
from dqw.distill.stepping import parameter_groups, scheduler_state, seed_step, spec_augment
from dqw.errors import UserError
from dqw.rows import append_rows
from dqw.whisper.context import AudioContext

TOKEN_LOSSES = ("ce", "kl")


class DistillTrainer(Seq2SeqTrainer):
    """Trains `model.student` to be like `teacher`.

    Args:
        model: the student with its projections.
        teacher: a Whisper; set to eval mode without gradients, in its own dtype.
        settings: (distill, guidance, train) configurations.
        args: as `training_arguments` makes them; the rest goes to Seq2SeqTrainer.
    """

    def __init__(
        self,
        model: DistillModel,
        teacher: Any,
        settings: tuple[DistillConfig, GuidanceConfig, TrainConfig],
        args: Seq2SeqTrainingArguments,
        **rest: Any,
    ) -> None:
        super().__init__(model=model, args=args, **rest)
        self.remove_callback(PrinterCallback)
        # The loss is a sum over tokens divided by the tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.distill, self.guide, self.plan = settings
        self.pupil = model
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self.teacher_taps = {s: LayerTap(self.teacher, s, model.kind) for s in model.stacks}
        self.guidance = Guidance(model.student, self.guide, model.stacks)
        self.context = AudioContext.of(model.student.config)
        self.matching: dict[str, Matching] = {}
        self.sums: dict[str, float] = {}
        self.extra_settings: dict[str, Any] = {}
        self._step_seen, self._micro = -1, 0

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint records, and a resumed run must share."""
        return {**settings_of(self.distill, self.guide, self.plan), **self.extra_settings}

    # Data order

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.order = EpochSampler.over(dataset, self.plan, self.context is not None)
        return self.order

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over four groups: matrices, the rest of the weights, clips, projections."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.pupil, self.plan),
                betas=(self.plan.betas[0], self.plan.betas[1]),
                fused=True,
            )
        return self.optimizer

    # One micro-step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """ce·CE + kl·KL per token of the accumulated batch, plus hidden·(mean hidden loss)."""
        batch = Batch.of(inputs)
        step, micro = self._begin(batch)
        seed_step(self.plan.seed, step, micro, self.args.process_index)
        features = self.student_features(batch)
        if self.context is not None:
            window = self.pupil.student.config.max_source_positions
            batch.positions = self.context.drawn(batch.longest, window, random.random())
        distilled = self.distilled_layers()
        wanted, logits = self.teacher_layers_wanted(distilled), self.distill.kl > 0
        if batch.taught is None:
            heard = features if self.distill.teacher_masked else batch.teacher_features
            # In the student's precision: in float32 it took a third of a step on AMX.
            with self.accelerator.autocast():
                teacher = teacher_pass(
                    self.teacher, heard, batch, self.teacher_taps, wanted, logits
                )
        else:
            teacher = teacher_recalled(self.teacher, batch, wanted, logits)
        if batch.positions is not None:
            features = features[..., : 2 * batch.positions]
        losses: StepLosses = model(features, batch, teacher, self.matching, distilled)
        self.matching = losses.matching
        parts = max(self.current_gradient_accumulation_steps, 1)
        items = losses.count * parts if num_items_in_batch is None else num_items_in_batch
        loss = losses.tokens * (self.accelerator.num_processes / items)
        loss = loss + losses.hidden * (self.distill.hidden / parts)
        self._sum_up(losses, parts)
        return (loss, losses) if return_outputs else loss

    def _begin(self, batch: Batch) -> tuple[int, int]:
        """Count the micro-step; at an optimizer step's first one, guide and unset the matching."""
        step = self.state.global_step
        if step != self._step_seen:
            self._step_seen, self._micro = step, 0
            if self.guidance.due(step):
                self.update_guidance(batch)
            if needs_costs(self.distill.matching) and step % self.distill.matching_interval == 0:
                self.matching = {}
        else:
            self._micro += 1
        return step, self._micro

    def student_features(self, batch: Batch) -> Tensor:
        """The batch's features under SpecAugment, a copy where anything is masked."""
        if not self.distill.spec_augment.active:
            return batch.features
        spoken = batch.spoken()
        with spec_augment(self.pupil.student.config, self.distill.spec_augment):
            mask: Any = self.pupil.student.model._mask_input_features
            masked: Tensor = mask(batch.features.clone(), spoken)
        return masked

    def distilled_layers(self) -> dict[str, list[int]]:
        """Per stack the student layers with a hidden loss."""
        chosen = set(self.guidance.choice.distilled)
        return {
            stack: [i for i in range(self.pupil.depth[stack]) if layer_name(stack, i) in chosen]
            for stack in self.pupil.stacks
        }

    def teacher_layers_wanted(self, distilled: dict[str, list[int]]) -> dict[str, set[int]]:
        """The teacher layers whose states a step needs: all, while a matching is to be found."""
        if not needs_costs(self.distill.matching):
            self.matching = {s: self.pupil.static_matching(s) for s in self.pupil.stacks}
        return {
            stack: {self.matching[stack][i] for i in distilled[stack]}
            if stack in self.matching
            else set(range(self.pupil.teacher_depth[stack]))
            for stack in self.pupil.stacks
        }

    # Guidance

    def update_guidance(self, batch: Batch) -> None:
        """Measure what the mode needs on a few clips of this batch, choose, log."""
        if self.guidance.needs_losses:
            quant, distill = self.probe(batch.head(self.guide.probe_clips))
            self.guidance.update(self._mean(quant), self._mean(distill))
        else:
            self.guidance.update()
        if self.args.should_save:
            line = {"step": self.state.global_step, **self.guidance.state_dict()}
            append_rows(self.folder / "guidance.jsonl", [line])

    @torch.no_grad()
    def probe(self, batch: Batch) -> tuple[Losses, Losses]:
        """(quantization loss, distillation loss) of every layer, on clean features."""
        pupil, student = self.pupil, self.pupil.student
        everything = {s: set(range(pupil.depth[s])) for s in pupil.stacks}
        was_training = student.training
        student.eval()
        with QuantLossProbe(self.guidance.units).open() as quant:
            _, states = forward_pass(student, batch.features, batch, pupil.taps, everything)
        student.train(was_training)
        deep = {s: set(range(pupil.teacher_depth[s])) for s in pupil.stacks}
        if batch.taught is None:
            features = batch.teacher_features
            taught = teacher_pass(self.teacher, features, batch, self.teacher_taps, deep, False)
        else:
            taught = teacher_recalled(self.teacher, batch, deep, False)
        distill: Losses = {}
        for stack in pupil.stacks:
            matching = pupil.find_matching(states, taught.states, stack)
            for i, j in enumerate(matching):
                loss = pupil.layer_loss(states, taught.states, stack, i, j)
                distill[layer_name(stack, i)] = loss.item()
        return dict(quant), distill

    def _mean(self, losses: Losses) -> Losses:
        """The mean over processes, so that all choose alike."""
        if self.accelerator.num_processes == 1:
            return losses
        values = torch.tensor(list(losses.values()), device=self.args.device)
        values = self.accelerator.reduce(values, "mean")
        return dict(zip(losses, values.tolist(), strict=True))

    # Logs

    def _sum_up(self, losses: StepLosses, parts: int) -> None:
        new = {name: getattr(losses, name) / losses.count / parts for name in TOKEN_LOSSES}
        if self.pupil.stacks:
            new["hidden"] = losses.hidden.detach() / parts
        for name, value in losses.per_layer.items():
            new[f"hidden/{name}"] = value / parts
        for name, value in new.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self._micro == 0:
            self.sums["steps"] = self.sums.get("steps", 0) + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, means over the steps since the last log."""
        if "loss" in logs and self.sums:
            steps = self.sums.pop("steps")
            logs |= {name: float(value) / steps for name, value in self.sums.items()}
            self.sums = {}
            names = (*TOKEN_LOSSES, "hidden", "grad_norm")
            lost = [name for name in names if not math.isfinite(logs.get(name, 0.0))]
            if lost and self.accelerator.scaler is None:  # float16 leaves such steps out by itself
                what = f"{' and '.join(lost)} is no number"
                raise UserError(f"{what} at step {self.state.global_step}: {DIVERGED}")
        super().log(logs, start_time)
        # log.jsonl has them all; a checkpoint would hold them once more.
        del self.state.log_history[:-1]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the base class walks over all parameters at every step for it."""
        return 0

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in self.pupil.named_parameters():
            if not parameter.isfinite().all():  # a step that was not logged, or the last
                step = self.state.global_step
                raise UserError(f"{name} holds no numbers at step {step}: {DIVERGED}")
        if self.args.should_save:
            scaler = self.accelerator.scaler
            assert self.optimizer is not None
            store.save(
                self.folder,
                self.state.global_step,
                self.pupil,
                self.optimizer,
                json.dumps({**asdict(self.state), "stateful_callbacks": {}}, indent=1),
                {
                    "scheduler": scheduler_state(self.lr_scheduler),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "guidance": self.guidance.state_dict(),
                    "matching": {s: list(m) for s, m in self.matching.items()},
                    "settings": self.settings,
                },
                keep=self.plan.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint)
        store.load_weights(path, self.pupil)
        run = store.read_run(path)
        self.guidance.load_state_dict(run["guidance"])
        self.matching = {s: tuple(m) for s, m in run["matching"].items()}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            run = store.read_run(Path(checkpoint))
            store.load_optimizer(Path(checkpoint), self.optimizer)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(run["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            state = store.read_run(Path(checkpoint))["scaler"]
            if state is not None:
                self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: see `seed_step`."""


def settings_of(*configs: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues."""
    free = {
        *("save_steps", "keep_checkpoints", "log_steps", "tensorboard", "workers"),
        *("cache_features", "label_batch_size"),
    }
    values = {}
    for config in configs:
        name = type(config).__name__.removesuffix("Config").lower()
        values[name] = {k: v for k, v in asdict(config).items() if k not in free}
    return values
