"""From a float Whisper to a small folder: what ``dqw compress`` does, as one function.

teacher and student → plan → fake quantization → distillation → freeze → a folder. Without training,
error-compensating rounding on calibration speech takes distillation's place. Beside the folder,
which appears whole or not at all, lie the training run in OUT.run (checkpoints, labels, logs) and,
until the folder is written, what else takes long in OUT.work (``dqw.kept``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dqw
from dqw.devices import best_device, warn_of_triton
from dqw.errors import UserError
from dqw.kept import Kept
from dqw.processes import agreed, alike, is_main, wait
from dqw.recipe import Recipe
from dqw.save import save_student
from dqw.stations import basis, calibrate_student, heal_student, listen, quantize_student
from dqw.whisper.coverage import coverage
from dqw.whisper.files import check_writable, write_atomic
from dqw.whisper.report import model_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from dqw.distill.pair import Pair
    from dqw.whisper.data import Item

Say = Callable[[str], object]
_SETTINGS = "recipe.json"  # in the run's folder: what it began with
_NO_DATA = (
    "--data is missing: give a manifest.jsonl, an audio folder or a dataset; or --ptq-only, which "
    "does without."
)
_NO_SPEECH = (
    "--budget measures layers on speech: give --data, a manifest.jsonl, an audio folder or a "
    "dataset; or leave --budget out."
)


@dataclass
class Job:
    """One compression: names as the user gave them, and the recipe.

    teacher, student: hub id, Hugging Face folder or faster-whisper folder; student None: a copy of
    the teacher, or ``student_layers`` of it, healed on the data. data: manifest, audio folder or
    dataset name; not needed with ``ptq_only``, where some of it calibrates. language: only clips in
    it, and those that name none. ptq_only: no training, whatever the recipe says. budget: bytes of
    the whole folder without the tokenizer; bits or steps are then chosen layer by layer on
    calibration speech.
    """

    teacher: str
    out: Path
    student: str | None = None
    data: str | None = None
    student_layers: tuple[int, int] | None = None
    language: str | None = None
    ptq_only: bool = False
    resume: bool = False
    budget: int | None = None

    @property
    def run(self) -> Path:
        """The training run's folder."""
        return self.out.with_name(self.out.name + ".run")

    @property
    def work(self) -> Path:
        """What else was worked out, kept until the output is written."""
        return self.out.with_name(self.out.name + ".work")

    @property
    def unfinished(self) -> bool:
        """Whether a run of training was begun there and did not end."""
        return self.run.exists() and not (self.run / "finished").exists()


def compress(job: Job, recipe: Recipe, say: Say = print) -> Path:
    """Run ``job`` and return the folder it wrote. ``say`` gets a line at every station.

    Raises UserError before any long work for whatever can be known then: an output folder that
    exists, unknown data rows, models that do not fit each other, an unfinished run.
    """
    try:
        return _compress(job, recipe, say)
    except KeyboardInterrupt:
        if recipe.train.wanted and not job.ptq_only and job.unfinished:
            say(f"what is trained is kept in {job.run}: --resume goes on from it")
        elif job.work.exists():
            say(f"what is done is kept in {job.work}: the same command goes on from it")
        raise


