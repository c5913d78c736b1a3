"""Runs the cells of a study that are not there yet, and writes its pages.

Several processes may run one study: each takes cells that no other has, the last writes the pages.

OUT/
  study.json             what is measured on what; a rerun with other settings is refused
  cells/NAME.SEED.json   one finished cell, whole or not there; .lock beside it: being measured
  runs/                  logs of training cells, and checkpoints of the one that runs
  NAME.csv NAME.svg NAME.html
"""

from __future__ import annotations

import hashlib
import json
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqw.digest import weights_digest
from dqw.errors import UserError
from dqw.recipe import Recipe
from dqw.speech import spread, spread_evenly
from dqw.study.cells import (
    cell_path,
    cells_of,
    check_cells,
    forget_states,
    measuring,
    read_cells,
    run_cells,
)
from dqw.study.lab import KL_CLIPS, Lab, with_changes
from dqw.study.table import STUDIES, Scope, Setting, Study
from dqw.whisper.data import Item, load_items
from dqw.whisper.files import write_atomic

DEMO = Path("runs/demo")  # whose weights and speech are the default
STEPS, QUICK_STEPS = 60, 2
QUICK_CLIPS = 6
QUICK_WINDOWS = 8  # of calibration speech


@dataclass
class Request:
    """One call of `dqw study`: names as the user gave them.

    model: the teacher, float; None: whisper-base from the Python package index. student,
    student_layers: as for `dqw compress`. data, eval_data: speech to learn (or calibrate) from and
    to measure on; None: the demo's clips. recipe: a TOML file or one that ships, in place of the
    study's own. limit: measure on at most this many clips. only: settings whose name holds one
    of these texts, and the study's baselines; none: all. steps: of every training cell; None: 60,
    or 2 with ``quick``.
    """

    study: str
    out: Path
    model: str | None = None
    student: str | None = None
    student_layers: tuple[int, int] | None = None
    data: str | None = None
    eval_data: str | None = None
    language: str | None = None
    recipe: str | None = None
    seeds: int = 3
    steps: int | None = None
    limit: int | None = None
    only: tuple[str, ...] = ()
    quick: bool = False


