"""A run's settings in the words of transformers: arguments, number of steps, precision."""

from __future__ import annotations

import math
import os
from pathlib import Path

from transformers import Seq2SeqTrainingArguments

from dqw.devices import fast_precision, has_gpu
from dqw.distill.config import TrainConfig
from dqw.errors import UserError
from dqw.processes import PATIENCE


def check_precision(train: TrainConfig) -> None:
    """Raise UserError for a precision that this machine does not train in."""
    if train.precision == "fp16" and not has_gpu():
        raise UserError("train.precision = 'fp16' is for a GPU, and torch finds none: take 'auto'.")


def training_arguments(
    train: TrainConfig, folder: Path, needs_unused: bool
) -> Seq2SeqTrainingArguments:
    """`TrainConfig` in transformers' words; `max_steps` is set once the clips are counted."""
    precision = fast_precision() if train.precision == "auto" else train.precision
    schedule = train.schedule
    if schedule == "constant" and train.warmup_steps:  # which transformers' "constant" has not
        schedule = "constant_with_warmup"
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.lr,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        max_steps=1,
        save_strategy="steps",
        save_steps=train.save_steps or 2**31,
        logging_steps=train.log_steps,
        logging_first_step=True,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not has_gpu(),
        seed=train.seed,
        dataloader_num_workers=train.workers,
        dataloader_pin_memory=has_gpu(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=needs_unused,
        ddp_broadcast_buffers=False,
        ddp_timeout=int(PATIENCE.total_seconds()),
        disable_tqdm=True,
        report_to="none",
    )
    # accelerate launch says what it likes in the environment; the recipe counts.
    args.mixed_precision = precision if precision in ("bf16", "fp16") else "no"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or args.deepspeed_plugin is not None:
        raise UserError(
            "FSDP and DeepSpeed part the weights, and a student's checkpoints are whole: launch "
            "with plain data parallelism, as torchrun --nproc_per_node GPUS does."
        )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used through torchrun, not DataParallel
    return args


def total_steps(train: TrainConfig, clips: int, processes: int) -> int:
    """Optimizer steps of a run over `clips` clips by `processes` processes."""
    batches = math.ceil(clips / (train.batch_size * processes))
    per_epoch = math.ceil(batches / train.accumulate)
    return train.steps or max(math.ceil(train.epochs * per_epoch), 1)
