"""Quantised large language models: the program's engine, and packed layers for models of Transformers.

`MarlinPipeline` runs the engine. `replace_linear_layers`, `replace_moe_layers` and `from_pretrained` put packed layers into
models of Transformers, which need torch and transformers (`pip install metal-marlin[transformers]`). Importing this package lets
`AutoModelForCausalLM.from_pretrained` open the folders that `quantize` writes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _transformers_hook
from ._native import __version__

if TYPE_CHECKING:
    from .commands import evaluate, quantize, verify_kernels
    from .inference.pipeline import MarlinPipeline
    from .layers import MetalQuantizedEmbedding, MetalQuantizedLinear
    from .loader import from_pretrained
    from .moe import MetalQuantizedMoE, find_moe_layers, quantize_moe_experts
    from .quantizer import MetalMarlinConfig
    from .replace import replace_linear_layers, replace_moe_layers, set_activations

__all__ = [
    "MarlinPipeline",
    "MetalMarlinConfig",
    "MetalQuantizedEmbedding",
    "MetalQuantizedLinear",
    "MetalQuantizedMoE",
    "__version__",
    "evaluate",
    "find_moe_layers",
    "from_pretrained",
    "quantize",
    "quantize_moe_experts",
    "replace_linear_layers",
    "replace_moe_layers",
    "set_activations",
    "verify_kernels",
]

# Imported when they are used, for some need torch, which takes seconds.
_MODULES = {
    "MarlinPipeline": "inference.pipeline",
    "MetalMarlinConfig": "quantizer",
    "MetalQuantizedEmbedding": "layers",
    "MetalQuantizedLinear": "layers",
    "MetalQuantizedMoE": "moe",
    "evaluate": "commands",
    "find_moe_layers": "moe",
    "from_pretrained": "loader",
    "quantize": "commands",
    "quantize_moe_experts": "moe",
    "replace_linear_layers": "replace",
    "replace_moe_layers": "replace",
    "set_activations": "replace",
    "verify_kernels": "commands",
}

_transformers_hook.register()


def __getattr__(name: str) -> Any:
    """Imports what is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            raise ImportError(f"metal_marlin.{name} needs {error.name}: pip install metal-marlin[transformers]") from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All that can be asked for."""
    return sorted({*globals(), *__all__})
