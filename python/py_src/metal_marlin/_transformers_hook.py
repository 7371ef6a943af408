"""Registers the quantiser with Transformers as soon as that has a registry.

Importing Transformers takes seconds, so `import metal_marlin` does not: whoever loads a model imports it anyway, before or after.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Registers now if the registry is there, else right after it is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if find_spec("torch") is None:
        return
    try:
        importlib.import_module(f"{__package__}.quantizer")
    except ImportError as error:
        # Transformers itself works, and is being imported.
        advice = "this transformers cannot open checkpoints of metal_marlin, for which 5.17 or newer is needed"
        warnings.warn(f"{advice}: {error}", stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Transformers' own, and then the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
