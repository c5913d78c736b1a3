"""What is quantized how: plain data, from code or from a TOML file.

A ``Recipe`` says in a few lines which layers get which bits; ``Recipe.plan(model)`` spells it out
as a plan, layer name → ``QuantSpec``. The plan is what a packed folder's config.json carries.
"""

import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from dqw.distill.config import DistillConfig, GuidanceConfig, TrainConfig, table
from dqw.errors import UserError
from dqw.grids import at_bits, check_grid, is_spelled_out, widths

GROUP_SIZES = (16, 32, 64, 128)
ACTIVATIONS = ("float", "int8")
ALLOCATIONS = ("none", "bits", "steps")


@dataclass(frozen=True)
class QuantSpec:
    """How one layer's weight is quantized.

    bits: 2 to 8. grid: apot, pot, uniform; lloyd, stretched or learned (2 to 5 bits); or magnitudes
    spelled out, "1,3", at the one width they have (``dqw.grids``). group_size: 16, 32, 64 or 128
    columns share a scale (a width it does not divide is padded), or None, 0 too, for one scale a
    row; per_tensor: one scale in all. activations: "float", or "int8" for dynamic int8 per token in
    the matrix product. weight_norm: clips are learned in units of the weight's standard deviation.
    step: the one scale of a uniform grid, in units of the weight's root mean square; it is neither
    searched nor learned. A step says how many bits a weight takes in a folder, where codes are
    entropy-coded (``dqw.coding``): of normal weights 2.05 - log2(step). bits then only bound the
    codes, and are what they take in memory.
    """

    bits: int = 4
    grid: str = "apot"
    group_size: int | None = 64
    per_tensor: bool = False
    activations: str = "float"
    weight_norm: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        check_grid(self.grid, self.bits)
        if self.group_size == 0:
            object.__setattr__(self, "group_size", None)
        if self.step is not None:
            self._check_step(self.step)
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UserError(
                f"group_size is {self.group_size!r}: choose {', '.join(map(str, GROUP_SIZES))}, "
                "or 0 for one scale a row."
            )
        if self.per_tensor and self.group_size is not None:
            raise UserError("per_tensor and group_size exclude each other: give one of them.")
        if self.activations not in ACTIVATIONS:
            raise UserError(f"activations is {self.activations!r}: choose 'float' or 'int8'.")

    def _check_step(self, step: object) -> None:
        number = isinstance(step, int | float) and not isinstance(step, bool)
        if not number or not 0 < step < math.inf:  # type: ignore[operator]
            raise UserError(f"step is {step!r}: give a positive number, or leave it out.")
        if self.grid != "uniform" or not self.per_tensor or self.weight_norm:
            raise UserError(
                "a step is of the uniform grid with one scale in all: give grid = 'uniform', "
                "per_tensor = true and no weight_norm with it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are the default of one scale a row."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v not in (None, False)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantSpec":
        """The inverse of ``to_dict``. Raises UserError for a key it does not know."""
        return table(cls, {"group_size": None, **values}, "quantization spec")


@dataclass
class Override:
    """Layers whose name matches the glob ``match`` get other settings, or stay float (skip)."""

    match: str
    skip: bool = False
    bits: int | None = None
    grid: str | None = None
    group_size: int | None = None  # 0: one scale a row
    step: float | None = None  # of the uniform grid, one scale in all; 8 bits unless bits are given


@dataclass
class QuantConfig:
    """The quantization part of a recipe.

    bits, grid, group_size (0: one scale a row), activations and weight_norm hold for every Linear
    layer; embedding_bits for the token embedding and the tied projection (0: stays float);
    conv_bits for the two convolutions, uniform per row (0: stays float); rest_bits for layers that
    guidance leaves unchosen (0: they stay float16); skip: globs of layers left alone.

    allocate: where there is speech to measure on, the bytes that these settings take are shared out
    anew, layer by layer (``dqw.budget``): "bits" gives each layer some on its grid, "steps" a step
    of the uniform grid, which is smaller at the same error; "none".

    Measured on whisper-base's own weights (relative squared error, best clips): with groups the
    lloyd grid has the least error at 2 to 5 bits, and layers with more take uniform; APoT beats
    uniform at 3 and 4 bits, and loses to it from 5 bits on, with groups.
    """

    bits: int = 4
    grid: str = "apot"
    group_size: int = 64
    activations: str = "float"
    weight_norm: bool = False
    embedding_bits: int = 4
    conv_bits: int = 8
    rest_bits: int = 0
    allocate: str = "none"
    skip: list[str] = field(default_factory=list)
    override: list[Override] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise UserError for a value no layer could have, before anything long is started."""
        self.linear_spec()
        if self.allocate not in ALLOCATIONS:
            raise UserError(
                f"allocate is {self.allocate!r}: choose one of {', '.join(ALLOCATIONS)}."
            )
        for bits in (self.embedding_bits, self.conv_bits, self.rest_bits):
            if bits:
                QuantSpec(bits=bits)
        for rule in self.override:
            _overridden(self.linear_spec(), rule)
            on_grid = rule.grid is not None or rule.group_size is not None
            if self.allocate == "steps" and on_grid and not (rule.bits or rule.skip):
                raise UserError(
                    f"the override of {rule.match!r} gives a grid or a group size, and allocate = "
                    "'steps' replaces both: add bits, or set allocate = 'bits'."
                )

    def linear_spec(self) -> QuantSpec:
        """The spec of a Linear layer that no override changes."""
        told = is_spelled_out(self.grid)  # at other bits it is refused, not replaced
        return QuantSpec(
            bits=self.bits,
            grid=self.grid if told else at_bits(self.grid, self.bits),
            group_size=self.group_size or None,
            activations=self.activations,
            weight_norm=self.weight_norm,
        )


@dataclass
class Recipe:
    """Everything a compression run needs besides models and data."""

    quant: QuantConfig = field(default_factory=QuantConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """A TOML file, or a recipe that comes with dqw; raises UserError as those two do."""
        return cls.from_toml(name) if name.endswith(".toml") else cls.shipped(name)

    @classmethod
    def shipped(cls, name: str) -> "Recipe":
        """A recipe that comes with dqw. Raises UserError that lists them for an unknown name."""
        folder = files("dqw") / "recipes"
        if not (folder / f"{name}.toml").is_file():
            names = ", ".join(sorted(f.name[:-5] for f in folder.iterdir() if ".toml" in f.name))
            raise UserError(f"recipe {name!r} is not known: give a TOML file or {names}.")
        return cls.from_toml(str(folder / f"{name}.toml"))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe. Raises UserError naming the file and the key for anything unknown."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"recipe {path} cannot be read ({error.strerror}): give an existing TOML file."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"recipe {path} is not valid TOML ({error}): mend that line."
            ) from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe") -> "Recipe":
        """Build from nested dicts as TOML gives them; unknown tables and keys raise UserError.

        ``base``: the name of a recipe that ships, whose values stand where these say nothing.
        """
        parts: dict[str, Any] = {}
        data = dict(data)  # the caller's stays as it is
        base = data.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise UserError(f"{where}: base = {base!r} is no name: put it in quotes.")
            data = _laid_over(cls.shipped(base).to_dict(), data)
        for part in fields(cls):
            values = data.pop(part.name, {})
            if part.name == "quant" and isinstance(values, dict):
                rules = values.get("override", [])
                if not isinstance(rules, list):
                    raise UserError(
                        f"{where} has a table [quant.override]: write [[quant.override]], as there "
                        "may be several."
                    )
                rules = [table(Override, rule, f"{where} [[quant.override]]") for rule in rules]
                values = {**values, "override": rules}
            parts[part.name] = table(part.default_factory, values, f"{where} [{part.name}]")
        if data:
            raise UserError(
                f"{where} has the unknown table [{next(iter(data))}]: "
                f"known are {', '.join(f.name for f in fields(cls))}."
            )
        return cls(**parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plan(self, model: nn.Module) -> dict[str, QuantSpec]:
        """Layer name → spec for every Linear, Conv1d and token embedding of ``model``.

        The output projection tied to the embedding is not listed: it reads the embedding's tensor.
        Nor are subclasses, which may do more, and what torch's own attention and transformer
        layers hold: they read its weights themselves. Position embeddings stay float. Raises
        UserError if an override or a skip matches no layer.
        """
        q = self.quant
        base = q.linear_spec()
        plan: dict[str, QuantSpec] = {}
        names: list[str] = []
        left = _left_out(model)
        for name, module in model.named_modules():
            spec = self._spec_of(name, module, base)
            if spec is None or id(module) in left:
                continue
            names.append(name)
            skip = any(fnmatchcase(name, glob) for glob in q.skip)
            for rule in q.override:
                if fnmatchcase(name, rule.match):
                    skip = skip or rule.skip
                    spec = _overridden(spec, rule)
            if not skip:
                plan[name] = spec
        for glob in [*q.skip, *(rule.match for rule in q.override)]:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UserError(
                    f"the recipe's pattern {glob!r} matches no layer: names are like {names[0]}."
                )
        return plan

    def sets_bits(self, name: str) -> bool:
        """Whether an override gives this layer's bits or step."""
        rules = [rule for rule in self.quant.override if rule.bits or rule.step]
        return any(fnmatchcase(name, rule.match) for rule in rules)

    def at_any_bits(self, name: str, spec: QuantSpec, module: nn.Module) -> QuantSpec:
        """``spec`` of a layer on the grid that was asked for, where its bits are what another grid
        had to be taken for: for other bits to be chosen."""
        rules = [rule for rule in self.quant.override if fnmatchcase(name, rule.match)]
        asked = next((rule.grid for rule in reversed(rules) if rule.grid), self.quant.grid)
        if isinstance(module, nn.Conv1d) or asked == spec.grid or is_spelled_out(asked):
            return spec
        return replace(spec, bits=widths(asked)[0], grid=asked)

    def rest_spec(self) -> QuantSpec | None:
        """The spec of layers that guidance leaves unchosen; None: they stay float."""
        if not self.quant.rest_bits:
            return None
        return QuantSpec(bits=self.quant.rest_bits, grid="uniform", group_size=None)

    def _spec_of(self, name: str, module: nn.Module, base: QuantSpec) -> QuantSpec | None:
        if type(module) is nn.Linear:
            return base
        if type(module) is nn.Conv1d and self.quant.conv_bits:
            return QuantSpec(bits=self.quant.conv_bits, grid="uniform", group_size=None)
        table = type(module) is nn.Embedding and name.endswith("embed_tokens")
        if table and self.quant.embedding_bits:
            bits = self.quant.embedding_bits
            return replace(base, bits=bits, grid=at_bits(self.quant.grid, bits))
        return None


def _laid_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` in place of its own, table by table."""
    found = dict(base)
    for key, value in values.items():
        under = found.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            value = _laid_over(under, value)
        found[key] = value
    return found


_READ_BY_OWNER = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _left_out(model: nn.Module) -> set[int]:
    """Of Linear layers that are not to be swapped: ids."""
    left = set()
    for owner in model.modules():
        if isinstance(owner, _READ_BY_OWNER):
            left |= {id(module) for module in owner.modules()}
    embedding, projection = (
        get() if (get := getattr(model, f"get_{side}_embeddings", None)) else None
        for side in ("input", "output")
    )
    tied = getattr(projection, "weight", None)
    if tied is not None and tied is getattr(embedding, "weight", None):
        left.add(id(projection))
    return left


def stepped(spec: QuantSpec, step: float, bits: int) -> QuantSpec:
    """``spec`` on the uniform grid with one ``step``, its codes of ``bits``."""
    return replace(
        spec, bits=bits, grid="uniform", group_size=None, per_tensor=True, weight_norm=False,
        step=step,
    )  # fmt: skip


def _overridden(spec: QuantSpec, rule: Override) -> QuantSpec:
    changes: dict[str, Any] = {}
    if rule.bits is not None:
        changes["bits"] = rule.bits
    if rule.grid is not None:
        changes["grid"] = rule.grid
    elif rule.bits is not None:
        changes["grid"] = at_bits(spec.grid, rule.bits)
    if rule.group_size is not None:
        changes["group_size"] = rule.group_size or None
    if rule.step is not None:
        if rule.grid is not None or rule.group_size is not None:
            raise UserError(
                f"the override of {rule.match!r} has a step and a grid or group_size: give either."
            )
        return stepped(spec, rule.step, rule.bits or 8)
    if changes:  # of an earlier rule's step nothing is left
        spec = replace(spec, step=None, per_tensor=False)
    return replace(spec, **changes)