def _compress(job: Job, recipe: Recipe, say: Say) -> Path:
    if not job.ptq_only and not recipe.train.wanted:
        if job.data is None:
            raise UserError(_NO_DATA)
        job = replace(job, ptq_only=True)
    if job.ptq_only and not is_main():
        return job.out  # no work for several processes
    check_output(job)
    if job.resume and not resumable(job):
        if not job.work.exists():
            say("nothing to resume: begun anew")  # a machine repeats one command until it is done
        job = replace(job, resume=False)
    if not job.ptq_only:
        from dqw.distill.run import check_run

        check_run(recipe.distill, recipe.guidance, recipe.train)
        check_guidance(job, recipe)
        check_began(job, recipe)
    if job.data is not None:
        say(f"reading the headers of {job.data}")
    items = load_data(job, say)
    pair = load_models(job, say)
    check_budget(job, recipe, pair)
    heals = lacks_layers(job, pair)
    if heals and not items:
        say("without --data nothing makes up for the layers that were cut")
    began = resumed_plan(job, recipe) if job.resume else None
    shared_out = recipe.quant.allocate != "none"
    allocates = began is None and bool(job.budget or (shared_out and items))
    recipe = began or recipe
    batches: list[dict[str, Tensor]] = []
    kept: Kept | None = None
    if items and (job.ptq_only or allocates or heals):
        warn_of_triton()
        for model in (pair.teacher, pair.student):
            model.to(best_device())
        kept = Kept(job.work, say) if is_main() else None
        batches = listen(items, recipe, pair, job.ptq_only, heals, say, kept)
        kept = kept and kept.on(basis(pair, batches), dqw.__version__, recipe.quant.allocate)
    if heals and batches:
        heal_student(pair, batches, say, kept)
    if pair.teacher is not pair.student:
        pair.teacher.to("cpu")  # training moves it back: until then a GPU's memory is for others
    if allocates:
        from dqw.budget import fit_budget, model_size, overhead

        plan = recipe.plan(pair.student)
        budget = job.budget or model_size(pair.student, plan) + overhead(plan)
        recipe = fit_budget(pair.student, recipe, budget, batches, say, kept)
    recipe = recipe if job.ptq_only else agreed(recipe)
    quantize_student(pair.student, recipe, say)
    if job.ptq_only and batches:
        calibrate_student(pair.student, batches, say, kept and kept.on((), recipe.quant))
    if not job.ptq_only:
        train(job, recipe, pair, items)
    if is_main():
        done = Kept(job.work, say)  # of a run that was resumed, too, which kept nothing more
        if not has_room(job.out, pair.student):
            done.clear_states()
        save_student(pair.student, pair.processor, job.out, provenance(job, recipe))
        if not job.ptq_only:
            finish(job)
        done.clear()
        size = model_bytes(job.out)
        say(f"wrote {job.out}: {size / 2**20:.1f} MiB without the tokenizer")
        if job.budget and size > job.budget:
            cause = "" if job.ptq_only else ": training has spread the codes"
            say(f"that is {size - job.budget} bytes over --budget{cause}")
        for part, served in coverage(pair.student.config.to_dict()).items():
            if served.startswith("plain"):
                say(f"on a CPU its {part} will be slow, {served}")
    return job.out


def resumable(job: Job) -> bool:
    """Whether a run of training was begun and did not end. Raises UserError where processes do not
    see the same."""
    found = not job.ptq_only and job.unfinished
    if not job.ptq_only and not alike(found):
        raise UserError(f"processes do not all see {job.run}: give all the same output folder.")
    return found


def has_room(out: Path, model: Any) -> bool:
    """Whether the disk surely takes ``model``, packed, at ``out``."""
    weights = sum(weight.numel() for weight in model.state_dict().values())
    return shutil.disk_usage(out.parent).free > 2 * weights


def check_guidance(job: Job, recipe: Recipe) -> None:
    """Raise UserError where bytes are shared out and guidance leaves layers float."""
    guidance = recipe.guidance
    leaves = guidance.mode in ("random", "distill_guided", "mutual") and guidance.quantize_ratio < 1
    if leaves and (job.budget or recipe.quant.allocate != "none"):
        raise UserError(
            f"guidance.mode = {guidance.mode!r} leaves layers unquantized, which no budget counts: "
            "leave --budget out and set quant.allocate = 'none', or guidance.quantize_ratio = 1."
        )


def check_budget(job: Job, recipe: Recipe, pair: Pair) -> None:
    """Raise UserError where --budget is below what no choice of bits changes."""
    from dqw.budget import float_bytes, overhead

    plan = recipe.plan(pair.student)
    fixed = float_bytes(pair.student, plan) + overhead(plan)
    if job.budget and job.budget <= fixed:
        raise UserError(
            f"--budget is {job.budget / 2**20:.2f} MiB, and what stays float takes "
            f"{fixed / 2**20:.2f} MiB: give a larger one."
        )


def load_data(job: Job, say: Say) -> list[Item]:
    """The clips, none without --data. Raises UserError where the job needs some."""
    from dqw.whisper.data import load_items

    if job.data is None:
        if not job.ptq_only or job.budget:
            raise UserError(_NO_SPEECH if job.budget else _NO_DATA)
        return []
    items = load_items(job.data, language=job.language, say=say)
    seconds = sum(item.seconds or 0 for item in items)
    known = all(item.seconds is not None for item in items)
    length = f"{seconds / 60:.1f} min" if known else "their length is read as they come"
    texts = sum(item.text is not None for item in items)
    say(f"data: {len(items)} clips, {texts} with a text, {length}")
    return items


def lacks_layers(job: Job, pair: Pair) -> bool:
    """Whether the student was cut from the teacher, and no checkpoint holds it healed."""
    from dqw.distill.checkpoint import newest
    from dqw.distill.pair import is_copy

    cut = job.student_layers is not None and not is_copy(pair.student, pair.teacher)
    return cut and not (job.resume and newest(job.run))


def check_output(job: Job) -> None:
    """Refuse to overwrite, and to start anew beside an unfinished run."""
    out, run = job.out, job.run
    if out.exists():
        raise UserError(f"{out} exists already: give another --out, or remove it first.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out.parent} cannot be made ({error.strerror}): give another --out."
        ) from error
    check_writable(out, "--out")
    if job.ptq_only:
        return
    unfinished = job.unfinished
    if unfinished and not job.resume:
        raise UserError(f"{run} holds an unfinished run: add --resume to go on, or remove it.")


