"""A model's life in quantization: ``quantize`` → train → ``freeze``, each in place.

float Whisper → ``quantize`` swaps modules that learn → ``freeze`` turns them into packed codes.
``dequantize`` goes back to plain float modules with the quantized weights.
"""

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from dqw.conv import QuantConv1d, unsupported_conv
from dqw.embedding import QuantEmbedding, TiedProjection, unsupported_embedding
from dqw.errors import UserError
from dqw.linear import QuantLinear, QuantModule
from dqw.recipe import ACTIVATIONS, QuantSpec, Recipe
from dqw.together import forget_together, round_together


def quant_modules(model: nn.Module) -> dict[str, QuantModule]:
    """Name → module for every module of ``model`` that holds a quantized weight."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantModule)}


def stored_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name → spec as plain values, for every quantized layer: what a packed folder says of them."""
    return {name: module.spec.to_dict() for name, module in quant_modules(model).items()}


def quantize(
    model: nn.Module,
    recipe: Recipe | None = None,
    progress: Callable[[str], object] | None = None,
) -> nn.Module:
    """Swap the layers of ``recipe``'s plan for modules that fake-quantize and learn, in place.

    Clips start at the least squared error, so the model as it comes back is post-training
    quantization. ``progress`` is called with each layer's name. Raises UserError, with nothing
    swapped, if the model is quantized already, the recipe's patterns match nothing, there is
    nothing to quantize, or a layer does more than its quantized twin could.
    """
    recipe = recipe or Recipe()
    if quant_modules(model):
        raise UserError("the model is quantized already: start from a float checkpoint.")
    rest, plan = recipe.rest_spec(), recipe.plan(model)
    _check_layers(model, plan)
    places = _Places(model)
    for name, spec in plan.items():
        if progress is not None:
            progress(name)
        module = model.get_submodule(name)
        layer_rest = rest if isinstance(module, nn.Linear) else None
        places.put(name, _learning(module, spec, layer_rest))
    _tie_projection(model)
    round_together(model)
    return model


class _Places:
    """Every name of every module: one may stand in several places."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)

    def put(self, name: str, module: nn.Module) -> None:
        """Put ``module`` wherever what is called ``name`` stands."""
        for place in self.names[id(self.model.get_submodule(name))]:
            self.model.set_submodule(place, module)


def _check_layers(model: nn.Module, plan: Mapping[str, QuantSpec]) -> None:
    if not plan:
        raise UserError(
            "the model has nothing to quantize: no nn.Linear, nn.Conv1d or embed_tokens that the "
            "recipe takes."
        )
    for name in plan:
        module = model.get_submodule(name)
        fault = ""
        if isinstance(module, nn.Conv1d):
            fault = unsupported_conv(module)
        elif isinstance(module, nn.Embedding):
            fault = unsupported_embedding(module)
        if fault:
            raise UserError(f"{name} has {fault}, which its quantized twin has not: skip it.")
    _check_tied(model, plan)


def _check_tied(model: nn.Module, plan: Mapping[str, QuantSpec]) -> None:
    """Raise UserError where the plan has an embedding that the output projection does not read: a
    folder could not hold both."""
    embedding = _input_embedding(model)
    if not any(embedding is model.get_submodule(name) for name in plan):
        return
    projection = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(projection, "weight", None)
    if isinstance(projection, nn.Linear) and weight is not embedding.weight:  # type: ignore[union-attr]
        raise UserError(
            "this model's output projection is not its embedding, and dqw packs the two as one: "
            "leave the embedding float (--embedding-bits 0)."
        )


def packed_copy(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A packed model by ``recipe`` beside ``model``, which stays as it is: what is packed is not
    copied first, what is not has a copy, as ``freeze`` rounds it."""
    weights: list[Any] = [model.get_submodule(name).weight for name in recipe.plan(model)]
    return freeze(quantize(copy.deepcopy(model, {id(w): w for w in weights}), recipe))


def _learning(module: nn.Module, spec: QuantSpec, rest: QuantSpec | None) -> QuantModule:
    if isinstance(module, nn.Linear):
        return QuantLinear.from_linear(module, spec, rest)
    if isinstance(module, nn.Conv1d):
        return QuantConv1d.from_conv(module, spec, rest)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_embedding(module, spec, rest)
    raise TypeError(f"no quantized twin for {type(module).__name__}")


def _tie_projection(model: nn.Module) -> None:
    """Let the output projection read the quantized embedding, if the two were tied."""
    embedding = _input_embedding(model)
    if not isinstance(embedding, QuantEmbedding):
        return
    projection = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(projection, nn.Linear) and (
        projection.weight is embedding.weight or embedding.frozen
    ):
        model.set_output_embeddings(TiedProjection(embedding))  # type: ignore[operator]
        # transformers would look for the tied weight's name in every load and save.
        model._tied_weights_keys = {}  # type: ignore[assignment]
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _input_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    return get() if get is not None else None


def swap_empty(
    model: nn.Module, plan: dict[str, QuantSpec], coded: dict[str, int] | None = None
) -> None:
    """Swap every layer of ``plan`` for an empty packed module on the same device, in place.

    For loading: the folder's tensors are put into them afterwards, and those that ``coded`` gives
    the bytes of are for ``decode``. Raises UserError for a layer the model does not have.
    """
    coded, places = coded or {}, _Places(model)
    for name, spec in plan.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            if name.startswith("model.") and not hasattr(model, "model"):
                raise UserError(
                    f"packed folders hold a whole Whisper, not a {type(model).__name__}: load it "
                    "with WhisperForConditionalGeneration and take its .model."
                ) from error
            raise UserError(
                f"the folder's plan names the layer {name!r}, which a model of its config.json "
                "does not have: the folder is damaged, write it again."
            ) from error
        empty = _empty(module, spec)
        empty.dtype = next(module.parameters()).dtype
        empty.await_stored({p: coded.get(f"{name}.{p}") for p in ("weight", "scale")})
        places.put(name, empty)
    _tie_projection(model)


