"""Bits or a step for each layer under a size: ``dqw compress --budget 32MiB``, or that of a recipe.

The costs of the layers' choices (``dqw.choices``) add up; which of them cost least in all and fit
the budget is found exactly.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dqw.bars import progress_bar
from dqw.choices import Choice, sensitivities, stored_bytes, told
from dqw.devices import lowered
from dqw.errors import UserError
from dqw.hf import POSITIONS, sinusoidal_positions
from dqw.probe import Probe
from dqw.recipe import Override, QuantSpec, Recipe
from dqw.speech import spread

if TYPE_CHECKING:
    from dqw.kept import Kept

# Windows of speech, for the KL. base at 27 to 39.4 MiB: a plan by 4, 6 or 8 of 24 windows costs 3.0
# to 4.8, 2.5 to 4.3 or 1.8 to 2.9 % more, by the others, than theirs
# (mean of 40 draws; a one-off program). 6 take 25 s more, two cores of a Zen 4.
WINDOWS = 4

# Layers that get the same bits in the end (``one_table``).
ONE_TABLE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """ "32MiB", "32 MB" or "33554432" → bytes. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1024:  # nobody means 33 bytes
        raise UserError(f"--budget is {text!r}: give a size, like 32MiB or 34MB.")
    return size


def allocate(choices: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice of each layer: the least cost in all that fits ``budget`` bytes.

    Exact, by dynamic programming over sizes in units of 256 bytes, or of 1/131072 of the budget
    (rounded up, so the budget holds). Raises UserError if even the smallest do not fit.
    """
    unit = max(256, budget >> 17)
    least = sum(min(c.size for c in layer) for layer in choices)
    units = budget // unit
    cost = np.zeros(units + 1 if units >= 0 else 0)
    picks = []
    for layer in choices:
        best = np.full_like(cost, np.inf)
        pick = np.zeros(len(cost), dtype=np.int8)
        for index, choice in enumerate(layer):
            width = -(-choice.size // unit)
            if width > units:
                continue
            tried = np.full_like(cost, np.inf)
            tried[width:] = cost[: len(cost) - width] + choice.cost
            pick[tried < best] = index
            np.minimum(best, tried, out=best)
        cost = best
        picks.append(pick)
    if not len(cost) or not np.isfinite(cost[-1]):
        raise UserError(
            f"the layers take {least / 2**20:.1f} MiB at the least, and the budget leaves "
            f"{budget / 2**20:.1f} MiB for them: give a larger --budget, or a smaller student."
        )
    at, chosen = units, []
    for layer, pick in zip(reversed(choices), reversed(picks)):
        choice = layer[pick[at]]
        chosen.append(choice)
        at -= -(-choice.size // unit)
    return chosen[::-1]


def float_bytes(model: nn.Module, plan: Mapping[str, QuantSpec]) -> int:
    """Bytes of everything that the plan leaves float16, each tensor once.

    With a plan, without the encoder's positions where they are the formula, which a packed folder
    does not hold; a model on the meta device is taken to have them.
    """
    formula = bool(plan) and (
        model.device.type == "meta" or sinusoidal_positions(model) is not None
    )
    packed = {id(model.get_submodule(name).weight) for name in plan}
    seen = {
        id(p): p.numel()
        for name, p in model.state_dict(keep_vars=True).items()
        if not (formula and name == POSITIONS)
    }
    return 2 * sum(count for key, count in seen.items() if key not in packed)


def model_size(model: nn.Module, plan: Mapping[str, QuantSpec]) -> int:
    """Bytes of the model packed as ``plan`` says, before entropy coding: codes, scales and tables,
    float16 for the rest."""
    packed = 0
    for name, spec in plan.items():
        weight: Any = model.get_submodule(name).weight
        packed += stored_bytes(len(weight), weight[0].numel(), spec)
    return packed + float_bytes(model, plan)


def overhead(plan: Mapping[str, QuantSpec]) -> int:
    """Bytes of config.json with its plan, of the other small files and of the header: 89 kB for
    whisper-base, and 100 kB where its layers have steps, about 950 a layer."""
    return 8192 + 1000 * len(plan)


def fit_budget(
    model: Any,
    recipe: Recipe,
    budget: int,
    batches: Sequence[Mapping[str, Tensor]],
    say: Callable[[str], object] = print,
    kept: Kept | None = None,
) -> Recipe:
    """``recipe`` with an override a layer, so that the folder takes at most ``budget`` bytes.

    model: float, on any device; batches: as of ``dqw.speech``, of which some windows are
    used. The plan is said in a few lines; layers whose bits an override of the recipe gives keep
    them. ``kept``: where sensitivities are kept. Raises UserError if the budget cannot be met.
    """
    start = time.monotonic()
    plan = recipe.plan(model)
    free = {
        name: recipe.at_any_bits(name, spec, model.get_submodule(name))
        for name, spec in plan.items()
        if not recipe.sets_bits(name)
    }
    with lowered(model):
        probe = Probe(model, few(batches, WINDOWS))
        with progress_bar("sensitivities", len(free)) as advance:
            by_steps = recipe.quant.allocate == "steps"
            known = kept.choices(free) if kept is not None else {}
            keep = kept.keep_choices if kept is not None else None
            measured = sensitivities(model, free, probe, by_steps, advance, known, keep)
    found = {name: measured.get(name) or [_as_told(model, name, plan[name])] for name in plan}
    rest = float_bytes(model, plan) + overhead(plan)
    chosen = dict(zip(found, allocate(list(found.values()), budget - rest)))
    seconds = f"{time.monotonic() - start:.0f} s"
    before = f", {len(known)} of them before" if known else ""
    say(f"sensitivities of {len(free)} layers measured in {seconds}{before}")
    for line in described(chosen):
        say(line)
    total = rest + sum(choice.size for choice in chosen.values())
    cost = sum(choice.cost for choice in chosen.values())
    say(f"plan: {total / 2**20:.2f} of {budget / 2**20:.2f} MiB, KL of about {cost:.4f} expected")
    specs = one_table({name: choice.spec for name, choice in chosen.items()})
    overrides = [_override(name, spec) for name, spec in specs.items()]
    quant = replace(recipe.quant, override=[*recipe.quant.override, *overrides])
    return replace(recipe, quant=quant)


def one_table(specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    """``specs`` with the most bits of query, key and value for all three in self-attention, where
    they have steps: a GPU then multiplies them in one launch. Steps, and errors, stay."""
    found = dict(specs)
    for name in specs:
        if not name.endswith(ONE_TABLE[0]):
            continue
        names = [name.removesuffix(ONE_TABLE[0]) + own for own in ONE_TABLE]
        if all(n in specs and specs[n].step is not None for n in names):
            bits = max(specs[n].bits for n in names)
            found |= {n: replace(specs[n], bits=bits) for n in names}
    return found


def _override(name: str, spec: QuantSpec) -> Override:
    if spec.step is not None:
        return Override(match=name, bits=spec.bits, step=spec.step)
    return Override(name, bits=spec.bits, grid=spec.grid, group_size=spec.group_size or 0)


def _as_told(model: Any, name: str, spec: QuantSpec) -> Choice:
    """The one choice of a layer whose bits or step the recipe's own override gives."""
    return told(model.get_submodule(name).weight.detach().flatten(1), spec)


def few(batches: Sequence[Mapping[str, Tensor]], windows: int) -> list[dict[str, Tensor]]:
    """At most ``windows`` windows, evenly spaced over all, as one batch: input_features (n, mels,
    frames), decoder_input_ids and decoder_mask (n, longest)."""

    def window(batch: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = batch["decoder_input_ids"]
        mask = batch.get("decoder_mask", torch.ones_like(ids, dtype=torch.bool))
        return batch["input_features"][i], ids[i], mask[i]

    places = [(batch, i) for batch in batches for i in range(len(batch["decoder_input_ids"]))]
    features, ids, masks = zip(*(window(batch, i) for batch, i in spread(places, windows)))
    return [
        {
            "input_features": torch.stack(features),
            "decoder_input_ids": pad_sequence(list(ids), batch_first=True),
            "decoder_mask": pad_sequence(list(masks), batch_first=True),
        }
    ]


def kind_of(name: str) -> str:
    """What a layer is, across depths: "encoder fc1", "decoder encoder_attn k_proj"."""
    parts = [p for p in name.removeprefix("model.").split(".") if not p.isdigit() and p != "layers"]
    return " ".join(parts)


def described(chosen: Mapping[str, Choice]) -> list[str]:
    """One line for each kind of layer: the bits of its layers, first to last, and the columns that
    share a scale, "3/16"; with steps, the bits a weight takes in the folder, "3.2"."""
    kinds: dict[str, list[Choice]] = {}
    for name, choice in chosen.items():
        kinds.setdefault(kind_of(name), []).append(choice)
    return [
        f"  {kind:32} {' '.join(map(_width, row))} bits, {sum(c.size for c in row) / 2**20:.2f} MiB"
        for kind, row in kinds.items()
    ]


def _width(choice: Choice) -> str:
    if choice.spec.step is not None:
        return f"{choice.rate:.1f}"
    group = choice.spec.group_size
    return f"{choice.spec.bits}/{group}" if group else str(choice.spec.bits)
