"""Mutual guidance: losses of one kind choose the layers that the other kind works on.

The quantization loss of a layer (how far its output moves when its weights are rounded) chooses
which layers are distilled: those that quantization hurts get help first. The distillation loss of
a layer (how far it is from its teacher layer) chooses which layers are quantized: those that match
well already can bear it first. Both directions, both ratios, the interval and the smoothing are
settings; DQ-Whisper's abstract names the two rules and leaves the rest open.

The unit of choice is a transformer layer, `model.encoder.layers.3`; quantized modules below it
follow it. Embedding and convolutions belong to no unit and are always quantized.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqw.distill.config import GuidanceConfig
from dqw.distill.layers import STACKS, layer_name, stack_layers
from dqw.linear import QuantModule

Losses = dict[str, float]


@dataclass(frozen=True)
class Choice:
    """Which layers are quantized and which are distilled, by name, in the model's order."""

    quantized: tuple[str, ...]
    distilled: tuple[str, ...]


def choose(
    losses: Mapping[str, float], ratio: float, first: str, scope: str = "stack"
) -> tuple[str, ...]:
    """The share `ratio` of the layers with the `largest` or `smallest` loss, in given order.

    Half a layer is rounded up to one; a positive ratio chooses at least one layer of each group.
    Ties go to the layer that comes first. `scope`: `stack` ranks encoder and decoder apart.
    """
    groups: dict[str, list[str]] = {}
    for name in losses:
        groups.setdefault(name.split(".")[1] if scope == "stack" else "", []).append(name)
    chosen: set[str] = set()
    sign = -1.0 if first == "largest" else 1.0
    for names in groups.values():
        order = {name: place for place, name in enumerate(names)}
        ranked = sorted(names, key=lambda name: (sign * losses[name], order[name]))
        count = max(int(ratio * len(names) + 0.5), 1) if ratio > 0 else 0
        chosen.update(ranked[:count])
    return tuple(name for name in losses if name in chosen)


