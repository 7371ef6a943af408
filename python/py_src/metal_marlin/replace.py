"""Layers of a model in memory, replaced by packed ones."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar, cast

from torch import nn

from .layers import MetalQuantizedLinear
from .moe import MetalQuantizedMoE, find_moe_layers
from .schemes import resolve_scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The head, on whose precision every token depends, and what chooses experts.
DEFAULT_SKIP = ("lm_head", "gate", "router", "shared_expert_gate")

Model = TypeVar("Model", bound=nn.Module)


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a pattern is the name of a module or how it ends: "lm_head", "layers.0.*", "*.self_attn.k_proj"."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in skip)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what `torch.nn.Linear` does, of a weight of floats that nobody else reads."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and module.weight.is_floating_point()
    )


def replace_linear_layers(
    model: Model,
    layer_class: type[MetalQuantizedLinear] = MetalQuantizedLinear,
    bits: int | None = None,
    group_size: int | str | None = None,
    format: str | None = None,
    *,
    skip: Iterable[str] = DEFAULT_SKIP,
    search: str = "mse",
    activations: str = "int8",
) -> Model:
    """Quantises the linear layers of a model, in place, one by one; each original is freed before the next.

    Experts that a model of Transformers holds in one tensor are no linear layers: `replace_moe_layers` quantises them. All
    parameters of the model lose `requires_grad`, for quantised layers are for inference only. A model of Transformers can be
    saved with `save_pretrained` afterwards, as a checkpoint that `from_pretrained` and the program read.

    Args:
        model: Any module with `torch.nn.Linear` inside.
        layer_class: What takes their place, made by its `from_linear`.
        bits: As of `metal_marlin.schemes.resolve_scheme`, like the next two.
        group_size: See there.
        format: See there.
        skip: Layers to leave alone, by patterns of their names or of how these end. A head that is tied to the embedding and not
            skipped becomes a layer by itself; the embedding stays as it is.
        search: As of `MetalQuantizedLinear.from_linear`.
        activations: As of `MetalQuantizedLinear`.

    Returns:
        The model; a lone `torch.nn.Linear` is given back quantised.

    Raises:
        ValueError: There is nothing to quantise; the format is unknown, or does not fit a layer, which the message names.
    """
    scheme = resolve_scheme(bits, format, group_size)

    def quantized(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return layer_class.from_linear(linear, scheme=scheme, search=search, activations=activations)

    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)}
    hint = "; its experts are for replace_moe_layers" if not layers and find_moe_layers(model) else ""
    chosen = _choose(layers, skip, model, "linear layer", MetalQuantizedLinear, hint)
    del layers
    return _replace(model, chosen, quantized)


def replace_moe_layers(
    model: Model,
    layer_class: type[MetalQuantizedMoE] = MetalQuantizedMoE,
    bits: int | None = None,
    group_size: int | str | None = None,
    format: str | None = None,
    *,
    skip: Iterable[str] = (),
    search: str = "mse",
    activations: str = "int8",
) -> Model:
    """Quantises the experts of a model, in place, layer by layer; each original is freed before the next.

    Routers and shared experts stay as they are; the latter are linear layers, which `replace_linear_layers` quantises. Arguments
    and what becomes of the model are as there.

    Raises:
        TypeError: Experts compute something that is not supported; the message says what and where.
        ValueError: There is nothing to quantise; the format is unknown, or does not fit a layer, which the message names.
    """
    scheme = resolve_scheme(bits, format, group_size)

    def quantized(experts: nn.Module) -> nn.Module:
        return layer_class.from_experts(experts, scheme=scheme, search=search, activations=activations)

    layers = {name: module for name, module in find_moe_layers(model).items() if not isinstance(module, MetalQuantizedMoE)}
    chosen = _choose(layers, skip, model, "layer of experts", MetalQuantizedMoE, "")
    del layers
    return _replace(model, chosen, quantized)


def set_activations(model: Model, activations: str) -> Model:
    """Lets all quantised layers and experts of a model compute with other activations from now on, one after the other.

    For quantised checkpoints that `AutoModelForCausalLM.from_pretrained` opens, which begin with "int8"; other functions take
    `activations` themselves. Copies of the model stay as they are.

    Args:
        model: Any module with quantised ones inside.
        activations: As of `MetalQuantizedLinear`.

    Returns:
        The model.

    Raises:
        ValueError: There are no such activations, or nothing is quantised.
    """
    layers = [module for module in model.modules() if isinstance(module, MetalQuantizedLinear | MetalQuantizedMoE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer: replace_linear_layers and from_pretrained make them")
    for layer in layers:
        layer.set_activations(activations)
    return model


def _choose(
    layers: dict[str, nn.Module], skip: Iterable[str], model: nn.Module, kind: str, quantized: type[nn.Module], hint: str
) -> dict[str, nn.Module]:
    """Those that are not skipped. Raises ValueError if there are none, and says why."""
    chosen = {name: module for name, module in layers.items() if not is_skipped(name, skip)}
    if chosen:
        return chosen
    name = type(model).__name__
    if any(isinstance(module, quantized) for module in model.modules()):
        raise ValueError(f"every {kind} of {name} is quantised already, or skipped: load the original to quantise it otherwise")
    if layers:
        raise ValueError(f"every {kind} of {name} is skipped, for example {next(iter(layers))}: pass another skip")
    raise ValueError(f"{name} has no {kind} to quantise{hint}")


def _replace(model: Model, chosen: dict[str, nn.Module], quantized: Callable[[nn.Module], nn.Module]) -> Model:
    """Puts `quantized` modules in the places of those chosen, which it forgets one by one."""
    # Modules that have several names are quantised once.
    done: dict[nn.Module, nn.Module] = {}
    for name in list(chosen):
        module = chosen.pop(name)
        if module not in done:
            try:
                done[module] = quantized(module)
            except (TypeError, ValueError) as error:
                where = f"layer {name}" if name else "the layer"
                raise type(error)(f"{where} cannot be quantised: {error}") from error
        replacement = done[module] if module in chosen.values() else done.pop(module)
        if name == "":
            return replacement  # type: ignore[return-value]
        model.set_submodule(name, replacement)
        # Its weights are freed now, before the next ones are rounded.
        del module
    model.requires_grad_(False)
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        # So that `save_pretrained` writes how weights are packed.
        from .quantizer import attach_quantizer

        attach_quantizer(cast("PreTrainedModel", model))
    return model