def load_models(job: Job, say: Say) -> Pair:
    """The float models. Raises UserError where the teacher cannot teach the student."""
    import copy

    from dqw.convert import quant_modules
    from dqw.distill.pair import Pair, check_models
    from dqw.whisper.checkpoint import load_whisper
    from dqw.whisper.student import cut_student

    if job.student and job.student_layers:
        raise UserError("--student and --student-layers exclude each other: give one of them.")
    say(f"teacher: {job.teacher}")
    teacher, teacher_processor = load_whisper(job.teacher)
    processor = teacher_processor
    if job.student_layers:
        student = cut_student(teacher, *job.student_layers)
    elif job.student and not same_model(job.student, job.teacher):
        say(f"student: {job.student}")
        student, processor = load_whisper(job.student)
    elif job.ptq_only:
        student = teacher  # which writes texts before it changes; two of large-v3 take 12 GB
    else:
        student = copy.deepcopy(teacher)
    if quant_modules(student):
        raise UserError("the student is quantized already: give a float checkpoint.")
    if student is not teacher:
        check_models(student, teacher, teacher_processor)
    return Pair(teacher, student, processor, teacher_processor)


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one hub id or folder."""
    folders = Path(one), Path(other)
    return one == other or (all(f.is_dir() for f in folders) and folders[0].samefile(folders[1]))


def check_began(job: Job, recipe: Recipe) -> None:
    """Raise UserError where the run to be resumed was begun with other settings, but for the
    layers' plan."""
    path = job.run / _SETTINGS
    if not job.resume or not path.exists():
        return
    began = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(provenance(job, recipe)))
    for settings in (began, wanted):
        settings["quant"].pop("override", None)
    if began != wanted:
        raise other_settings(job)


def other_settings(job: Job) -> UserError:
    return UserError(
        f"the run in {job.run} was started with other settings (see {_SETTINGS}): "
        "resume with those, or remove it."
    )


def resumed_plan(job: Job, recipe: Recipe) -> Recipe | None:
    """``recipe`` with the layers' bits or steps that the run to be resumed began with; None: it has
    none that belong to this recipe."""
    path = job.run / _SETTINGS
    if not path.exists():
        return None
    data = recipe.to_dict()
    own, kept = data["quant"], json.loads(path.read_text(encoding="utf-8"))["quant"]
    rules = len(own["override"])
    if own | {"override": kept["override"]} != kept or kept["override"][:rules] != own["override"]:
        return None
    return Recipe.from_dict({**data, "quant": kept}, str(path))


def train(job: Job, recipe: Recipe, pair: Pair, items: list[Item]) -> None:
    """Distil the teacher into the quantized student, in place; resumable in ``job.run``."""
    from dqw.distill import distill
    from dqw.distill.checkpoint import held

    run = job.run
    settings = run / _SETTINGS
    wanted = json.dumps(provenance(job, recipe), indent=1, sort_keys=True)
    if job.resume and settings.exists() and settings.read_text(encoding="utf-8") != wanted:
        raise other_settings(job)
    wait()  # all have read what was there
    if is_main():
        if run.exists() and not job.resume:
            with held(run):
                shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        if not settings.exists() or settings.read_text(encoding="utf-8") != wanted:
            write_atomic(settings, wanted)  # all that holds the layers' plan
    wait()
    distill(
        pair.student,
        pair.teacher,
        pair.processor,
        items,
        run,
        recipe.distill,
        guidance=recipe.guidance,
        train=recipe.train,
        resume=job.resume,
        teacher_processor=pair.teacher_processor,
    )


def finish(job: Job) -> None:
    """The folder is written: the run's logs and labels stay, checkpoints and states (GBs) go."""
    (job.run / "finished").touch()
    for folder in [*job.run.glob("checkpoint-*"), job.run / "states"]:
        shutil.rmtree(folder, ignore_errors=True)


def provenance(job: Job, recipe: Recipe) -> dict[str, Any]:
    """How a folder came to be, for its config.json; names without their folders."""
    made = {
        "teacher": Path(job.teacher).name,
        "student": Path(job.student or job.teacher).name,
        "student_layers": list(job.student_layers or ()) or None,
        "quant": recipe.to_dict()["quant"],
    }
    if job.budget:
        made["budget"] = job.budget
    if job.ptq_only:
        made["calibrated"] = job.data is not None
    else:
        made |= {k: recipe.to_dict()[k] for k in ("distill", "guidance", "train")}
    return made
