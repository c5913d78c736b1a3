"""transformers reads and writes packed folders through this quantizer, registered as "dqw".

config.json carries ``quantization_config``: quant_method "dqw", format_version, and the plan,
layer name → spec. On load the layers of the plan become empty packed modules and the folder's
tensors fill them; on save the same tensors go back, the float rest as float16.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqw.errors import UserError
from dqw.packing import FORMAT_VERSION
from dqw.recipe import QuantSpec


@register_quantization_config("dqw")
class DqwConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed folder.

    plan: layer name → ``QuantSpec.to_dict()``. Raises UserError for a format this version of dqw
    does not read.
    """

    def __init__(
        self,
        plan: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.quant_method = "dqw"  # type: ignore[assignment]
        self.plan = plan or {}
        self.format_version = format_version
        for key, value in kwargs.items():  # e.g. how the model was trained; kept as it is
            if key != "quant_method":
                setattr(self, key, value)
        if format_version != FORMAT_VERSION:
            raise UserError(
                f"the folder is in packed format {format_version}, and this dqw reads format "
                f"{FORMAT_VERSION}: install the dqw that wrote it."
            )

    def specs(self) -> dict[str, QuantSpec]:
        return {name: QuantSpec.from_dict(spec) for name, spec in self.plan.items()}


@register_quantizer("dqw")
class DqwQuantizer(HfQuantizer):
    """Loads and saves packed models; quantizing one is the work of ``dqw.quantize``."""

    requires_calibration = True  # from_pretrained of a float folder with a DqwConfig says so
    quantization_config: DqwConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from dqw.convert import swap_empty

        swap_empty(model, self.quantization_config.specs())
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Float tensors take the module's dtype. ``dtype`` is that of the empty tensor, so scales
        keep theirs: without this, loading as bfloat16 would cast them silently."""
        return dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _speed_up(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        return packed_state(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from dqw.convert import dequantize

        return dequantize(model).to(dtype)


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model``'s state as it is stored: packed tensors as they are, the float rest as float16."""
    from dqw.convert import quant_modules

    own = {f"{name}.scale" for name in quant_modules(model)}
    return {
        name: tensor.half() if tensor.is_floating_point() and name not in own else tensor
        for name, tensor in model.state_dict().items()
    }


def attach(model: Any, **extra: Any) -> None:
    """Make a frozen ``model`` one that ``save_pretrained`` writes as a packed folder.

    ``extra``: more keys for quantization_config, plain JSON values.
    """
    from dqw.convert import quant_modules

    plan = {name: m.spec.to_dict() for name, m in quant_modules(model).items()}
    config = DqwConfig(plan=plan, **extra)
    model.hf_quantizer = DqwQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = "dqw"
    _speed_up(model)


def _speed_up(model: Any) -> None:
    if getattr(model.config, "model_type", None) == "whisper":
        from dqw.whisper.fast_model import speed_up

        speed_up(model)
