"""``dqw study``: options in, a request out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dqw.cli import app, err


@app.command(
    epilog="Example: dqw study grids --model openai/whisper-base --data train/manifest.jsonl "
    "--eval-data dev/manifest.jsonl --out runs/grids"
)
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="paper, matching, guidance, ratio, grids, ablation, languages or sensitivity."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of cells and page; a rerun goes on there. \\[runs/study-NAME]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "--teacher", help="The float model; left out: whisper-base."),
    ] = None,
    student: Annotated[str | None, typer.Option(help="As of dqw compress.")] = None,
    student_layers: Annotated[
        str | None, typer.Option(help="Cut the student from the model, like 6,4.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Speech to learn and calibrate from; left out: the demo's.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Other speech, with texts, to measure on.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Only clips in this language.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="In place of the study's own; as of dqw compress.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each setting that trains.")] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of a cell. [60, quick: 2]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Measure on at most this many clips, evenly spaced.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help='Settings whose name holds this, like "per row"; may be repeated.'),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few settings, clips, steps and one seed: minutes.")
    ] = False,
) -> None:
    """Answer a question about bits, grids, matching or guidance: a CSV, a plot and a page."""
    from dqw.heap import keep_freed_memory
    from dqw.study.runner import Request, find_study, run_study
    from dqw.whisper.student import parse_layers

    find_study(name)
    keep_freed_memory()
    request = Request(
        study=name,
        out=out or Path("runs") / f"study-{name}",
        model=model,
        student=student,
        student_layers=parse_layers(student_layers) if student_layers else None,
        data=data,
        eval_data=eval_data,
        language=language,
        recipe=recipe,
        seeds=seeds,
        steps=steps,
        limit=limit,
        only=tuple(only or ()),
        quick=quick,
    )
    run_study(request, lambda line: err.print(line, markup=False))