class Guidance:
    """The state of mutual guidance over one run; its `state_dict` is plain JSON.

    `choice` holds from construction on: until the first `update` every layer is in it.
    `distilled_stacks`: the stacks whose hidden states are compared. A layer of another stack has
    no distillation loss: it is never distilled, and always quantized. Where none is compared,
    `random` chooses among all layers which are quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GuidanceConfig,
        distilled_stacks: tuple[str, ...] = STACKS,
    ) -> None:
        self.config = config
        self.units: dict[str, nn.Module] = {
            layer_name(stack, index): layer
            for stack in STACKS
            for index, layer in enumerate(stack_layers(model, stack))
        }
        self.quant_loss: Losses = {}
        self.distill_loss: Losses = {}
        self.updates = 0
        self.compared = tuple(n for n in self.units if n.split(".")[1] in distilled_stacks)
        self.choice = Choice(tuple(self.units), self.compared)

    @property
    def needs_losses(self) -> bool:
        """Whether the mode reads measured losses, so a probe of the model is due at updates."""
        return self.config.mode in ("quant_guided", "distill_guided", "mutual")

    @property
    def active(self) -> bool:
        return self.config.mode != "all"

    def due(self, step: int) -> bool:
        """Whether a choice is made before optimizer step `step` (0-based)."""
        return self.active and step % self.config.interval == 0

    def update(
        self, quant_loss: Losses | None = None, distill_loss: Losses | None = None
    ) -> Choice:
        """Take in measured losses, choose, and set `chosen` on the quantized modules.

        `quant_loss` names every unit, `distill_loss` those of the compared stacks; both may be
        None for `random` and `all`.
        """
        config = self.config
        smooth(self.quant_loss, quant_loss or {}, config.smoothing)
        smooth(self.distill_loss, distill_loss or {}, config.smoothing)
        quantized, distilled = tuple(self.units), self.compared
        if config.mode == "random":
            dice = random.Random(f"{config.seed} {self.updates}")
            luck = {name: dice.random() for name in self.compared or self.units}
            chosen = choose(luck, config.quantize_ratio, "smallest", config.scope)
            quantized = tuple(n for n in self.units if n in chosen or n not in luck)
            luck = {name: dice.random() for name in self.compared}
            distilled = choose(luck, config.distill_ratio, "smallest", config.scope)
        if config.mode in ("distill_guided", "mutual"):
            losses = {name: self.distill_loss[name] for name in self.compared}
            chosen = choose(losses, config.quantize_ratio, config.quantize_first, config.scope)
            quantized = tuple(n for n in self.units if n in chosen or n not in losses)
        if config.mode in ("quant_guided", "mutual"):
            losses = {name: self.quant_loss[name] for name in self.compared}
            distilled = choose(losses, config.distill_ratio, config.distill_first, config.scope)
        self.updates += 1
        self.choice = Choice(quantized, distilled)
        self.apply()
        return self.choice

    def apply(self) -> None:
        """Set `chosen` on every quantized module inside a unit."""
        for name, unit in self.units.items():
            for module in _quant_modules(unit):
                module.chosen = name in self.choice.quantized

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "quant_loss": self.quant_loss,
            "distill_loss": self.distill_loss,
            "quantized": list(self.choice.quantized),
            "distilled": list(self.choice.distilled),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.quant_loss = dict(state["quant_loss"])
        self.distill_loss = dict(state["distill_loss"])
        self.choice = Choice(tuple(state["quantized"]), tuple(state["distilled"]))
        self.apply()


def smooth(old: Losses, new: Mapping[str, float], smoothing: float) -> None:
    """Moving average in place: old · smoothing + new · (1 − smoothing); a first value stands."""
    for name, value in new.items():
        old[name] = old[name] * smoothing + value * (1 - smoothing) if name in old else value


@contextmanager
def quantized_as(unit: nn.Module, quantized: bool) -> Iterator[None]:
    """Inside, the unit's modules are all quantized at their spec, or all plainly float."""
    modules = _quant_modules(unit)
    kept = [(module.chosen, module.rest_quantizer) for module in modules]
    for module in modules:
        module.chosen = quantized
        if not quantized:
            module.rest_quantizer = None
    try:
        yield
    finally:
        for module, (chosen, rest) in zip(modules, kept, strict=True):
            module.chosen, module.rest_quantizer = chosen, rest


class QuantLossProbe:
    """Measures every unit's quantization loss during one forward pass of the model.

    While open, each unit that holds quantized modules is also run with float weights on the input
    it meets (and with rounded ones, where it is not quantized now):

        loss = Σ(f_q(x) − f(x))² / Σ(f(x) − x)²

    what rounding changes, relative to what the layer adds to the residual stream. (Relative to its
    output, late layers would look harmless, because the stream they add to is large.) The cost is
    one or two more forward passes of the layers, on the few clips of a probe.
    """

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self.units = units

    @contextmanager
    def open(self) -> Iterator[Losses]:
        losses: Losses = {name: 0.0 for name in self.units}
        handles = []
        for name, unit in self.units.items():
            if not _quant_modules(unit):
                continue

            def measure(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                at: str = name,
            ) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                rounded = _first(output)
                if not all(part.chosen for part in _quant_modules(module)):
                    with torch.no_grad(), quantized_as(module, True):
                        rounded = _first(module.forward(*args, **kwargs))
                with torch.no_grad(), quantized_as(module, False):
                    exact = _first(module.forward(*args, **kwargs))
                moved = (rounded.float() - exact.float()).square().sum()
                added = (exact.float() - x.float()).square().sum()
                losses[at] = (moved / added.clamp_min(1e-30)).item()

            handles.append(unit.register_forward_hook(measure, with_kwargs=True))
        try:
            yield losses
        finally:
            for handle in handles:
                handle.remove()


def _quant_modules(unit: nn.Module) -> list[QuantModule]:
    return [m for m in unit.modules() if isinstance(m, QuantModule) and not m.frozen]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
