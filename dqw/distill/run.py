"""`distill`: one call from a student, a teacher and clips to a trained student.

output_dir/
  checkpoint-120/        see dqw.distill.checkpoint
  teacher_labels.jsonl   texts the teacher wrote
  cuts.jsonl             where long recordings were cut
  log.jsonl              losses of every logged step
  guidance.jsonl         losses and choices of every guidance update
  states/                see dqw.distill.states
  tensorboard/           the same losses for TensorBoard
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dqw.convert import quant_modules, stored_plan
from dqw.digest import digest, weights_digest
from dqw.distill import checkpoint as store
from dqw.distill.arguments import check_precision, total_steps, training_arguments
from dqw.distill.callbacks import ReportCallback, tensorboard_callback
from dqw.distill.config import DistillConfig, GuidanceConfig, TrainConfig, check_settings
from dqw.distill.data import Collator, EpochSampler, LabelEncoder, SpeechDataset, SpeechItem
from dqw.distill.guidance import Choice
from dqw.distill.model import DistillModel
from dqw.distill.pair import Pair, check_hearing, check_models, is_multilingual, settle
from dqw.distill.prepare import Prepared, prepare
from dqw.distill.progress import Display, StepReport, display
from dqw.distill.resume import found_checkpoint, resumed_step
from dqw.distill.rounding import round_student, starts_off_grid
from dqw.distill.states import FOLDER as STATES
from dqw.distill.states import StatesDataset, keep_states, keeps_states, states_folder, window_bytes
from dqw.distill.stepping import seed_step
from dqw.distill.trainer import DistillTrainer
from dqw.errors import UserError
from dqw.processes import agreed, alike, is_main, share

CACHED_CLIPS = 2000  # about 1 GB of float16 features at 80 mels


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        steps: optimizer steps in all, resumed ones included; seconds: of this call's training.
        losses: loss and its parts at the last logged step; empty if nothing was left to train.
        examples: how many clips were learned from; skipped: ids of the others, by reason.
        matching: the last matching per stack; choice: the last choice of guidance.
        resumed_from: the step this call went on from, or None.
    """

    steps: int
    seconds: float
    output_dir: Path
    examples: int
    losses: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    matching: dict[str, tuple[int, ...]] = field(default_factory=dict)
    choice: Choice | None = None
    resumed_from: int | None = None


def distill(
    student: Any,
    teacher: Any,
    processor: Any,
    items: Iterable[SpeechItem],
    output_dir: str | Path,
    config: DistillConfig | None = None,
    *,
    guidance: GuidanceConfig | None = None,
    train: TrainConfig | None = None,
    resume: bool = False,
    progress: str | Callable[[StepReport], object] | Display = "auto",
    teacher_processor: Any = None,
    states: Path | None = None,
) -> TrainResult:
    """Train `student` in place to be like `teacher` on `items`.

    Args:
        student: WhisperForConditionalGeneration, after `dqw.quantize` for joint distillation and
            quantization, or plain for distillation alone. Ends in eval mode, not frozen.
        teacher: another WhisperForConditionalGeneration of the same vocabulary; never changed but
            for its dtype and device.
        processor: the student's WhisperProcessor (feature extractor and tokenizer).
        items: clips (see `SpeechItem`).
        output_dir: checkpoints and logs; must not hold checkpoints unless `resume`.
        config, guidance, train: settings; None takes the defaults.
        resume: go on from the newest complete checkpoint there, if there is one.
        progress: `auto`, `live`, `plain`, `off`, a function that gets each StepReport, or a
            Display.
        teacher_processor: the teacher's, where it reads other features (128 mel bins).
        states: folder for kept states, which runs may share; None: `output_dir/states`.

    Raises:
        UserError: models do not fit each other, no clip is left, the folder is in use or holds
            another run, a resumed run has other settings or data, or the disk is full.
    """
    config, guidance = config or DistillConfig(), guidance or GuidanceConfig()
    train, folder = train or TrainConfig(), Path(output_dir)
    check_run(config, guidance, train)
    check_models(student, teacher, teacher_processor)
    check_hearing(student, teacher, config)
    if any(module.frozen for module in quant_modules(student).values()):
        raise UserError(
            "the student is packed, and packed weights do not learn: load a float checkpoint and "
            "call dqw.quantize."
        )
    with store.held(folder) if is_main() else nullcontext():
        return _distill(
            Pair(teacher, student, processor, teacher_processor or processor), items, folder,
            (config, guidance, train), resume, _display(progress), states,
        )  # fmt: skip


