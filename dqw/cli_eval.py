"""``dqw eval``: error rates of a model, or of another engine, and its distance from a teacher."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dqw.bars import err, progress_bar
from dqw.cli import Activations, BatchSize, BeamSize, Context, Device, app, audio_progress
from dqw.errors import UserError


@app.command(
    "eval", epilog="Example: dqw eval --model runs/demo/student --data speech/manifest.jsonl"
)
def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="As for transcribe; with --engine what that engine reads: a ggml .bin file, a "
            "CTranslate2 folder, an OpenVINO folder."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="manifest.jsonl, audio folder, or Hugging Face dataset name:config:split."
        ),
    ],
    language: Annotated[
        str | None,
        typer.Option(help="Score only this language; clips that name none are taken to be in it."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score at most this many clips.")] = None,
    beam_size: BeamSize = 1,
    batch_size: BatchSize = 8,
    audio_context: Context = "auto",
    activations: Activations = "auto",
    device: Device = "cpu",
    engine: Annotated[
        str,
        typer.Option(
            help="dqw, or a rival, clip by clip: whisper.cpp, faster-whisper, openvino, "
            "transformers."
        ),
    ] = "dqw",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A float model: its distance from the packed one is measured as well, KL of the "
            "next-token distributions."
        ),
    ] = None,
    normalizer: Annotated[
        Path | None,
        typer.Option(help="normalizer.json (English spellings) where the model has none."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the figures to this JSON file."),
    ] = None,
    save_transcripts: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Write reference and transcript of each clip, JSON lines."
        ),
    ] = None,
) -> None:
    """Measure word and character error rates on transcribed audio."""
    import json

    from dqw.whisper.data import Item, load_items
    from dqw.whisper.files import check_writable, write_atomic

    for option, path in (("--json", json_file), ("--save-transcripts", save_transcripts)):
        if path is not None:
            check_writable(path, option)
    items = load_items(data, language, need_text=True, limit=limit, say=_say)

    from dqw.whisper.evaluate import open_evaluator
    from dqw.whisper.tables import print_scores

    with err.status(f"loading {escape(model)}"):
        evaluator = open_evaluator(
            model,
            engine,
            beam_size,
            batch_size,
            normalizer,
            audio_context,
            activations,
            teacher,
            device,
        )
    size, spelling = evaluator.model_bytes, evaluator.spelling
    with audio_progress(sum(item.seconds or 0 for item in items)) as advance:
        done = 0.0

        def step(seconds: float) -> None:
            nonlocal done
            advance(seconds - done)
            done = seconds

        def leave_out(item: Item, error: UserError) -> None:
            err.print(f"{error}; the others go on", style="yellow", markup=False, soft_wrap=True)

        result = evaluator.run(items, progress=step, damaged=leave_out)
    if teacher is not None:
        with progress_bar("KL from the teacher", len(result.items), "clips") as clip:
            try:
                result = evaluator.diverge(result, lambda done: clip())
            except UserError as error:  # the rates are there and stay
                err.print(f"KL not measured: {error}", style="yellow", markup=False, soft_wrap=True)
    print_scores(result, spelling, size)
    if save_transcripts:
        rows = (
            {"id": item.id, "language": item.language or found.language, "reference": item.text,
             "transcript": found.text}
            for item, found in zip(result.items, result.transcripts, strict=True)
        )  # fmt: skip
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(save_transcripts, lines)
    if json_file:
        settings = {"engine": engine, "model": model, "model_bytes": size, "data": data,
                    "language": language, "limit": limit, "beam_size": beam_size,
                    "batch_size": batch_size if engine == "dqw" else 1,
                    "audio_context": audio_context if engine == "dqw" else "full",
                    "activations": activations, "device": device, "teacher": teacher,
                    "english_spelling_map": spelling}  # fmt: skip
        figures = {**settings, **_machine(evaluator.package), **result.to_dict()}
        write_atomic(json_file, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    damaged = len(items) - len(result.items)
    if damaged:
        raise UserError(f"{damaged} clips are damaged, and not in these figures")


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def _machine(package: str) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    from dqw import __version__

    others = dict.fromkeys(("torch", "transformers", package))
    others.pop("dqw", None)  # a checkout that was not installed has no metadata
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"dqw": __version__, **{name: version(name) for name in others}},
    }
