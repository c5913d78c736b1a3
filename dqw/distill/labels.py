"""Texts for audio that has none: the teacher writes them, once.

On a CPU a copy of the teacher in 8 bits writes them, on the native networks, the encoder with int8
activations: 110 clips take whisper-base 38 to 46 s instead of 167, two cores of a Zen 4; of their
2814 words 100 are not the float model's, most of them names and punctuation. 99 are not where the
encoder's activations are floats, 138 where the decoder's are int8. On a GPU the float model does,
in CUDA graphs.

Labels are kept as JSON Lines, one clip a line. A run that was killed goes on with what is there.
What another teacher wrote, or the same in another language, is written anew. Empty transcripts and
loops are recorded as such and not learned from.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration

import dqw.ops  # noqa: F401  loads the library
from dqw.convert import packed_copy, quant_modules, set_activations
from dqw.digest import weights_digest
from dqw.distill.data import SpeechItem
from dqw.errors import UserError
from dqw.recipe import QuantConfig, Recipe
from dqw.rows import append_rows, read_rows
from dqw.whisper.transcribe import transcribe

# A transcript that compresses further than this repeats itself (Whisper's own threshold).
COMPRESSION_LIMIT = 2.4


def is_loop(text: str) -> bool:
    """Whether `text` repeats itself as a decoder in a loop does."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) > COMPRESSION_LIMIT


def write_labels(
    teacher: Any,
    processor: Any,
    items: Sequence[SpeechItem],
    path: Path,
    *,
    language: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    unread: Callable[[SpeechItem, UserError], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Greedy transcripts of `items` by `teacher`, from `path` where it has them.

    Returns id → {"text", "language", "fault", "asked", "by"}; `fault` is "" for a label to learn
    from, else `empty` or `loop`; `asked`: the language it was to be written in; `by`: a digest of
    the teacher. A clip without a language, where `language` gives none, gets the one that the
    teacher hears. `progress` is called with (done, total), `unread` with clips whose audio cannot
    be read and why, which get no label; without it the UserError is raised.
    """
    labels, by = read_labels(path), weights_digest(teacher)

    def known_already(item: SpeechItem) -> bool:
        label = labels.get(item.id, {})
        same = label.get("by", by) == by  # an earlier version noted neither
        return "text" in label and same and label.get("asked", asked(item)) == asked(item)

    def asked(item: SpeechItem) -> str:
        return item.language or language or ""

    todo = [item for item in items if not known_already(item)]
    writer = _writer(teacher) if todo else teacher
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clips of one language go together, so a batch shares its prefix; the sort is stable.
    known = [(asked(item), item) for item in todo]
    known.sort(key=lambda pair: pair[0])
    done = len(items) - len(todo)
    while known:
        code = known[0][0]
        batch = [item for spoken, item in known[:batch_size] if spoken == code]
        known = known[len(batch) :]
        heard, waves = _loaded(batch, unread)
        for item, label in zip(heard, _transcribe(writer, processor, waves, code), strict=True):
            labels[item.id] = {**label, "asked": code, "by": by}
        append_rows(path, [{"id": item.id, **labels[item.id]} for item in heard])
        done += len(batch)
        if progress is not None:
            progress(done, len(items))
    return labels


def _loaded(
    items: list[SpeechItem], unread: Callable[[SpeechItem, UserError], object] | None
) -> tuple[list[SpeechItem], list[np.ndarray]]:
    """Those of ``items`` whose audio can be read, and their samples."""
    heard, waves = [], []
    for item in items:
        try:
            waves.append(item.load())
            heard.append(item)
        except UserError as error:
            if unread is None:
                raise
            unread(item, error)
    return heard, waves


def _writer(teacher: Any) -> Any:
    """What writes the texts: 8 bits of ``teacher`` where the native networks take them."""
    from dqw.whisper.fast_model import native_decoder, speed_up

    plain = type(teacher) is WhisperForConditionalGeneration and teacher.device.type == "cpu"
    if not plain or quant_modules(teacher) or not hasattr(torch.ops.dqw_cpu, "decoder_step"):
        return teacher
    if teacher.proj_out.weight is not teacher.get_input_embeddings().weight:
        return teacher  # its vocabulary cannot be packed
    bits = QuantConfig(bits=8, grid="uniform", group_size=0, embedding_bits=8, conv_bits=8)
    copy: Any = packed_copy(teacher, Recipe(quant=bits)).eval()
    set_activations(copy.model.encoder, "int8")
    speed_up(copy)
    return teacher if native_decoder(copy) is None else copy


def read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """The labels of a file that `write_labels` wrote."""
    what = "a teacher label: delete the file, and the teacher writes it again."
    return {row.pop("id"): row for row in read_rows(path, ("id",), what)}


def _transcribe(
    teacher: Any, processor: Any, waves: list[np.ndarray], code: str
) -> list[dict[str, Any]]:
    if not waves:
        return []
    found = transcribe(teacher, processor, waves, code or None, batch_size=len(waves))
    made = []
    for transcript in found:
        loops = transcript.looped or is_loop(transcript.text)
        fault = "" if transcript.text else "empty"
        made.append(
            {
                "text": transcript.text,
                "language": transcript.language,
                "fault": "loop" if loops else fault,
            }
        )
    return made