def check_run(config: DistillConfig, guidance: GuidanceConfig, train: TrainConfig) -> None:
    """Raise UserError where the settings of a run exclude each other, or this machine one."""
    check_settings(config, train)
    check_precision(train)
    if guidance.mode in ("quant_guided", "distill_guided", "mutual") and not config.uses_hidden:
        raise UserError(
            f"guidance.mode = {guidance.mode!r} needs distilled hidden states, and none are "
            "compared: give distill.hidden a positive weight and a matching."
        )
    keeps_states(config, guidance, train)


def _distill(
    pair: Pair,
    items: Iterable[SpeechItem],
    folder: Path,
    settings: tuple[DistillConfig, GuidanceConfig, TrainConfig],
    resume: bool,
    shown: Display,
    states: Path | None,
) -> TrainResult:
    student, teacher, processor = pair.student, pair.teacher, pair.processor
    config, guidance, train = settings
    kept = keeps_states(config, guidance, train)
    found = found_checkpoint(folder, resume)
    settle(student, teacher, config, train)
    encoder = LabelEncoder(
        processor.tokenizer, is_multilingual(student), student.config.max_target_positions
    )
    args = training_arguments(train, folder, _may_skip(student, config, guidance))
    teacher.to(args.device)
    # Other processes read the labels that the first one has written.
    with args.main_process_first(local=False):
        made = prepare(
            items, encoder, teacher, pair.teacher_processor, config, train,
            folder / "teacher_labels.jsonl",
            window=float(processor.feature_extractor.chunk_length),
            progress=shown.count,
        )  # fmt: skip
    for line in made.left_out():
        shown.note(line)
    if not alike(made.fingerprint()):
        raise UserError(
            "processes have different clips or texts: give all the same data and output folder."
        )
    dataset = SpeechDataset(
        made.examples,
        encoder,
        processor.feature_extractor,
        pair.teacher_extractor,
        augment=config.augment,
        seed=train.seed if config.augment.seed is None else config.augment.seed,
        cache=train.cache_features == "always"
        or (
            train.cache_features == "auto"
            and not train.workers  # each would fill a cache of its own, and end with the epoch
            and len(made.examples) <= CACHED_CLIPS
        ),
    )
    if found is None and config.calibration_clips:
        # Rounding hears whole windows: of clips that are not joined, silence for the most part.
        spoken = dataset if config.audio_context == "full" else dataset.joined()
        off_grid = starts_off_grid(student, teacher, guidance)
        round_student(
            student.to(args.device), spoken, Collator(pad=encoder.end), config, shown, off_grid
        )
        share(student)
    args.max_steps = total_steps(train, len(dataset), args.world_size)
    read = args.max_steps * train.accumulate * train.batch_size * args.world_size
    if train.cache_states == "auto" and states is None and read <= len(dataset):
        kept = False  # no window is read twice
    seed_step(train.seed, -1, 0, 0)  # projections start at random
    pupil = DistillModel(student, teacher, config)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    states_in = Path()
    if kept:
        if found is not None:  # what a frozen encoder gives depends on how it was rounded
            store.load_weights(found, pupil)
        content = repr((made.fingerprint(), dataset.seed, config.augment))
        states_in = states_folder(states or folder / STATES, pupil, teacher, content, autocast)
    if kept and train.cache_states == "auto":
        kept = agreed(_room(dataset, pupil, states_in, shown))
    windows: SpeechDataset | StatesDataset = dataset
    if kept:
        pupil.to(args.device)
        with args.main_process_first(local=False):
            windows = keep_states(
                dataset,
                _keys(dataset, config, train, args),
                pupil,
                teacher,
                states_in,
                autocast,
                lambda done, total: shown.count("encoder and teacher, windows", done, total),
            )
    report = ReportCallback(shown, folder / "log.jsonl")
    trainer = DistillTrainer(
        pupil,
        teacher,
        settings,
        args,
        train_dataset=windows,
        data_collator=Collator(pad=encoder.end),
        callbacks=[report],
    )
    report.trainer = trainer
    trainer.extra_settings = {
        "data": {"clips": len(dataset), "content": made.fingerprint()},
        "run": {"processes": args.world_size},
        "models": {
            "teacher": weights_digest(teacher),
            "student's bits": digest((), sorted(stored_plan(student).items())),
        },
    }
    step = resumed_step(found, folder, trainer.settings, trainer.is_world_process_zero())
    if train.tensorboard and trainer.is_world_process_zero():
        writer = tensorboard_callback(folder / "tensorboard", step)
        if writer is not None:
            trainer.add_callback(writer)
    began = time.monotonic()
    try:
        if found is not None and step is not None and step >= args.max_steps:
            trainer._load_from_checkpoint(str(found))
        else:
            trainer.train(resume_from_checkpoint=None if found is None else str(found))
    finally:
        shown.stop()
    student.eval()
    return _result(trainer, made, report, time.monotonic() - began, step, folder, args.max_steps)


