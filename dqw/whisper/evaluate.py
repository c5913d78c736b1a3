"""A model's error rates on a set of clips: transcribe, then score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqw.whisper.data import Item
from dqw.whisper.scoring import Scores, score
from dqw.whisper.transcribe import Transcript, transcribe

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


@dataclass(frozen=True)
class Evaluation:
    """`transcripts` in the order of the items; `wall_seconds` covers transcribing alone."""

    scores: Scores
    transcripts: list[Transcript]
    audio_seconds: float
    wall_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.scores.to_dict(),
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
) -> Evaluation:
    """Transcribe every item in its language (detected where it has none) and score it.

    Every item needs a text: `load_items(…, need_text=True)`. `progress` gets the seconds of audio
    done. Items without a language are scored in the detected one. `audio_context`: as in
    `transcribe`.
    """
    started = time.perf_counter()
    transcripts = transcribe(
        model,
        processor,
        [item.audio for item in items],
        language=[item.language for item in items],
        beam_size=beam_size,
        batch_size=batch_size,
        progress=progress,
        audio_context=audio_context,
    )
    wall = time.perf_counter() - started
    scores = score(
        [item.text or "" for item in items],
        [transcript.text for transcript in transcripts],
        [item.language or transcript.language for item, transcript in zip(items, transcripts)],
        getattr(processor.tokenizer, "english_spelling_normalizer", None),
    )
    return Evaluation(scores, transcripts, sum(t.seconds for t in transcripts), wall)
