"""A transformer layer's weights are fake-quantized in one call, as its forward pass begins.

``quantize`` gives every transformer layer of a model a pair of hooks: one that rounds the weights
of the layer's ``QuantLinear`` modules together and leaves each its own, and one that takes them
back at the end. So a step pays for the operator, its place in the graph and its way back once a
layer, not once a matrix. Values and gradients are those of the modules on their own, which is what
runs where the hooks do not: under torch.compile, with gradient checkpointing, in layers that are
not transformers' own (which may compute a part of themselves again, without the hooks), in a module
that is called by itself, for weights that are sharded or on learned grids, and where the layer
computes in another dtype than it was given.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqw.fake_quant import fake_quant_together
from dqw.linear import QuantLinear, product_dtype

_LAYER = re.compile(r"(.*?\.\d+)\.(.+)")  # name of a member of a ModuleList, and what is inside it

# In a layer's dictionary: the modules that hold a rounded weight, while it runs; and whether they
# hold it from run to run.
_HOLDERS, _STAY = "_dqw_rounded", "_dqw_stay"


class Together:
    """The hooks of one transformer layer; paths: its QuantLinear modules, by attribute.

    The modules are looked up from the layer at every call: its copies and replicas have their own.
    """

    def __init__(self, paths: list[tuple[str, ...]]) -> None:
        self.paths = paths

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        # Parameters and modules come from their dictionaries: nn.Module's own lookup goes through
        # Python, and a step does this for every matrix.
        if torch.compiler.is_compiling():
            return
        if _HOLDERS in layer.__dict__:
            if _STAY in layer.__dict__:
                return
            _let_go(layer)  # an interrupt, which hooks do not hear of, left them
        if layer.training and layer.gradient_checkpointing:
            return  # transformers' layers are computed again without their hooks
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        modules, weights, quantizers = [], [], []
        for path in self.paths:
            module: Any = layer
            for name in path:
                module = None if module is None else module._modules.get(name)
            if not isinstance(module, QuantLinear):  # another has taken its place
                continue
            weight = module._parameters.get("weight")
            quantizer = module._modules.get("quantizer" if module.chosen else "rest_quantizer")
            # A weight that is whole, and no replica's, on a table that stays.
            fixed = quantizer is not None and "table" in quantizer._buffers
            if fixed and type(weight) is nn.Parameter:
                modules.append(module)
                weights.append(weight)
                quantizers.append(quantizer)
        if not weights or any(w.device != x.device for w in weights):  # parted, or off-loaded
            return
        together = fake_quant_together(weights, quantizers, product_dtype(x))  # type: ignore[arg-type]
        layer.__dict__[_HOLDERS] = modules
        for module, rounded, quantizer in zip(modules, together, quantizers, strict=True):
            module.__dict__["rounded"], module.__dict__["rounded_by"] = rounded, quantizer

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        if _STAY not in layer.__dict__:
            _let_go(layer)


def _let_go(layer: nn.Module) -> None:
    for module in layer.__dict__.pop(_HOLDERS, ()):
        module.__dict__["rounded"] = module.__dict__["rounded_by"] = None


@contextmanager
def rounded_once(layer: nn.Module) -> Iterator[None]:
    """Within the block ``layer`` is run many times without gradients, and nothing of it changes:
    its weights are rounded at the first run, for all."""
    layer.__dict__[_STAY] = True
    try:
        yield
    finally:
        del layer.__dict__[_STAY]
        _let_go(layer)


def round_together(model: nn.Module) -> None:
    """Give the transformer layers of ``model`` their hooks, in place."""
    layers: dict[str, list[tuple[str, ...]]] = {}
    for name, module in model.named_modules():
        inside = _LAYER.fullmatch(name)
        if inside and isinstance(module, QuantLinear):
            layers.setdefault(inside[1], []).append(tuple(inside[2].split(".")))
    for name, paths in layers.items():
        together = Together(paths)
        layer = model.get_submodule(name)
        if not hasattr(layer, "gradient_checkpointing"):
            continue
        layer.register_forward_pre_hook(together.before)
        layer.register_forward_hook(together.after, always_call=True)


def forget_together(model: nn.Module) -> None:
    """Take the hooks off again, in place."""
    for module in model.modules():
        _let_go(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Together):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
