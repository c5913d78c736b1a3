"""One cell of a study, from the models and the speech to its measurements.

Everything that several cells share is made once: calibration windows, the teacher's distributions,
and the student as it is before training. KL is taken in float32 on every machine, so that the noise
of bfloat16 hides no small one.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from dqw.budget import float_bytes
from dqw.calibrate import calibrate
from dqw.choices import PROBE, rounded, stored_bytes
from dqw.convert import quant_modules, quantize
from dqw.devices import lowered
from dqw.distill.pair import Pair
from dqw.probe import Probe, changed, first_changed
from dqw.recipe import Recipe
from dqw.save import save_student
from dqw.speech import calibration_batches, clip_batches, spread_evenly
from dqw.study.heard import Heard
from dqw.study.table import Changes, Setting, layer_spec
from dqw.whisper.data import Item
from dqw.whisper.files import write_atomic
from dqw.whisper.report import model_bytes

MIB = 2**20
KL_CLIPS = 64  # of the evaluation clips, evenly spaced; each keeps 200 kB a token of base
ORDER = "order.json"

Say = Callable[[str], object]


def with_changes(recipe: Recipe, *changes: Changes) -> Recipe:
    """``recipe`` with other values; overrides and skips are added to those it has."""
    data = recipe.to_dict()
    for change in changes:
        for table, values in change.items():
            for key, value in values.items():
                before = data[table][key]
                data[table][key] = [*before, *value] if key in ("override", "skip") else value
    return Recipe.from_dict(data, "the study's settings")


class Lab:
    """The models, the speech and the recipe of one study.

    train, test: clips to learn from and to measure on, the latter with text and language. out: the
    study's folder; recipe: before a setting's changes; steps: of each cell that trains.
    """

    def __init__(
        self,
        pair: Pair,
        train: list[Item],
        test: list[Item],
        recipe: Recipe,
        out: Path,
        steps: int,
        say: Say,
    ) -> None:
        self.pair, self.teacher, self.student = pair, pair.teacher, pair.student
        self.train, self.test, self.recipe = train, test, recipe
        self.out, self.steps, self.say = out, steps, say
        self.packed = bool(quant_modules(self.student))
        self.heard = Heard()
        self._start: tuple[str, Any] = ("", None)

    # ------------------------------------------------------------ what cells share

    @cached_property
    def calibration(self) -> list[dict[str, Any]]:
        return calibration_batches(self.train, self.recipe, self.pair, self.say)

    @cached_property
    def clips(self) -> list[dict[str, Any]]:
        """The evaluation clips that KL is taken on, one a batch."""
        return list(
            clip_batches(spread_evenly(self.test, KL_CLIPS), self.recipe, self.pair, self.say)
        )

    @cached_property
    def probe(self) -> Probe:
        """The teacher's distributions."""
        return Probe(self.teacher, self.clips)

    @cached_property
    def own_probe(self) -> Probe:
        """The float student's own."""
        return Probe(self.student, self.clips)

    @cached_property
    def order(self) -> dict[str, float]:
        """Transformer layer → KL of rounding it alone; kept in OUT/order.json."""
        path = self.out / ORDER
        if not path.exists():
            self.say("KL of each transformer layer, rounded alone")
            plan = self.recipe.plan(self.student)
            found = {}
            for stack in ("encoder", "decoder"):
                for index in range(len(getattr(self.student.model, stack).layers)):
                    unit = f"model.{stack}.layers.{index}"
                    names = [name for name in plan if name.startswith(f"{unit}.")]
                    pairs = self._rounded_kl(names, PROBE)
                    found[unit] = sum(p[0] for p in pairs) / sum(p[1] for p in pairs)
            write_atomic(path, json.dumps(found, indent=1) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def spelling(self) -> dict[str, str] | None:
        """British spellings, one map for all cells: the teacher's, or else the student's."""
        for processor in (self.pair.teacher_processor, self.pair.processor):
            found = getattr(processor.tokenizer, "english_spelling_normalizer", None)
            if found:
                return dict(found)
        self.say("neither model has spellings (normalizer.json): colour and color are two words")
        return None

    # ------------------------------------------------------------ one cell

    def measure(self, setting: Setting, seed: int, status: Say) -> dict[str, Any]:
        """``mib``, ``kl``: (sum, tokens) of each clip, ``clips``: (language, errors, units).

        ``status`` gets a word on where a long cell is.
        """
        if setting.layers:
            plan = {n: layer_spec(self.recipe, self.student, n, int(setting.factors["bits"]))
                    for n in setting.layers}  # fmt: skip
            size = 0
            for name, spec in plan.items():
                matrix = self._matrix(name)
                size += stored_bytes(matrix.shape[0], matrix.shape[1], spec)
            kl = self._rounded_kl(setting.layers, int(setting.factors["bits"]))
            return {"mib": size / MIB, "kl": kl, "clips": []}
        self.probe  # noqa: B018  made first: training may lower the teacher's precision
        if setting.model == "teacher":
            return {
                "mib": float_bytes(self.teacher, {}) / MIB,
                **self._scores(self.teacher, status),
            }
        model = self._model(setting, seed, status)
        status("measuring")
        mib = self._mib(model)
        return {"mib": mib, **self._scores(model, status)}

    def _model(self, setting: Setting, seed: int, status: Say) -> Any:
        recipe = with_changes(self.recipe, setting.changes)
        if setting.ratio is not None:
            recipe = with_changes(recipe, {"quant": {"skip": self._left_float(setting.ratio)}})
        if setting.model == "student":
            model = copy.deepcopy(self.student)
        else:
            starts_float = bool(setting.phases) and not setting.phases[0].quantized
            model = copy.deepcopy(self.student) if starts_float else self._rounded(recipe, status)
        for number, phase in enumerate(setting.phases):
            if phase.quantized and not quant_modules(model):
                status("rounding")
                model = self._calibrated(model, recipe)
            if not phase.share:
                continue
            steps = max(round(self.steps * phase.share), 1)
            told = with_changes(
                recipe,
                phase.changes,
                {
                    "train": {"seed": seed, "steps": steps, "warmup_steps": steps // 10,
                              "tensorboard": False},
                    "guidance": {"seed": seed, "interval": max(steps // 8, 1)},
                    "distill": {"calibration_clips": 0},  # the student is rounded already
                },
            )  # fmt: skip
            self._distil(model, told, self.folder(setting, seed, number), status)
        return model

    def _left_float(self, ratio: int) -> list[str]:
        from dqw.distill.guidance import choose

        chosen = choose(self.order, ratio / 100, "smallest")
        return [f"{unit}.*" for unit in self.order if unit not in chosen]

    def _rounded(self, recipe: Recipe, status: Say) -> Any:
        """A copy of the student after calibrated rounding; the last one asked for is kept."""
        guided = recipe.guidance.mode != "all"  # such weights start off the grid
        key = json.dumps([recipe.to_dict()["quant"], guided], sort_keys=True)
        if self._start[0] != key:
            status("rounding")
            self._start = "", None  # two at once would take twice the memory
            self._start = key, self._calibrated(copy.deepcopy(self.student), recipe)
        return copy.deepcopy(self._start[1])

    def _calibrated(self, model: Any, recipe: Recipe) -> Any:
        from dqw.distill.rounding import starts_off_grid

        batches = self.calibration  # made before: the mel filters must not run in bfloat16
        quantize(model, recipe)
        model.eval()
        off_grid = starts_off_grid(model, self.teacher, recipe.guidance)
        with lowered(model):
            calibrate(model, batches, off_grid=off_grid)
        return model

    @property
    def states(self) -> Path:
        """What frozen encoders and the teacher make of the training windows."""
        return self.out / "runs" / "states"

    def folder(self, setting: Setting, seed: int, number: int) -> Path:
        """Where phase ``number`` of a cell trains."""
        return self.out / "runs" / f"{cell_name(setting, seed)}-{number}"

    def _distil(self, model: Any, recipe: Recipe, folder: Path, status: Say) -> None:
        from dqw.distill import distill

        labels, shared = folder / "teacher_labels.jsonl", self.out / "teacher_labels.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if shared.exists():
            shutil.copy(shared, labels)
        distill(
            model,
            self.teacher,
            self.pair.processor,
            self.train,
            folder,
            recipe.distill,
            guidance=recipe.guidance,
            train=recipe.train,
            resume=True,
            progress=lambda report: status(f"step {report.step}/{report.total}"),
            teacher_processor=self.pair.teacher_processor,
            states=self.states,
        )
        gc.collect()  # the trainer and Adam's moments, 8 bytes a weight, hold each other
        if labels.exists():
            write_atomic(shared, labels.read_text(encoding="utf-8"))

    def _mib(self, model: Any) -> float:
        """Size of the folder without the tokenizer, or of float16; freezes ``model``."""
        if not quant_modules(model):
            return float_bytes(model, {}) / MIB
        folder = self.out / "runs" / f"model-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_student(model, self.pair.processor, folder)
            return model_bytes(folder) / MIB
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _scores(self, model: Any, status: Say) -> dict[str, Any]:
        from dqw.whisper.evaluate import evaluate
        from dqw.whisper.scoring import clip_counts

        probe = self.probe  # made first: it is the teacher that hears
        processor = self.pair.teacher_processor if model is self.teacher else self.pair.processor
        with self.heard.recalled(model.model.encoder):
            kl = probe.by_batch(model)
            status("transcribing")
            found = evaluate(model, processor, self.test)
        languages = [item.language for item in self.test]
        rows = clip_counts(
            [item.text or "" for item in self.test],
            [transcript.text for transcript in found.transcripts],
            languages,
            self.spelling,
        )
        clips = [
            (language, int(row[:3].sum()), int(row[3])) for language, row in zip(languages, rows)
        ]
        return {"kl": kl, "clips": clips}

    # ------------------------------------------------------------ rounding some layers alone

    def _matrix(self, name: str) -> Any:
        return self.student.get_submodule(name).weight.detach().flatten(1)

    def _rounded_kl(self, names: Sequence[str], bits: int) -> list[tuple[float, int]]:
        probe = self.own_probe
        with ExitStack() as stack:
            for name in names:
                spec = layer_spec(self.recipe, self.student, name, bits)
                layer = self.student.get_submodule(name)
                stack.enter_context(changed(layer, rounded(self._matrix(name), spec)))
            return probe.by_batch(first=first_changed(names))


def cell_name(setting: Setting, seed: int) -> str:
    """A file name for a cell: the setting's name in plain letters, and the seed."""
    plain = "".join(c if c.isalnum() or c == "." else "-" for c in setting.name.replace("%", "pc"))
    while "--" in plain:
        plain = plain.replace("--", "-")
    return f"{plain.strip('-')}.{seed}"


def forget_checkpoints(lab: Lab, setting: Setting, seed: int) -> None:
    """Checkpoints (GBs) of a finished cell go; its logs stay."""
    for number in range(len(setting.phases)):
        for part in lab.folder(setting, seed, number).glob("checkpoint-*"):
            shutil.rmtree(part, ignore_errors=True)