def decode(model: nn.Module) -> None:
    """Decode what a folder's coded tensors were put into, in place; two at once, as each thread
    has torch's own beside it."""
    modules = [module for module in quant_modules(model).values() if module.coded]
    with ThreadPoolExecutor(min(torch.get_num_threads(), 2)) as pool:
        for module, tensors in zip(modules, pool.map(QuantModule.decoded, modules)):
            module.take(tensors)


def _empty(module: nn.Module, spec: QuantSpec) -> QuantModule:
    device = next(module.parameters()).device
    if isinstance(module, nn.Linear):
        size = module.in_features, module.out_features
        return QuantLinear(*size, module.bias is not None, spec, device)
    if isinstance(module, nn.Embedding):
        table = module.num_embeddings, module.embedding_dim
        return QuantEmbedding(*table, spec, module.padding_idx, device)
    if isinstance(module, nn.Conv1d):
        return QuantConv1d(
            module.in_channels,
            module.out_channels,
            module.kernel_size[0],
            spec,
            module.stride[0],
            int(module.padding[0]),
            module.bias is not None,
            device,
        )
    raise UserError(f"the folder's plan names a {type(module).__name__}, which dqw cannot pack.")


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """Turn every learning module into packed codes, in place, ready for ``save_pretrained``.

    Modules that guidance left out go to their rest bits, or back to plain float layers. What stays
    float in a model of transformers is rounded to float16 here, as it will be stored, so that the
    model in memory and the folder give the same results. Raises UserError if there is nothing to
    freeze.
    """
    modules = quant_modules(model)
    if not modules:
        raise UserError(
            "the model has no quantized layers: call dqw.quantize(model, recipe) first."
        )
    places = _Places(model)
    for name, module in modules.items():
        if module.stays_float:
            places.put(name, _plain(module))
        else:
            module.freeze()
    forget_together(model)
    if hasattr(model, "config"):
        from transformers import PreTrainedModel

        from dqw.hf import attach

        if isinstance(model, PreTrainedModel):
            round_float_rest(model)
            attach(model)
    return model.eval()


@torch.no_grad()
def round_float_rest(model: nn.Module) -> None:
    """Round every float tensor that is not a latent weight or a clip to float16, keeping dtypes;
    the encoder's sinusoids, which are not stored, become exact."""
    from dqw.hf import POSITIONS, sinusoidal_positions

    own = {id(t) for m in quant_modules(model).values() for t in _quantized_tensors(m)}
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and id(tensor) not in own:
            tensor.data.copy_(tensor.data.half())
    exact = sinusoidal_positions(model)
    if exact is not None:
        model.get_parameter(POSITIONS).data.copy_(exact)


def _quantized_tensors(module: QuantModule) -> list[torch.Tensor]:
    """The tensors of ``module`` that are its quantized weight's: not its bias."""
    own = [module.weight, *module.buffers(recurse=False)]
    for quantizer in (module.quantizer, module.rest_quantizer):
        if quantizer is not None:
            own += [*quantizer.parameters(), *quantizer.buffers()]
    return own


def _plain(module: QuantModule) -> nn.Module:
    if isinstance(module, QuantLinear):
        return module.to_linear()
    if isinstance(module, QuantConv1d):
        return module.to_conv()
    assert isinstance(module, QuantEmbedding)
    return module.to_embedding()


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantized module by a plain float one with the same weights, in place.

    ``save_pretrained`` then writes an ordinary Whisper folder.
    """
    embedding, places = _input_embedding(model), _Places(model)
    for name, module in quant_modules(model).items():
        places.put(name, _plain(module))
    forget_together(model)
    if isinstance(embedding, QuantEmbedding):
        projection = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        model.set_output_embeddings(projection)  # type: ignore[operator]
        if "_tied_weights_keys" in vars(model):
            del model._tied_weights_keys
        projection.weight = _input_embedding(model).weight  # type: ignore[union-attr, assignment]
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(  # type: ignore[operator]
            all_submodels=False
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # else save_pretrained would write the plan of layers that are gone
        quantizer.remove_quantization_config(model)
    return model


def choose_activations(model: nn.Module, activations: str, device: str = "cpu") -> nn.Module:
    """``set_activations``, or "auto" for those that suit the device: on a CPU what the model was
    made with; float on a GPU, where int8 is no faster.

    Raises UserError for other words, and where nothing in ``model`` is quantized.
    """
    if activations == "auto":
        return set_activations(model, "float") if device == "cuda" else model
    if not quant_modules(model):
        raise UserError("the model is not packed: leave --activations out, or dqw compress it.")
    return set_activations(model, activations)


def set_activations(model: nn.Module, activations: str) -> nn.Module:
    """Switch every quantized matrix product to "float" or "int8" activations, in place.

    int8 is faster on a CPU; float is closer to the original. Convolutions stay float.
    """
    from dataclasses import replace

    if activations not in ACTIVATIONS:
        raise UserError(f"activations is {activations!r}: choose 'float' or 'int8'.")
    for module in quant_modules(model).values():
        if not isinstance(module, QuantConv1d):
            module.spec = replace(module.spec, activations=activations)
    return model
