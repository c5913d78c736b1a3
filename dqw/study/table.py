"""What each study measures: its settings, each a change to a recipe, as plain data.

A cell is a setting and a seed. Settings that train are run with every seed, the others once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dqw.budget import kind_of
from dqw.choices import candidates
from dqw.grids import GRIDS, LEARNED, widths
from dqw.recipe import QuantSpec, Recipe

Changes = Mapping[str, Mapping[str, Any]]  # recipe table → key → value
METRICS = ("KL", "WER", "CER")
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
RATIOS = (25, 50, 75, 100)


@dataclass(frozen=True)
class Phase:
    """Training for a ``share`` of the steps, quantized or float, under more changes. A quantized
    phase starts with calibrated rounding; of a share of 0 it is all there is."""

    share: float = 1.0
    quantized: bool = True
    changes: Changes = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One thing to measure.

    factors: what is varied, columns of the CSV. model: ``teacher`` or ``student`` as they come,
    or ``quantized``: the student after calibrated rounding. changes: to the study's recipe.
    phases: of training, one after the other. ratio: per cent of the transformer layers that are
    quantized. layers: names of layers; they alone are rounded, to least squared error, to the
    factor ``bits``. baseline: stands in the table and is compared with nothing.
    """

    name: str
    factors: Mapping[str, str | int] = field(default_factory=dict)
    model: str = "quantized"
    changes: Changes = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    ratio: int | None = None
    layers: tuple[str, ...] = ()
    baseline: bool = False


@dataclass(frozen=True)
class Scope:
    """What settings may depend on. packed: the student is quantized already."""

    student: Any
    recipe: Recipe
    quick: bool
    packed: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        return (3, 4) if self.quick else WIDTHS


@dataclass(frozen=True)
class Study:
    """A question and how it is answered.

    within: factors; settings that share them are compared with each other. recipe: the one that
    is changed. base: changes that hold for every setting. cut: the student, where none is named,
    is the teacher with two thirds of its decoder layers. chart: ``lines`` over the factor x with a
    line for each value of ``series``, ``dots``, ``languages`` or ``layers``.
    """

    name: str
    question: str
    how: str
    settings: Callable[[Scope], list[Setting]]
    within: tuple[str, ...] = ()
    recipe: str = "joint"
    base: Changes = field(default_factory=dict)
    cut: bool = False
    calibrates: bool = True
    chart: str = "dots"
    x: str = ""
    series: tuple[str, ...] = ()


TEACHER = Setting("float teacher", model="teacher", baseline=True)
UNTRAINED = Setting("calibrated rounding, no training")
JOINT = (Phase(),)
# Studies of many cells, each of which is rounded anew.
_FEWER_WINDOWS: Changes = {"distill": {"calibration_clips": 64}}


def at_width(recipe: Recipe, bits: int) -> dict[str, Any]:
    """Changes of [quant]: ``bits`` for all weights but convolutions, on the better grid."""
    spec = candidates(recipe.quant.linear_spec(), (bits,))[0]
    return {"bits": bits, "embedding_bits": bits, "grid": spec.grid}


def _paper(scope: Scope) -> list[Setting]:
    return [
        TEACHER,
        Setting("float student, not trained", model="student"),
        Setting("post-training, uniform 8 bits"),
        Setting("distilled, float", model="student", phases=(Phase(quantized=False),)),
        Setting("distilled, uniform 8 bits", phases=JOINT),
        Setting(
            "distilled, uniform 8 bits, mutual guidance",
            changes={"guidance": {"mode": "mutual"}},
            phases=JOINT,
        ),
    ]


_MATCHINGS = {
    "static": "static_odd",
    "static, spread evenly": "static_uniform",
    "dynamic": "dynamic",
    "restrained": "restrained",
    "optimal restrained": "optimal",
    "none": "none",
}


def _matching(scope: Scope) -> list[Setting]:
    return [
        TEACHER,
        UNTRAINED,
        *(
            Setting(name, {"matching": rule}, changes={"distill": {"matching": rule}}, phases=JOINT)
            for name, rule in _MATCHINGS.items()
        ),
    ]


_REVERSED = {"mode": "mutual", "quantize_first": "largest", "distill_first": "smallest"}
_GUIDES: dict[str, dict[str, Any]] = {
    "random": {"mode": "random"},
    "mutual": {"mode": "mutual"},
    "reversed": _REVERSED,
    "distillation loss chooses": {"mode": "distill_guided"},
}


