"""``dqw compress`` and ``dqw demo``: options in, a recipe and a job out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dqw.cli import app, err
from dqw.errors import UserError

_COMPRESS_EXAMPLES = (
    "Examples: dqw compress --teacher openai/whisper-base --data speech/ --budget 33MiB --out "
    "base-33; distilled: dqw compress --teacher openai/whisper-small --student "
    "openai/whisper-base --data speech/manifest.jsonl --language ja --out base-ja-4bit"
)


@app.command(epilog=_COMPRESS_EXAMPLES)
def compress(
    teacher: Annotated[
        str, typer.Option(help="Hub id, Hugging Face folder or faster-whisper folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    student: Annotated[
        str | None, typer.Option(help="The same; left out: a copy of the teacher.")
    ] = None,
    student_layers: Annotated[
        str | None,
        typer.Option(
            help="Cut the student from the teacher: encoder,decoder layers, like 4,4. With --data "
            "they take over what the others did."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="manifest.jsonl, audio folder, or Hugging Face dataset name:config:split; "
            "audio without text is labelled by the teacher."
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(help="Only clips in this language; clips that name none are taken for it."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help='A TOML file (base = "default" in it: what it does not say is as there), or one '
            "that ships: default (the student is a copy of the teacher: "
            "calibrated, trained only with --epochs or --steps), joint (any other student), "
            "dynamic (short clips are not padded), decoder, paper-base, paper-tiny."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of Linear weights, 2 to 8; where the recipe shares bytes out (default, with "
            "--data), what they take in the folder on average."
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="apot, pot, uniform; to 5 bits lloyd, stretched or learned (each layer's own "
            "levels); or magnitudes, as in 1,3."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="16, 32, 64, 128 columns a scale (at the least, where bytes are shared out); 0: "
            "one scale a row. Not for layers that a recipe's overrides name."
        ),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the embedding and output projection; 0: float, and slow."),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="float, or int8: faster on a CPU, learned with.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; 0: by epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the weights.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and augmentation.")] = None,
    ptq_only: Annotated[
        bool,
        typer.Option("--ptq-only", help="Quantize without training; --data makes it better."),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the folder, like 32MiB: bits or steps are chosen layer by layer."
        ),
    ] = None,
    calibration_clips: Annotated[
        int | None, typer.Option(help="Windows of speech that rounding errors are measured on.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the unfinished run in OUT.run, where there is one."
        ),
    ] = False,
) -> None:
    """Make a Whisper small: distil a teacher into a quantized student, and write a folder."""
    from dqw.budget import parse_bytes
    from dqw.compress import Job, same_model
    from dqw.compress import compress as run
    from dqw.grids import check_grid
    from dqw.heap import keep_freed_memory
    from dqw.processes import leave
    from dqw.whisper.student import parse_layers

    # What default does is not enough for a student that is no copy.
    is_copy = (student is None or same_model(student, teacher)) and student_layers is None
    chosen = load_recipe(
        recipe or ("default" if is_copy else "joint"),
        quant={
            "bits": bits,
            "grid": grid,
            "group_size": group_size,
            "embedding_bits": embedding_bits,
            "activations": activations,
        },
        distill={"calibration_clips": calibration_clips},
        train={
            "steps": steps,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "language": language,
        },
    )
    job = Job(
        teacher=teacher,
        out=out,
        student=student,
        data=data,
        student_layers=None if student_layers is None else parse_layers(student_layers),
        language=language,
        ptq_only=ptq_only,
        resume=resume,
        budget=None if budget is None else parse_bytes(budget),
    )
    amount, manner = (
        {"--steps": steps, "--epochs": epochs},
        {"--batch-size": batch_size, "--lr": lr},
    )
    given = {"--bits": bits, "--embedding-bits": embedding_bits}
    idle = [name for name, value in given.items() if value]  # 0: the embedding stays float
    if budget and idle:
        _say_idle("--budget chooses each layer's bits", idle)
    _check_training(amount, manner, ptq_only, chosen.train.wanted)
    if grid is not None and (data is None or chosen.quant.allocate == "none"):
        check_grid(grid, chosen.quant.bits)  # none of the layers would be on it
    deaf = {
        "--calibration-clips": calibration_clips, "--seed": seed, "--language": language
    }  # fmt: skip
    idle = [name for name, value in deaf.items() if value is not None]
    if data is None and ptq_only and idle:
        _say_idle("without --data nothing is heard", idle)
    if data is not None and calibration_clips == 0 and (ptq_only or not chosen.train.wanted):
        raise UserError(
            "--calibration-clips is 0, and --data without training is for calibration alone: leave "
            "one of them out."
        )
    keep_freed_memory()
    run(job, chosen, lambda line: err.print(line, markup=False))
    leave()


@app.command(epilog="Example: dqw demo --out runs/demo")
def demo(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of everything the demo makes.")
    ] = Path("runs/demo"),
) -> None:
    """Compress whisper-base on this machine and show what it costs, in some minutes."""
    from rich.console import Console

    from dqw.demo import run_demo
    from dqw.heap import keep_freed_memory

    keep_freed_memory()
    run_demo(out, Console(highlight=False))


def _say_idle(why: str, options: list[str]) -> None:
    words = f"{why}: {' and '.join(options)} will do nothing"
    err.print(words, style="yellow", markup=False, soft_wrap=True)


def _check_training(
    amount: dict[str, float | None], manner: dict[str, float | None], ptq_only: bool, wanted: bool
) -> None:
    """Options of training where nothing trains: UserError for how much, a word for how."""
    asked = [name for name, value in amount.items() if value]
    if ptq_only and asked:
        raise UserError(f"--ptq-only trains nothing: leave out it or {' and '.join(asked)}.")
    idle = [name for name, value in manner.items() if value is not None]
    if idle and (ptq_only or not wanted):
        _say_idle("nothing is trained without --epochs or --steps", idle)


def load_recipe(name: str, **overrides: dict[str, Any]) -> Any:
    """The recipe ``name`` (a file, or one that ships) with the options that were given.

    The embedding follows ``bits`` where the recipe gives both the same, unless ``embedding_bits``
    says otherwise.
    """
    from dqw.recipe import Recipe

    recipe = Recipe.named(name)
    data = recipe.to_dict()
    on_grid = overrides.get("quant", {})
    wants_grid = any(on_grid.get(key) is not None for key in ("grid", "group_size"))
    if wants_grid and recipe.quant.allocate == "steps":  # which are of the uniform grid, ungrouped
        data["quant"]["allocate"] = "bits"
    together = recipe.quant.embedding_bits == recipe.quant.bits
    for table, values in overrides.items():
        given = {key: value for key, value in values.items() if value is not None}
        data[table] |= given
        if table == "quant" and together and "bits" in given and "embedding_bits" not in given:
            data["quant"]["embedding_bits"] = given["bits"]
        if table == "train" and "epochs" in given and "steps" not in given:
            data["train"]["steps"] = 0
    return Recipe.from_dict(data, where="the options")
