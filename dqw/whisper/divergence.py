"""How far a model's next-token distributions are from its teacher's: it sees what words do not.

KL(teacher ‖ model) in nats a token, on the reference texts of clips (teacher forcing), the clips
weighed by their tokens; a 95 % interval over clips (``dqw.whisper.stats``). Float32 throughout, and
with the activations that the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqw.distill.pair import Pair
    from dqw.whisper.data import Item


@dataclass(frozen=True)
class Divergence:
    """Mean KL with its interval, in nats a token, over ``tokens`` of ``clips``; of one clip the
    interval is NaN."""

    kl: float
    low: float
    high: float
    tokens: int
    clips: int

    def to_dict(self) -> dict[str, Any]:
        ends = round(self.low, 6), round(self.high, 6)
        interval = list(ends) if self.clips > 1 else None  # JSON has no NaN
        return {"nats_per_token": round(self.kl, 6), "interval": interval, "tokens": self.tokens,
                "clips": self.clips}  # fmt: skip


def divergence(
    pair: Pair,
    items: Sequence[Item],
    languages: Sequence[str | None],
    progress: Callable[[int], object] | None = None,
) -> Divergence:
    """``pair.student`` against ``pair.teacher``.

    items: clips with text. languages: of each, where the item names none. Clips longer than a
    window are left out. progress gets the number of clips done. Raises UserError where no clip is
    left or a clip's language is not known.
    """
    from dqw.probe import Probe
    from dqw.recipe import Recipe
    from dqw.speech import clip_batches
    from dqw.whisper.stats import rate

    named = [
        replace(item, language=item.language or language)
        for item, language in zip(items, languages, strict=True)
    ]
    rows = []
    for batch in clip_batches(named, Recipe(), pair, lambda words: None):
        # One clip after the other: the distributions take 200 kB a token of base.
        rows += Probe(pair.teacher, [batch]).by_batch(pair.student)
        if progress is not None:
            progress(len(rows))
    found = rate([{"setting": "", "kl": rows}], "KL")
    assert found is not None
    return Divergence(max(found.value, 0.0), *found.interval, found.units, len(rows))