def run_study(request: Request, say: Callable[[str], None] = print) -> Path | None:
    """Measure what is missing and write the page, whose path is returned; None: the other processes
    that run this study are still measuring, and the last of them will write it.

    Raises UserError before any long work where it can be known: an unknown study or recipe, models
    that do not fit, no data, a folder of other settings.
    """
    from dqw.study.report import write_report

    study = find_study(request.study)
    for name, value in (
        ("seeds", request.seeds),
        ("steps", request.steps),
        ("limit", request.limit),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more.")
    check_folder(request.out)
    recipe = Recipe.named(request.recipe or study.recipe)
    lab = open_lab(study, request, recipe, say)
    everything = study.settings(Scope(lab.student, lab.recipe, request.quick, lab.packed))
    settings = chosen(everything, request.only)
    about = describe(study, request, lab)
    claim(request.out, about, {"KL on": _ids(spread(lab.test, KL_CLIPS))})
    seeds = 1 if request.quick else request.seeds
    cells = cells_of(settings, seeds)
    check_cells(request.out, cells)
    run_cells(lab, cells, say)
    every = all(cell_path(request.out, *cell).exists() for cell in cells_of(everything, seeds))
    if every and not measuring(request.out):
        forget_states(lab.states)
    left = [cell for cell in cells if not cell_path(request.out, *cell).exists()]
    if left:
        say(
            f"{len(left)} of {len(cells)} cells are another process's: if it has other settings "
            "than this one, start this command again for its page"
        )
        return None
    found = read_cells(request.out, cells)
    page = write_report(request.out, study, settings, found, about, command(request))
    say(f"wrote {page}")
    return page


def command(request: Request) -> str:
    """The command line of ``request``, for the page."""
    given = {
        "model": request.model,
        "student": request.student,
        "student-layers": ",".join(map(str, request.student_layers or ())),
        "data": request.data,
        "eval-data": request.eval_data,
        "language": request.language,
        "recipe": request.recipe,
        "seeds": "" if request.seeds == 3 else request.seeds,
        "steps": request.steps,
        "limit": request.limit,
    }
    words = [f"--{name} {value}" for name, value in given.items() if value]
    words += [f"--only {shlex.quote(text)}" for text in request.only]
    return " ".join(["dqw study", request.study, *words, *(["--quick"] if request.quick else [])])


def chosen(settings: list[Setting], only: Sequence[str]) -> list[Setting]:
    """Those whose name holds one of the texts ``only``, and baselines; all where it is empty.
    Raises UserError for a text that no name holds."""
    if not only:
        return settings
    for text in only:
        if not any(text in s.name for s in settings if not s.baseline):
            some = "; ".join(s.name for s in settings if not s.baseline)
            some = textwrap.shorten(some, 300)
            raise UserError(
                f"--only {text!r} is in no setting's name: give a part of one, of {some}."
            )
    return [s for s in settings if s.baseline or any(text in s.name for text in only)]


def find_study(name: str) -> Study:
    if name not in STUDIES:
        raise UserError(f"study {name!r} is not known: choose one of {', '.join(STUDIES)}.")
    return STUDIES[name]


def open_lab(study: Study, request: Request, recipe: Recipe, say: Callable[[str], None]) -> Lab:
    """Load the models and list the speech."""
    from dqw.compress import Job, load_models
    from dqw.convert import quant_modules
    from dqw.distill.pair import check_models
    from dqw.whisper.checkpoint import load_whisper

    train, test = speech(study, request, say)
    model = request.model
    if model is None:
        from dqw.whisper.samples import fetch_base_model

        model = str(fetch_base_model(DEMO / "whisper-base", say))
    packed = None
    if study.name == "languages" and request.student:
        say(f"student: {request.student}")
        packed = load_whisper(request.student)
        if not quant_modules(packed[0]):
            packed = None
    student = None if packed else request.student
    pair = load_models(
        Job(model, request.out, student=student, student_layers=request.student_layers), say
    )
    if packed:
        pair = pair._replace(student=packed[0], processor=packed[1])
        check_models(pair.student, pair.teacher, pair.teacher_processor)
    elif study.cut and not (request.student or request.student_layers):
        from dqw.whisper.student import cut_student

        config = pair.teacher.config
        kept = config.encoder_layers, max(config.decoder_layers * 2 // 3, 1)
        pair = pair._replace(student=cut_student(pair.teacher, *kept))
        say(f"student: the teacher's encoder and {kept[1]} of its decoder layers")
    test = spoken(test, pair.student)
    recipe = with_changes(recipe, study.base)
    if request.quick:
        quick = {"train": {"batch_size": 1}, "distill": {"calibration_clips": QUICK_WINDOWS}}
        recipe = with_changes(recipe, quick)
    if request.language:
        recipe = with_changes(recipe, {"train": {"language": request.language}})
    steps = request.steps or (QUICK_STEPS if request.quick else STEPS)
    return Lab(pair, train, test, recipe, request.out, steps, say)


def speech(
    study: Study, request: Request, say: Callable[[str], None]
) -> tuple[list[Item], list[Item]]:
    """Clips to learn from and clips to measure on."""
    needed = study.calibrates and not (study.name == "languages" and request.student)
    limit = request.limit or (QUICK_CLIPS if request.quick else None)
    if request.data is None and request.eval_data is None:
        from dqw.demo import split
        from dqw.whisper.samples import fetch_speech_samples

        manifest = fetch_speech_samples(DEMO / "speech", say)
        train, test = split(load_items(manifest, request.language))
        if not train or not test:
            raise UserError(
                f"the demo's speech has no '{request.language}' clips to learn from and to measure "
                "on: give --data and --eval-data."
            )
        return train, spread_evenly(test, limit)
    if request.eval_data is None:
        raise UserError(
            "--eval-data is missing: give transcribed clips to measure on, others than --data's."
        )
    if request.data is None and needed:
        raise UserError("--data is missing: give speech to learn or calibrate from.")
    train = []
    if request.data is not None and study.calibrates:
        train = load_items(request.data, request.language, say=say)
    test = load_items(request.eval_data, request.language, need_text=True, say=say)
    learned = {path for item in train if (path := _path(item)) is not None}
    shared = [item.id for item in test if _path(item) in learned]
    if shared:
        say(
            f"Warning: --data and --eval-data share {len(shared)} clips, such as {shared[0]}; "
            "figures on what is learned from are too good"
        )
    return train, spread_evenly(test, limit)


def _path(item: Item) -> Path | None:
    """Where a clip's audio lies; None: within a dataset."""
    return item.audio.resolve() if isinstance(item.audio, Path) else None


def spoken(items: list[Item], model: Any) -> list[Item]:
    """``items`` with the language of each, which says what is counted: words or characters."""
    from dqw.distill.pair import is_multilingual

    if not is_multilingual(model):
        return [replace(item, language=item.language or "en") for item in items]
    for item in items:
        if item.language is None:
            raise UserError(
                f"the clip {item.id} names no language: add it to the data, or give --language."
            )
    return items


def describe(study: Study, request: Request, lab: Lab) -> dict[str, Any]:
    """What the cells hold for: a rerun must agree on all of it."""

    def listed(items: list[Item]) -> dict[str, Any]:
        text = repr([(item.id, item.text, item.language) for item in items])
        return {"clips": len(items), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}

    sounds = hashlib.sha256()
    for item in [*lab.train, *lab.test]:
        sounds.update(_sound(item))
    layers = [lab.student.config.encoder_layers, lab.student.config.decoder_layers]
    return {
        "study": study.name,
        "model": Path(request.model or "whisper-base").name,
        "student": Path(request.student or request.model or "whisper-base").name,
        "layers": layers,
        "weights": weights_digest(lab.teacher, weights_digest(lab.student)),
        "speech": listed(lab.train),
        "measured on": listed(lab.test),
        "audio": sounds.hexdigest()[:16],
        "KL on": _ids(spread_evenly(lab.test, KL_CLIPS)),
        "steps": lab.steps,
        "quick": request.quick,
        "recipe": lab.recipe.to_dict(),
    }


def _ids(items: list[Item]) -> str:
    return hashlib.sha256(repr([item.id for item in items]).encode()).hexdigest()[:16]


def _sound(item: Item) -> bytes:
    """What tells a clip's audio from another of its name: its length, and some bytes from within.
    Of a dataset, whose rows would have to be read, nothing does."""
    if not isinstance(item.audio, Path):
        return b""
    with open(item.audio, "rb") as file:
        file.seek(item.audio.stat().st_size // 2)
        return f"{item.seconds}".encode() + file.read(4096)


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else."""
    ours = (out / "study.json").exists()
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no study's folder: give another --out.")


def claim(out: Path, about: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Make ``out`` this study's folder, or check that it is. earlier: what a version that did not
    note it had."""
    path = out / "study.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"{path} is not JSON: give another --out, or remove it.") from None
        before = {**earlier, **before}
        for key, value in about.items():
            if key in before and before[key] != value:  # an earlier version noted less
                raise UserError(
                    f"{out} holds cells of another {key} "
                    + (f"({before.get(key)!r}, now {value!r})" if key != "recipe" else "")
                    + ": give another --out, or the same settings."
                )
        about = {**before, **about}
    write_atomic(path, json.dumps(about, indent=1) + "\n")
