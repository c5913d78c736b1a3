"""Texts for audio that has none: the teacher writes them, once.

Labels are kept as JSON Lines, one clip a line, each line flushed to disk as it is made. A run that
was killed goes on with what is there; a line cut off by the kill is dropped. Empty transcripts and
loops are recorded as such and not learned from.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dqw.distill.data import SAMPLE_RATE, SpeechItem
from dqw.errors import UserError

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
    multilingual: bool,
    language: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Greedy transcripts of `items` by `teacher`, from `path` where it has them.

    Returns id → {"text", "language", "fault"}; `fault` is "" for a label to learn from, else
    `empty`, `loop` or `unfinished`. A clip without a language, where `language` gives none, gets
    the one that the teacher hears. `progress` is called with (done, total).
    """
    labels = read_labels(path)
    todo = [item for item in items if item.id not in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clips of one language go together, so a batch shares its prefix.
    known = [(item.language or language or "", item) for item in todo]
    known.sort(key=lambda pair: pair[0])
    done = len(items) - len(todo)
    with open(path, "a", encoding="utf-8") as file:
        while known:
            code = known[0][0]
            batch = [item for spoken, item in known[:batch_size] if spoken == code]
            known = known[len(batch) :]
            for item, label in zip(
                batch, _transcribe(teacher, processor, batch, code, multilingual), strict=True
            ):
                labels[item.id] = label
                file.write(json.dumps({"id": item.id, **label}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(batch)
            if progress is not None:
                progress(done, len(items))
    return labels


def read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """The labels of a file that `write_labels` wrote; a torn last line is cut off the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    labels = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            labels[row.pop("id")] = row
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{path} row {number} is not a teacher label: delete the file, and the teacher "
                "writes it again."
            ) from None
    return labels


@torch.no_grad()
def _transcribe(
    teacher: Any, processor: Any, items: list[SpeechItem], code: str, multilingual: bool
) -> list[dict[str, Any]]:
    device, dtype = teacher.device, teacher.dtype
    waves = [item.load() for item in items]
    features = processor.feature_extractor(
        waves, sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features.to(device, dtype)
    options: dict[str, Any] = {}
    codes = [code or None] * len(items)
    if multilingual:
        if not code:
            heard = teacher.detect_language(input_features=features)
            names = processor.tokenizer.convert_ids_to_tokens(heard.tolist())
            codes = [name.strip("<|>") for name in names]
        options = {"language": codes if len(set(codes)) > 1 else codes[0], "task": "transcribe"}
    # The decoder has room for this many tokens after a prefix of at most four.
    room = teacher.config.max_target_positions - 4
    tokens = teacher.generate(
        features,
        num_beams=1,
        do_sample=False,
        return_timestamps=False,
        max_new_tokens=room,
        **options,
    )
    made = []
    end = processor.tokenizer.eos_token_id
    for row, spoken in zip(tokens.tolist(), codes, strict=True):
        text = processor.tokenizer.decode(row, skip_special_tokens=True).strip()
        fault = ""
        if not text:
            fault = "empty"
        elif is_loop(text):
            fault = "loop"
        elif len(row) >= room and end not in row:
            fault = "unfinished"
        made.append({"text": text, "language": spoken, "fault": fault})
    return made
