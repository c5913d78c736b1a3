"""What was heard: a text and its segments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TICK = 0.02  # seconds a timestamp token stands for


@dataclass(frozen=True)
class Segment:
    """A stretch of speech; start and end in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """`language`: the code used, given or detected; None for silence and unknown. `segments` are
    empty unless timestamps were asked for or the audio is longer than 30 s. `looped`: the decoder
    repeated itself at the end and was stopped; one copy is left (clips of at most 30 s)."""

    text: str
    language: str | None
    seconds: float
    segments: list[Segment] = field(default_factory=list)
    looped: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def segment_of(start: float, end: float, seconds: float, text: str) -> Segment:
    """A segment within a clip of so many seconds, at least a tick long: a model may hear speech
    behind the end, and players take no cue of no length."""
    start = min(start, max(seconds - TICK, 0.0))
    end = min(max(end, start + TICK), seconds)
    return Segment(round(start, 2), round(end, 2), text)
