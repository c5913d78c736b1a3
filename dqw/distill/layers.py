"""A Whisper's transformer layers as the trainer sees them: names, and taps on their outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

STACKS = ("encoder", "decoder")


def stack_layers(model: nn.Module, stack: str) -> list[nn.Module]:
    """The layers of `stack` (encoder or decoder) of a WhisperForConditionalGeneration."""
    return list(model.get_submodule(f"model.{stack}.layers").children())


def layer_name(stack: str, index: int) -> str:
    """The name of a transformer layer inside the model: `model.encoder.layers.3`."""
    return f"model.{stack}.layers.{index}"


class LayerTap:
    """Keeps what the layers of one stack put out while it is open.

    kind: `states` taps a layer's output, the residual stream before any later layer norm; `ffn`
    taps the activation inside the feed-forward block (4d wide). The values come from the one
    forward pass that is run anyway, so decoder states are made under the causal mask.
    """

    def __init__(self, model: nn.Module, stack: str, kind: str = "states") -> None:
        self.layers = stack_layers(model, stack)
        self.kind = kind

    @contextmanager
    def open(self, wanted: set[int] | None = None) -> Iterator[dict[int, Tensor]]:
        """A dict that fills with layer index → (batch, time, features) during the forward pass.

        `wanted`: which layers to keep; None keeps all.
        """
        seen: dict[int, Tensor] = {}
        handles = []
        for index, layer in enumerate(self.layers):
            if wanted is not None and index not in wanted:
                continue
            module = self._point(layer)

            def keep(_module: nn.Module, _inputs: object, output: object, at: int = index) -> None:
                # The first value stands: a probe may run a layer again afterwards.
                seen.setdefault(at, output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

            handles.append(module.register_forward_hook(keep))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _point(self, layer: nn.Module) -> nn.Module:
        if self.kind == "states":
            return layer
        activation = layer.activation_fn
        if not isinstance(activation, nn.Module):
            raise TypeError(f"{type(layer).__name__} has no activation module to tap")
        return activation
