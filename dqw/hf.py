"""transformers reads and writes packed folders through this quantizer, registered as "dqw".

config.json carries ``quantization_config``: quant_method "dqw", format_version, the plan, layer
name → spec, and which tensors are entropy-coded, name → bytes. On load the layers of the plan
become empty packed modules and the folder's tensors fill them; on save the same tensors go back,
the float rest as float16. The encoder's positions are a formula and are not stored (1.5 MiB of
whisper-base's 39).
"""

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqw.coding import encoded, encoded_weight
from dqw.packing import FORMAT_VERSION, check_format, pack_scales
from dqw.recipe import QuantSpec

POSITIONS = "model.encoder.embed_positions.weight"


@register_quantization_config("dqw")
class DqwConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed folder.

    plan: layer name → ``QuantSpec.to_dict()``. coded: tensor → bytes, of those that are
    entropy-coded. Raises UserError for a format this version of dqw does not read.
    """

    def __init__(
        self,
        plan: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        coded: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = "dqw"  # type: ignore[assignment]
        self.plan = plan or {}
        self.format_version = format_version
        self.coded = coded or {}
        for key, value in kwargs.items():  # e.g. how the model was trained; kept as it is
            if key != "quant_method":
                setattr(self, key, value)
        check_format(format_version)

    def specs(self) -> dict[str, QuantSpec]:
        return {name: QuantSpec.from_dict(spec) for name, spec in self.plan.items()}


@register_quantizer("dqw")
class DqwQuantizer(HfQuantizer):
    """Loads and saves packed models; quantizing one is the work of ``dqw.quantize``."""

    requires_calibration = True  # from_pretrained of a float folder with a DqwConfig says so
    quantization_config: DqwConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from dqw.convert import swap_empty

        swap_empty(model, self.quantization_config.specs(), self.quantization_config.coded)
        # Not stored: transformers fills it by its formula, as it does for every new model.
        ignored = list(model._keys_to_ignore_on_load_missing or [])
        model._keys_to_ignore_on_load_missing = [*ignored, re.escape(POSITIONS)]
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Float tensors take the module's dtype. ``dtype`` is that of the empty tensor, so scales
        of rows keep theirs: without this, loading as bfloat16 would cast them silently."""
        return dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from dqw.convert import decode, quant_modules

        decode(model)
        for module in quant_modules(model).values():
            module.unpack_scales()
        _speed_up(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        from dqw.convert import stored_plan

        # config.json is written after this: what it says of the layers is to be what they are now,
        # and a checksum of other bytes would have the folder refused (save.py seals its own).
        self.quantization_config.plan = stored_plan(model)
        self.quantization_config.format_version = FORMAT_VERSION
        vars(self.quantization_config).pop("weights_sha256", None)
        state, self.quantization_config.coded = coded_state(model)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from dqw.convert import dequantize

        # transformers hands over config.dtype, which save_pretrained turns into a string.
        return dequantize(model).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model``'s state as it is stored: packed tensors as they are, scales of groups as bytes, the
    float rest as float16, without what the architecture's formula gives."""
    from dqw.convert import quant_modules

    left_out = {POSITIONS} if sinusoidal_positions(model) is not None else set()
    scales = {f"{name}.scale" for name in quant_modules(model)}
    halves: dict[int, torch.Tensor] = {}  # one of each: save_pretrained sees what is tied by it

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in scales:  # float16: of groups
            return pack_scales(tensor) if tensor.dtype == torch.float16 else tensor
        if not tensor.is_floating_point():
            return tensor
        return halves.setdefault(tensor.data_ptr(), tensor.half())

    state = model.state_dict().items()
    return {name: stored(name, tensor) for name, tensor in state if name not in left_out}


def coded_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """``packed_state`` with the tensors entropy-coded that are smaller so, and their bytes."""
    from dqw.convert import quant_modules

    state, coded = packed_state(model), {}
    for layer, module in quant_modules(model).items():
        size = module.rows, module.cols, module.spec.bits
        for name in (f"{layer}.weight", f"{layer}.scale"):
            tensor = state[name]
            if tensor.dtype != torch.uint8:
                continue  # scales of rows
            stream = encoded_weight(tensor, *size) if name.endswith(".weight") else encoded(tensor)
            if len(stream) < len(tensor):
                state[name], coded[name] = stream, len(stream)
    return state, coded


def sinusoidal_positions(model: Any) -> torch.Tensor | None:
    """The exact sinusoids, float32 (positions, width), if ``model``'s encoder positions are those
    to within what storing them as bfloat16 does; None if they were trained or there are none."""
    try:
        weight = model.get_parameter(POSITIONS)
    except AttributeError:
        return None
    from transformers.models.whisper.modeling_whisper import sinusoids

    exact: torch.Tensor = sinusoids(*weight.shape).to(weight.device)
    return exact if torch.allclose(weight.float(), exact, rtol=0, atol=2.0**-8) else None


def attach(model: Any, **extra: Any) -> None:
    """Make a frozen ``model`` one that ``save_pretrained`` writes as a packed folder.

    ``extra``: more keys for quantization_config, plain JSON values.
    """
    from dqw.convert import stored_plan

    config = DqwConfig(plan=stored_plan(model), **extra)
    model.hf_quantizer = DqwQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = "dqw"
    _speed_up(model)


def _speed_up(model: Any) -> None:
    if getattr(model.config, "model_type", None) == "whisper":
        from dqw.whisper.fast_model import speed_up

        speed_up(model)