def _guidance(scope: Scope) -> list[Setting]:
    def setting(guide: str, ratio: int, rule: dict[str, Any]) -> Setting:
        rule = {**rule, "quantize_ratio": ratio / 100}
        factors: dict[str, str | int] = {"guidance": guide, "ratio": ratio}
        name = f"{guide}, {ratio} %"
        return Setting(name, factors, changes={"guidance": rule}, phases=JOINT)

    found = [TEACHER, UNTRAINED]
    for ratio in (50, 100) if scope.quick else RATIOS:
        for guide, rule in _GUIDES.items():
            # With all layers quantized, mutual guidance is its quantization rule alone, and the
            # distillation rule alone is no guidance.
            if ratio < 100 or guide in ("random", "reversed"):
                found.append(setting(guide, ratio, rule))
    found.append(setting("quantization loss chooses", 100, {"mode": "quant_guided"}))
    found.append(setting("all", 100, {"mode": "all"}))
    return found


def _ratio(scope: Scope) -> list[Setting]:
    blocks = ["model.encoder.layers.*", "model.decoder.layers.*"]
    table = {"match": "model.decoder.embed_tokens", "bits": 8, "grid": "uniform"}
    found = [
        Setting(
            "0 %", {"ratio": 0}, baseline=True,
            changes={"quant": {"skip": blocks, "embedding_bits": 8, "override": [table]}},
        )
    ]  # fmt: skip
    for bits in scope.widths:
        for ratio in (50, 100) if scope.quick else RATIOS:
            quant = {**at_width(scope.recipe, bits), "override": [table]}
            factors = {"bits": bits, "ratio": ratio}
            name = f"{bits} bits, {ratio} %"
            found.append(Setting(name, factors, changes={"quant": quant}, ratio=ratio))
    return found


def _grids(scope: Scope) -> list[Setting]:
    found = [TEACHER]
    for group in (0, 16):  # what larger ones give lies between
        for bits in (4,) if scope.quick else WIDTHS:
            for grid in (*GRIDS, LEARNED):
                if bits == 2 and grid in ("apot", "pot"):
                    continue  # at 2 bits they are the uniform grid
                if bits not in widths(grid):
                    continue
                shared = f"groups of {group}" if group else "per row"
                quant = {"bits": bits, "embedding_bits": bits, "grid": grid, "group_size": group}
                factors: dict[str, str | int] = {"bits": bits, "scales": shared, "grid": grid}
                found.append(
                    Setting(f"{grid} {bits} bits, {shared}", factors, changes={"quant": quant})
                )
    return found + [_by_step(bits) for bits in ((4,) if scope.quick else WIDTHS[:-1])]


def _by_step(bits: int) -> Setting:
    """The step at which normal weights have an entropy of ``bits``: log2 of the root of 2 pi e
    deviations, less log2 of the step."""
    step = round(math.sqrt(2 * math.pi * math.e) / 2**bits, 4)
    rules = [
        {"match": match, "bits": 8, "step": step}
        for match in ("model.*coder.layers.*", "model.decoder.embed_tokens")
    ]
    factors: dict[str, str | int] = {"bits": bits, "scales": "one step", "grid": "uniform"}
    return Setting(f"step {step}, {bits} bits", factors, changes={"quant": {"override": rules}})


_LABELS_ALONE = {"distill": {"ce": 1.0, "kl": 0.0, "hidden": 0.0, "matching": "none"}}


def _ablation(scope: Scope) -> list[Setting]:
    distil, learn = Phase(quantized=False), Phase(changes=_LABELS_ALONE)
    after = (Phase(0.5, quantized=False), Phase(0.5, changes=_LABELS_ALONE))
    return [
        TEACHER,
        UNTRAINED,
        Setting("distillation only, float", model="student", phases=(distil,)),
        Setting("quantization only", phases=(learn,)),
        Setting("distilled, then rounded", phases=(distil, Phase(0.0))),
        Setting("one after the other", phases=after),
        Setting("jointly", phases=JOINT),
    ]


def _languages(scope: Scope) -> list[Setting]:
    if scope.packed:
        return [TEACHER, Setting("student", model="student")]
    found = [TEACHER]
    for bits in (8, 4) if scope.quick else (8, 4, 3, 2):
        quant = at_width(scope.recipe, bits)
        found.append(Setting(f"{bits} bits", {"bits": bits}, changes={"quant": quant}))
    return found


