"""A packed folder as a tree of its tensors, without transformers.

``skeleton(config)`` has the modules, names and shapes of transformers' Whisper and nothing that
computes: the native networks (``fast``) read their tensors from it. ``load(folder)`` fills it from
model.safetensors: coded tensors are decoded, the others stay mapped into memory, and the networks
read scales of groups as bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dqw.convert import decode, swap_empty
from dqw.errors import UserError
from dqw.packing import FORMAT_VERSION, check_format
from dqw.recipe import QuantSpec

POSITIONS = "model.encoder.embed_positions.weight"


class Skeleton(nn.Module):
    """``model.encoder``, ``model.decoder`` and ``proj_out`` of a Whisper of this config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        shapes = SimpleNamespace(**{"activation_function": "gelu", "scale_embedding": False})
        shapes.__dict__.update(config)
        self.config = shapes
        self.generation_config = SimpleNamespace()
        self.model: Any = nn.Module()
        encoder: Any = _part(shapes, "encoder", shapes.max_source_positions)
        encoder.conv1 = nn.Conv1d(shapes.num_mel_bins, shapes.d_model, 3, padding=1)
        encoder.conv2 = nn.Conv1d(shapes.d_model, shapes.d_model, 3, 2, padding=1)
        decoder: Any = _part(shapes, "decoder", shapes.max_target_positions)
        decoder.embed_tokens = _table(shapes.vocab_size, shapes.d_model)
        self.model.encoder, self.model.decoder = encoder, decoder
        projection: Any = nn.Linear(shapes.d_model, shapes.vocab_size, bias=False)
        projection.weight = decoder.embed_tokens.weight
        self.proj_out = projection

    def get_input_embeddings(self) -> Any:
        return self.model.decoder.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.proj_out

    def set_output_embeddings(self, projection: Any) -> None:
        self.proj_out = projection


def _part(config: Any, name: str, positions: int) -> Any:
    part: Any = nn.Module()
    part.config = config
    layers = [
        _layer(config.d_model, getattr(config, f"{name}_ffn_dim"), name == "decoder")
        for _ in range(getattr(config, f"{name}_layers"))
    ]
    part.layers = nn.ModuleList(layers)
    part.layer_norm = nn.LayerNorm(config.d_model)
    part.embed_positions = _table(positions, config.d_model)
    return part


def _table(rows: int, width: int) -> nn.Embedding:
    """With a weight of its own nn.Embedding draws no random one, for which torch would import its
    compiler (1.5 s, 100 MB)."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def _layer(width: int, inner: int, crosses: bool) -> nn.Module:
    layer: Any = nn.Module()
    for name in ("self_attn", "encoder_attn")[: 1 + crosses]:
        attention: Any = nn.Module()
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = nn.Linear(width, width, bias=projection != "k_proj")
            setattr(attention, projection, linear)
        setattr(layer, name, attention)
        setattr(layer, f"{name}_layer_norm", nn.LayerNorm(width))
    layer.fc1, layer.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
    layer.final_layer_norm = nn.LayerNorm(width)
    return layer


def skeleton(config: dict[str, Any]) -> Skeleton:
    """The tree of a packed folder's config.json, without data, in eval mode.

    Raises UserError if its plan does not fit it or is of another format.
    """
    stored = config["quantization_config"]
    check_format(stored.get("format_version", FORMAT_VERSION))
    plan = {name: QuantSpec.from_dict(spec) for name, spec in stored["plan"].items()}
    with torch.device("meta"):
        model = Skeleton(config)
        swap_empty(model, plan, stored.get("coded"))
    return model.eval()


def load(folder: Path, config: dict[str, Any]) -> Skeleton:
    """The tree of a packed folder, filled: packed tensors as the networks read them, the float rest
    as float32. Raises UserError if the file's tensors are not those of config.json."""
    from safetensors import safe_open

    model = skeleton(config)
    kept = {name for name in model.state_dict() if name.endswith(".scale")}
    state = dict[str, Tensor]()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            tensor = file.get_tensor(name)
            rest = tensor.is_floating_point() and name not in kept
            state[name] = tensor.float() if rest else tensor
    if POSITIONS not in state:
        state[POSITIONS] = sinusoids(config["max_source_positions"], config["d_model"])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    table, projection = "model.decoder.embed_tokens.weight", "proj_out.weight"
    if projection in shapes and table in state and config.get("tie_word_embeddings", True):
        state.setdefault(projection, state[table])  # a float one, stored once
    faults = [name for name in {**shapes, **state} if name not in shapes or name not in state]
    faults += [name for name in shapes if name in state and state[name].shape != shapes[name]]
    if faults:
        raise UserError(
            f"{folder} does not hold the weights its config.json speaks of ({len(faults)} tensors "
            f"missing, unknown or of another shape, such as {faults[0]}); copy the folder again"
        )
    model.load_state_dict(state, assign=True)
    decode(model)
    return model.requires_grad_(False)


def sinusoids(positions: int, width: int) -> Tensor:
    """The encoder's positions (positions, width) float32: sines of wavelengths up to 2 pi 10000,
    then cosines."""
    half = width // 2
    speeds = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(positions).view(-1, 1) * speeds.view(1, -1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
