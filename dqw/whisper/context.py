"""Dynamic audio context: a clip is heard with a short margin, not padded to Whisper's 30 s.

The encoder's cost then follows the length of the clip. Whisper itself has only ever heard padded
audio: where the silence is missing it says more words wrong, or one without end. A student that
learned to do without (`distill.audio_context = "dynamic"`) has `audio_context` in its config.json,
and no other model is heard this way.

Positions are the encoder's, of 20 ms; a position takes two frames of the features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from dqw.errors import UserError

CHOICES = ("auto", "full")
"""auto: short where the model learned it; full: always the whole window."""

_PER_SECOND = 50


@dataclass(frozen=True)
class AudioContext:
    """How much is heard of a clip: its own length and `margin_seconds`, at least `min_seconds`,
    rounded up to a multiple of `step_seconds` and cut at the window.

    The few lengths that are left depend on the clip alone, so that clips of one length share a
    batch and no text depends on its neighbours.
    """

    min_seconds: float = 2.0
    margin_seconds: float = 1.0
    step_seconds: float = 2.0

    @classmethod
    def of(cls, config: Any) -> AudioContext | None:
        """What a model's config (an object, or config.json) says; None: the whole window.

        Raises UserError for a value that this dqw does not know.
        """
        name = "audio_context"
        stored = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if stored is None:
            return None
        names = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names or not _lengths(stored):
            raise UserError(
                f"config.json's audio_context is {stored!r}, and this dqw knows "
                f"{', '.join(sorted(names))}: install the dqw that wrote it, or remove the entry "
                "to hear the whole window."
            )
        return cls(**stored)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def positions(self, seconds: float, window: int) -> int:
        """Positions of the context of a clip of so many seconds; `window`: those of 30 s."""
        step = max(round(self.step_seconds * _PER_SECOND), 1)
        return min(-(-self._least(seconds) // step) * step, window)

    def drawn(self, seconds: float, window: int, dice: float) -> int:
        """The same for training: instead of rounding up, `dice` (0 to 1) of a step is added."""
        more = math.floor(dice * self.step_seconds * _PER_SECOND)
        return min(self._least(seconds) + more, window)

    def _least(self, seconds: float) -> int:
        wanted = max(seconds + self.margin_seconds, self.min_seconds)
        return max(math.ceil(round(wanted * _PER_SECOND, 3)), 1)

    def __str__(self) -> str:
        return (
            f"the clip and {self.margin_seconds:g} s, at least {self.min_seconds:g} s, in steps of "
            f"{self.step_seconds:g} s"
        )


def _lengths(stored: dict[str, Any]) -> bool:
    numbers = [value for value in stored.values() if isinstance(value, int | float)]
    return len(numbers) == len(stored) and all(0 <= n <= 30 for n in numbers)


@contextmanager
def narrowed(encoder: Any, positions: int) -> Iterator[None]:
    """Inside, transformers' `encoder` takes features of 2 · `positions` frames, at most its own.

    It reads the length it insists on from its config, and looks up every position: it gets a config
    of its own meanwhile, and the first positions alone. Not for two threads at once.
    """
    config = encoder.config
    if positions == config.max_source_positions:
        yield
        return
    encoder.config = copy.copy(config)
    encoder.config.max_source_positions = positions
    first = encoder.embed_positions.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0][:positions],)
    )
    try:
        yield
    finally:
        first.remove()
        encoder.config = config
