"""dqw: Whisper made small and fast by joint distillation and quantization.

    import dqw
    model = WhisperForConditionalGeneration.from_pretrained(DIR)  # a packed folder

``import dqw`` is free: names below load on first use, and transformers learns to read packed
folders the moment it loads its quantizers.
"""

from importlib import import_module
from typing import Any

from dqw import hf_hook as _hf_hook

__version__ = "0.1.0"

_EXPORTS = {
    "FakeQuantize": "dqw.fake_quant",
    "QuantConv1d": "dqw.conv",
    "QuantEmbedding": "dqw.embedding",
    "QuantLinear": "dqw.linear",
    "QuantSpec": "dqw.recipe",
    "Recipe": "dqw.recipe",
    "TiedProjection": "dqw.embedding",
    "UserError": "dqw.errors",
    "backend_info": "dqw.ops",
    "dequantize": "dqw.convert",
    "freeze": "dqw.convert",
    "quant_modules": "dqw.convert",
    "quantize": "dqw.convert",
    "set_activations": "dqw.convert",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dqw' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_hf_hook.install()