def _sensitivity(scope: Scope) -> list[Setting]:
    names = list(scope.recipe.plan(scope.student))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    found = []
    for bits in scope.widths:
        for kind, layers in kinds.items():
            factors: dict[str, str | int] = {"kind": kind, "layer": "all", "bits": bits}
            found.append(Setting(f"{kind}, {bits} bits", factors, layers=tuple(layers)))
    for bits in scope.widths[:1] if scope.quick else scope.widths:
        for kind, layers in kinds.items():
            for name in layers:
                if len(layers) > 1:
                    depth = next(int(part) for part in name.split(".") if part.isdigit())
                    factors = {"kind": kind, "layer": depth, "bits": bits}
                    found.append(Setting(f"{name}, {bits} bits", factors, layers=(name,)))
    return found


def layer_spec(recipe: Recipe, student: Any, name: str, bits: int) -> QuantSpec:
    """How one layer is rounded to ``bits`` in the sensitivity study."""
    return candidates(recipe.plan(student)[name], (bits,))[0]


STUDIES = {
    study.name: study
    for study in (
        Study(
            "paper",
            "What do the steps of the paper's ladder bring, on the same data and steps?",
            "The recipe paper-base: the decoder alone is quantized and learns; FFN activations are "
            "distilled under static matching, 0.1 CE + 0.9 KL. Mutual guidance quantizes and "
            "distils half of the layers.",
            _paper,
            recipe="paper-base",
            base={
                "train": {"batch_size": 4},
                "distill": {"matching": "static_odd"},
                "guidance": {"mode": "all"},
            },
            cut=True,
        ),
        Study(
            "matching",
            "Which teacher layer should a student layer learn from?",
            "Joint distillation and quantization of the decoder, only the matching differs; “none” "
            "compares no hidden states. Static is the published rule, layer 2i + 1, or the last; "
            "spread evenly, four layers get 0, 2, 3 and 5 of six, those that they were cut from.",
            _matching,
            recipe="decoder",
            cut=True,
        ),
        Study(
            "guidance",
            "Does mutual guidance choose layers better than chance?",
            "Joint training of the decoder, its layers at 3 bits: at 4 there is little to choose "
            "by. The student lacks layers, as the paper's do: a copy has nothing to learn. The "
            "ratio is the share of transformer layers that is quantized; the others stay float16, "
            "so compare within a ratio. Half of the layers are distilled wherever a rule chooses "
            "them, all where the distillation loss alone chooses. Reversed: layers far from the "
            "teacher are quantized, layers that rounding spares are distilled.",
            _guidance,
            within=("ratio",),
            recipe="decoder",
            base={"quant": {"bits": 3}},
            cut=True,
        ),
        Study(
            "ratio",
            "How do error and size go with the ratio of quantized layers?",
            "Calibrated rounding on 64 windows, no training. Layers whose rounding costs least KL "
            "come first, in encoder and decoder alike; the others stay float16; embedding and "
            "convolutions have 8 bits, uniform. From 5 bits on the grid is uniform.",
            _ratio,
            within=("bits",),
            base=_FEWER_WINDOWS,
            chart="lines",
            x="ratio",
            series=("bits",),
        ),
        Study(
            "grids",
            "Which grid is best at which width?",
            "Calibrated rounding on 64 windows, no training, one grid for all weights but the "
            "convolutions. APoT and PoT at 2 bits are the uniform grid. With one step a layer, "
            "bits are the entropy of normal weights' codes: what they take in the folder. Codes "
            "have 8 bits in memory, so small steps clip the largest weights; dqw compress takes "
            "none that do.",
            _grids,
            within=("bits", "scales"),
            base=_FEWER_WINDOWS,
            chart="lines",
            x="bits",
            series=("grid", "scales"),
        ),
        Study(
            "ablation",
            "Distillation only, quantization only, one after the other, or jointly?",
            "The decoder learns, the same steps each. Quantization only learns from the texts "
            "(cross entropy), distillation only has a float student; one after the other: half of "
            "the steps each. Distilled, then rounded: all steps in float, then calibrated "
            "rounding, which learns nothing.",
            _ablation,
            recipe="decoder",
            cut=True,
        ),
        Study(
            "languages",
            "What does quantization cost in each language?",
            "Calibrated rounding at several widths beside the teacher's own errors; or a student "
            "that is quantized already, as it is.",
            _languages,
            chart="languages",
        ),
        Study(
            "sensitivity",
            "Which layers, and which kinds of layers, suffer most from rounding?",
            "One layer, or all of one kind, is rounded to the scales of least squared error, the "
            "rest stays float; KL from the float model's own next-token distributions. From 5 bits "
            "on, with groups, the grid is uniform.",
            _sensitivity,
            calibrates=False,
            chart="layers",
        ),
    )
}  # fmt: skip
