"""A model's error rates on a set of clips, or a rival engine's: transcribe, then score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dqw.convert import choose_activations
from dqw.devices import move_to
from dqw.errors import UserError
from dqw.recipe import ACTIVATIONS
from dqw.whisper.audio import SAMPLE_RATE
from dqw.whisper.checkpoint import load_whisper
from dqw.whisper.data import Item
from dqw.whisper.divergence import Divergence
from dqw.whisper.rivals import Rival, open_rival, rival_bytes
from dqw.whisper.scoring import Scores, read_spelling, score
from dqw.whisper.transcribe import Transcript, transcribe

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from dqw.distill.pair import Pair


@dataclass(frozen=True)
class Evaluation:
    """`items` that were scored, which are not damaged; `transcripts` in their order;
    `wall_seconds` covers transcribing alone; `divergence`: from the teacher, where one was given.
    """

    items: Sequence[Item]
    scores: Scores
    transcripts: list[Transcript]
    audio_seconds: float
    wall_seconds: float
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        further = {"kl": self.divergence.to_dict()} if self.divergence else {}
        return {
            **self.scores.to_dict(),
            **further,
            "clips": len(self.transcripts),
            "audio_seconds": round(self.audio_seconds, 2),
            "wall_seconds": round(self.wall_seconds, 2),
        }


def evaluate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    items: Sequence[Item],
    beam_size: int = 1,
    batch_size: int = 8,
    progress: Callable[[float], None] | None = None,
    audio_context: str = "auto",
    damaged: Callable[[Item, UserError], None] | None = None,
) -> Evaluation:
    """Transcribe every item in its language (detected where it has none) and score it.

    Every item needs a text: `load_items(…, need_text=True)`. `progress` gets the seconds of audio
    done. Items without a language are scored in the detected one. `audio_context`: as in
    `transcribe`. `damaged` is called with items whose audio turns out to be so, which are left
    out; None: the UserError is raised. It is, too, where none is left.
    """
    started = time.perf_counter()
    left = _LeftOut(items, damaged)
    transcripts = transcribe(
        model,
        processor,
        [item.audio for item in items],
        language=[item.language for item in items],
        beam_size=beam_size,
        batch_size=batch_size,
        progress=progress,
        audio_context=audio_context,
        damaged=left.out if damaged is not None else None,
    )
    wall = time.perf_counter() - started
    items = left.rest()
    spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None)
    return _scored(items, transcripts, spelling, wall)


def evaluate_rival(
    rival: Rival,
    items: Sequence[Item],
    progress: Callable[[float], None] | None = None,
    damaged: Callable[[Item, UserError], None] | None = None,
) -> Evaluation:
    """``evaluate`` of another package's engine, clip by clip; the same scores.

    Raises UserError with the clip where the engine fails.
    """
    started = time.perf_counter()
    left = _LeftOut(items, damaged)
    transcripts = []
    done = 0.0
    for index, item in enumerate(items):
        try:
            audio = item.load()
        except UserError as error:
            if damaged is None:
                raise
            left.out(index, error)
            continue
        try:
            text, language = rival.hear(audio, item.language)
        except Exception as error:  # each package has exceptions of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{rival.package} failed on {item.id} ({reason}); leave that clip or option out"
            ) from error
        seconds = len(audio) / SAMPLE_RATE
        transcripts.append(Transcript(text, language, seconds))
        done += seconds
        if progress:
            progress(done)
    return _scored(left.rest(), transcripts, rival.spelling, time.perf_counter() - started)


@dataclass(frozen=True)
class Evaluator:
    """`run(items, progress=…)` gives an Evaluation. `package`: whose engine it is; `spelling`:
    whether British spellings are mapped to American ones; `model_bytes`: without the tokenizer,
    None for a model from the hub; `pair`: the model and its teacher, where one was given."""

    run: Callable[..., Evaluation]
    package: str
    spelling: bool
    model_bytes: int | None
    pair: Pair | None = None

    def diverge(
        self,
        found: Evaluation,
        progress: Callable[[int], object] | None = None,
    ) -> Evaluation:
        """`found`, which `run` gave, with the divergence from the teacher."""
        from dqw.whisper.divergence import divergence

        assert self.pair is not None
        languages = [transcript.language for transcript in found.transcripts]
        return replace(found, divergence=divergence(self.pair, found.items, languages, progress))


def open_evaluator(
    model: str,
    engine: str = "dqw",
    beam_size: int = 1,
    batch_size: int = 8,
    normalizer: str | Path | None = None,
    audio_context: str = "auto",
    activations: str = "auto",
    teacher: str | None = None,
    device: str = "cpu",
) -> Evaluator:
    """`model` loaded into dqw or one of the RIVALS, which hear clip by clip.

    `normalizer`: a normalizer.json, or a folder that has one, in the place of the model's own.
    `audio_context`: as in `transcribe`; for dqw alone. `activations`: as in `open_engine`; for dqw
    and a packed model in transformers. `teacher`: a model to take the divergence from; for dqw.
    `device`: as in `move_to`, float32 with a teacher; for dqw. Raises UserError as `load_whisper`,
    `open_rival`, `read_spelling`, `check_models` and `move_to` do.
    """
    if teacher is not None and engine != "dqw":
        raise UserError(
            f"--teacher compares distributions, which are not to be had of {engine}: leave one out."
        )
    pair = None
    given = None if normalizer is None else read_spelling(normalizer)
    run: Callable[..., Evaluation]
    if engine == "dqw":
        whisper, processor = load_whisper(model)
        choose_activations(whisper, activations, device)
        tokenizer: Any = processor.tokenizer
        if given is not None:
            tokenizer.english_spelling_normalizer = given
        spelling = getattr(tokenizer, "english_spelling_normalizer", None)
        run = partial(
            evaluate,
            whisper,
            processor,
            beam_size=beam_size,
            batch_size=batch_size,
            audio_context=audio_context,
        )
        package = "dqw"
        move_to(whisper, device, exact=teacher is not None)
        if teacher is not None:
            pair = _pair(whisper, processor, teacher)
            move_to(pair.teacher, device, exact=True)
    else:
        if device != "cpu":
            raise UserError(f"--device is for dqw's own engine, not for {engine}: leave one out.")
        kind = "" if activations == "auto" else activations
        if kind not in ("", *ACTIVATIONS):
            raise UserError(f"--activations is {kind!r}: choose auto, float or int8.")
        if kind and engine != "transformers":
            raise UserError(f"--activations is for packed models, which {engine} does not read.")
        rival = open_rival(engine, model, torch.get_num_threads(), beam_size, kind)
        if given is not None:
            rival.spelling = given
        spelling, package = rival.spelling, rival.package
        run = partial(evaluate_rival, rival)
    size = rival_bytes(model) if Path(model).exists() else None
    return Evaluator(run, package, bool(spelling), size, pair)


def _pair(student: Any, processor: Any, teacher: str) -> Pair:
    from dqw.distill.pair import Pair, check_models

    whisper, teacher_processor = load_whisper(teacher)
    check_models(student, whisper, teacher_processor)
    return Pair(whisper, student, processor, teacher_processor)


class _LeftOut:
    """Which items are damaged."""

    def __init__(
        self, items: Sequence[Item], say: Callable[[Item, UserError], None] | None
    ) -> None:
        self.items, self.say = items, say
        self.faults: dict[int, UserError] = {}

    def out(self, index: int, error: UserError) -> None:
        self.faults[index] = error
        if self.say is not None:
            self.say(self.items[index], error)

    def rest(self) -> list[Item]:
        """The others. Raises the first fault where there are none."""
        found = [item for index, item in enumerate(self.items) if index not in self.faults]
        if self.faults and not found:
            raise next(iter(self.faults.values()))
        return found


def _scored(
    items: Sequence[Item],
    transcripts: list[Transcript],
    spelling: dict[str, str] | None,
    wall: float,
) -> Evaluation:
    scores = score(
        [item.text or "" for item in items],
        [transcript.text for transcript in transcripts],
        [item.language or transcript.language for item, transcript in zip(items, transcripts)],
        spelling,
    )
    return Evaluation(items, scores, transcripts, sum(t.seconds for t in transcripts), wall)
