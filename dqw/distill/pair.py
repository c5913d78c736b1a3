"""Student and teacher as a pair: whether one can teach the other, and in which precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dqw.devices import has_gpu
from dqw.distill.config import DistillConfig, TrainConfig
from dqw.errors import UserError
from dqw.whisper.context import AudioContext


class Pair(NamedTuple):
    """Two Whispers and the processor of each: what `dqw compress` loads."""

    teacher: Any
    student: Any
    processor: Any
    teacher_processor: Any

    @property
    def teacher_extractor(self) -> Any:
        """The teacher's feature extractor, where it hears with other mel bins; else None."""
        same = self.student.config.num_mel_bins == self.teacher.config.num_mel_bins
        return None if same else self.teacher_processor.feature_extractor


def is_multilingual(model: Any) -> bool:
    """Whether the model knows languages: its generation config's word, else its vocabulary's size
    (English-only checkpoints have 51,864 tokens)."""
    known = getattr(getattr(model, "generation_config", None), "is_multilingual", None)
    return bool(known) if known is not None else model.config.vocab_size != 51864


def is_copy(student: Any, teacher: Any) -> bool:
    """Whether the student has the teacher's width and layers, as a copy to be quantized has: where
    training starts, it is where it should end."""
    sizes = ("d_model", "encoder_layers", "decoder_layers")
    return all(getattr(student.config, k) == getattr(teacher.config, k) for k in sizes)


def check_models(student: Any, teacher: Any, teacher_processor: Any) -> None:
    """Raise UserError where `teacher` cannot teach `student`."""
    if student is teacher:
        raise UserError("student and teacher are one model: load the teacher a second time.")
    ours, theirs = student.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"the student has {ours.vocab_size} tokens and the teacher {theirs.vocab_size}: choose "
            "two checkpoints of one vocabulary (51865: tiny to large-v2, multilingual; 51864: .en; "
            "51866: large-v3 and turbo)."
        )
    if is_multilingual(student) != is_multilingual(teacher):
        raise UserError(
            "one of student and teacher is English-only, the other multilingual: choose two of a "
            "kind."
        )
    if ours.num_mel_bins != theirs.num_mel_bins and teacher_processor is None:
        raise UserError(
            f"the student reads {ours.num_mel_bins} mel bins and the teacher "
            f"{theirs.num_mel_bins}: give the teacher's own processor."
        )
    for key in ("max_source_positions", "max_target_positions"):
        if getattr(ours, key) > getattr(theirs, key):
            raise UserError(
                f"the student's {key} is {getattr(ours, key)}, the teacher's "
                f"{getattr(theirs, key)}: choose a teacher that hears and writes at least as much."
            )


def check_hearing(student: Any, teacher: Any, config: DistillConfig) -> None:
    """Raise UserError where one of the two cannot hear as ``config`` says."""
    if config.audio_context == "dynamic" and not any(
        weight.requires_grad for weight in student.get_encoder().parameters()
    ):
        raise UserError(
            "distill.audio_context = 'dynamic' needs an encoder that learns to hear less, and none "
            "of its weights has requires_grad."
        )
    if config.teacher_masked and student.config.num_mel_bins != teacher.config.num_mel_bins:
        raise UserError(
            f"distill.teacher_masked = true lets the teacher hear the student's features, which "
            f"have {student.config.num_mel_bins} mel bins, and it reads "
            f"{teacher.config.num_mel_bins}: set it to false."
        )


def settle(student: Any, teacher: Any, config: DistillConfig, train: TrainConfig) -> None:
    """Dtypes, what is frozen, and what the student's config says of its audio context."""
    # A fake-quantized student learns in float32; autocast lowers what may be lowered.
    student.float()
    on_cpu = not has_gpu()
    dtype = (
        teacher.dtype if config.teacher_dtype == "keep" else getattr(torch, config.teacher_dtype)
    )
    # CPUs have no fast float16 arithmetic, and the same numbers fit float32.
    teacher.to(torch.float32 if on_cpu and dtype == torch.float16 else dtype)
    # Sinusoids, which Whisper never learned: moved ones would have to be stored (1.5 MiB of base).
    student.model.encoder.embed_positions.requires_grad_(False)
    if train.freeze_encoder:
        student.model.encoder.requires_grad_(False)
    if train.freeze_embedding:
        student.model.decoder.embed_tokens.requires_grad_(False)
    if config.audio_context == "dynamic":
        student.config.audio_context = AudioContext().to_dict()
    elif hasattr(student.config, "audio_context"):
        del student.config.audio_context  # it was another training's
