"""Registers dqw with transformers when transformers loads its quantizers, and not before.

transformers has no entry points for quantizers: somebody must import ours. Importing it from
``import dqw`` would cost every command two seconds, so a finder waits for
``transformers.quantizers.auto`` and adds ``dqw.hf`` right after it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _ThenRegister(Loader):
    """Loads the target with its own loader, then imports ``dqw.hf``."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import dqw.hf  # noqa: F401


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def install() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are."""
    if _TARGET in sys.modules:
        import dqw.hf  # noqa: F401
    else:
        sys.meta_path.insert(0, _Finder())
