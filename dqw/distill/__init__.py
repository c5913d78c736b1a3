"""Joint distillation and quantization: losses, layer matching, mutual guidance, the trainer.

`distill(student, teacher, processor, items, output_dir)` is the way in. The settings
(`dqw.distill.config`) import without torch; everything else loads when it is asked for.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DistillConfig": "dqw.distill.config",
    "GuidanceConfig": "dqw.distill.config",
    "TrainConfig": "dqw.distill.config",
    "StepReport": "dqw.distill.progress",
    "TrainResult": "dqw.distill.run",
    "distill": "dqw.distill.run",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dqw.distill' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