def _room(dataset: SpeechDataset, pupil: DistillModel, folder: Path, shown: Display) -> bool:
    """Whether the states of all windows take at most half of the disk's free space; where some are
    in ``folder``, it goes on."""
    if next(folder.glob("*.safetensors"), None) is not None:
        return True
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    wanted = len(dataset) * window_bytes(pupil)
    if 2 * wanted > free:
        shown.note(
            f"what the teacher and the encoder make of {len(dataset)} windows is worked out at "
            f"every step: kept, it would take about {wanted / 2**30:.0f} GiB of the disk's "
            f"{free / 2**30:.0f} (train.cache_states)"
        )
    return 2 * wanted <= free


def _keys(
    dataset: SpeechDataset, config: DistillConfig, train: TrainConfig, args: Any
) -> list[int]:
    """What a run reads: of an epoch that it does not finish, the beginning, and a little that is
    fetched ahead."""
    batches = args.max_steps * train.accumulate + 1 + 2 * train.workers
    order = EpochSampler.over(dataset, train, config.audio_context == "dynamic")
    return list(order)[: batches * train.batch_size * args.world_size]


def _display(progress: str | Callable[[StepReport], object] | Display) -> Display:
    if not is_main():
        return Display()
    if isinstance(progress, Display):
        return progress
    if isinstance(progress, str):
        return display(progress)
    return display("off", progress)


def _may_skip(student: Any, config: DistillConfig, guidance: GuidanceConfig) -> bool:
    """Whether a step may leave parameters without a gradient: unchosen clips, unused maps."""
    rest = any(module.rest_quantizer is not None for module in quant_modules(student).values())
    return guidance.mode != "all" or config.uses_hidden or rest


def _result(
    trainer: DistillTrainer,
    made: Prepared,
    report: ReportCallback,
    seconds: float,
    resumed_from: int | None,
    folder: Path,
    steps: int,
) -> TrainResult:
    return TrainResult(
        steps=steps,
        seconds=seconds,
        output_dir=folder,
        examples=len(made.examples),
        losses=dict(report.last.losses) if report.last is not None else {},
        skipped=made.skipped,
        matching=dict(trainer.matching),
        choice=trainer.guidance.choice,
        resumed_from=resumed_from,
    )
