"""The quantiser that Transformers finds for checkpoints of Metal Marlin.

It is imported while Transformers imports itself, and so asks no more of it than the registry.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._native import Checkpoint, Scheme
from ._runtime import scheme_fields
from .layers import MetalQuantizedEmbedding, MetalQuantizedLinear, PackedModule
from .moe import PARTS, MetalQuantizedMoE
from .replace import DEFAULT_SKIP
from .schemes import resolve_scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ._placement import Placement

METHOD = "metal-marlin"
_VERSION = 1


@register_quantization_config(METHOD)
class MetalMarlinConfig(QuantizationConfigMixin):
    """How a model is quantised as `AutoModelForCausalLM.from_pretrained(..., quantization_config=MetalMarlinConfig(...))` reads
    it.

    Of a checkpoint that is quantised already, config.json says how, and only what is not packed there could be quantised further;
    see `metal_marlin.from_pretrained` for that.
    """

    def __init__(
        self,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | str | None = None,
        skip: Iterable[str] = DEFAULT_SKIP,
        search: str = "mse",
        activations: str = "int8",
        *,
        quant_method: str = METHOD,
        version: int = _VERSION,
        schemes: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        rotations: dict[str, Any] | None = None,
    ) -> None:
        """Says how to quantise, or what is quantised.

        Args:
            bits: As of `replace_linear_layers`, like the next ones.
            format: See there.
            group_size: See there.
            skip: See there; applies to experts, too.
            search: See there.
            activations: See there.
            quant_method: As config.json has it.
            version: As config.json has it.
            schemes: As config.json has it: how matrices are stored, by name.
            tensors: As config.json has it: schemes and shapes of packed matrices.
            rotations: As config.json has it.

        Raises:
            ValueError: The format is unknown, or has not so many bits or such groups; the version is another.
        """
        if version != _VERSION:
            raise ValueError(
                f"quantization_config has version {version}; this release of metal_marlin reads {_VERSION}: update it"
            )
        if quant_method != METHOD:
            raise ValueError(f"quantization_config has quant_method {quant_method!r}, not {METHOD!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.bits = bits
        self.format = format
        self.group_size = group_size
        self.skip = tuple(skip)
        self.search = search
        self.activations = activations
        self.version = version
        self.schemes = schemes
        self.tensors = tensors
        self.rotations = rotations
        # Set by `metal_marlin.from_pretrained`, and for as long as it loads.
        self.source: Source | None = None
        resolve_scheme(bits, format, group_size)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it; of a model that is still to be quantised, the arguments."""
        if self.tensors is None:
            fields = ("quant_method", "bits", "format", "group_size", "skip", "search", "activations")
            return {name: list(value) if name == "skip" else value for name in fields for value in [getattr(self, name)]}
        stored = {"quant_method": METHOD, "version": self.version, "schemes": self.schemes, "tensors": self.tensors}
        return stored | ({"rotations": self.rotations} if self.rotations else {})

    def __iter__(self) -> Any:
        """What `dict()` makes of it."""
        yield from self.to_dict().items()


class Source:
    """What `metal_marlin.from_pretrained` hands the quantiser: an open checkpoint, and where to note which tensors are taken."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme | None) -> None:
        """Of a scheme for what is not packed; None leaves it."""
        self.checkpoint = checkpoint
        self.scheme = scheme
        self.taken: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        """Itself: Transformers copies configs, and an open file is what it is."""
        return self


@register_quantizer(METHOD)
class MetalMarlinQuantizer(HfQuantizer):
    """Puts packed modules into a model while Transformers loads it.

    Transformers reads what is not packed, and finds nothing to do in packed modules; these take their tensors from the checkpoint
    afterwards, one by one. So no matrix of the model is ever held in full precision but the one that is being rounded.
    """

    requires_calibration = False
    quantization_config: MetalMarlinConfig

    def __init__(self, quantization_config: MetalMarlinConfig, **kwargs: Any) -> None:
        """As Transformers makes it."""
        super().__init__(quantization_config, **kwargs)
        # Heads that share the packed embedding, which is stored once.
        self.tied: dict[str, str] = {}
        self._placement: Placement | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device that layers cannot be on."""
        devices = device_map.values() if isinstance(device_map, dict) else ()
        if unknown := sorted({str(device) for device in devices if torch.device(device).type not in ("cpu", "mps")}):
            raise ValueError(
                f"quantised layers compute on the CPU, but device_map names {', '.join(unknown)}: leave device_map out"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Everything is in host memory, wherever "auto" would put it."""
        return None if isinstance(device_map, str) else device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        from ._placement import Placement

        config = self.quantization_config
        source = config.source or Source(_open(checkpoint_files), self._scheme())
        if source.checkpoint.is_rotated():
            raise ValueError(
                f"{source.checkpoint.name} is quantised for rotated activations, which models of Transformers do not have: "
                "run it with metal_marlin.inference.pipeline.MarlinPipeline, or quantise it without --rotate"
            )
        self._placement = Placement(model, source.checkpoint, source.scheme, config.skip)
        model.config.quantization_config = config
        self._placement.prepare(model)
        source.taken = self._placement.names()
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._placement is not None:
            self._placement.load(model, self.quantization_config.search)
            self.tied = self._placement.tied
        self._placement = self.quantization_config.source = None
        model.requires_grad_(False)
        self.describe(model)
        return model

    def _scheme(self) -> Scheme | None:
        config = self.quantization_config
        return None if self.pre_quantized else resolve_scheme(config.bits, config.format, config.group_size)

    def describe(self, model: PreTrainedModel) -> None:
        """Writes down how the model's matrices are packed, by the names that `save_pretrained` gives them."""
        matrices = [matrix for matrix in _matrices(model) if matrix[0].rpartition(".")[0] not in self.tied]
        published = _published(model, [name for name, _, _ in matrices])
        schemes: dict[str, Scheme] = {}
        tensors = {}
        for name, scheme, shape in matrices:
            key = str(scheme)
            while schemes.setdefault(key, scheme) != scheme:
                key += "*"
            tensors[published[name]] = {"scheme": key, "shape": list(shape)}
        self.quantization_config.schemes = {key: scheme_fields(scheme) for key, scheme in schemes.items()}
        self.quantization_config.tensors = tensors

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `save_pretrained` writes: names of experts are those of the family's checkpoints."""
        self.describe(model)
        tied = tuple(f"{head}.weight" for head in self.tied)
        state = (
            {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tied)}
            if tied
            else model.state_dict()
        )
        moes = [name for name, module in model.named_modules() if isinstance(module, MetalQuantizedMoE)]
        renamed = {name: _with_parts_of_family(model, name) for name in moes}
        for layer, parts in renamed.items():
            if parts != PARTS:
                state = {_rename_part(name, layer, parts): tensor for name, tensor in state.items()}
        return state, {}

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` does."""
        packed = {name: module for name, module in model.named_modules() if isinstance(module, MetalQuantizedLinear)}
        others = [
            name for name, module in model.named_modules() if isinstance(module, MetalQuantizedMoE | MetalQuantizedEmbedding)
        ]
        if others:
            raise NotImplementedError(
                f"only linear layers can be put back into a model, and {others[0]} is none: load the original"
            )
        for name, module in packed.items():
            model.set_submodule(name, module.to_linear(dtype))
        return model


def attach_quantizer(model: PreTrainedModel) -> None:
    """Lets a model whose modules were replaced in memory be saved as a checkpoint."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        quantizer = MetalMarlinQuantizer(MetalMarlinConfig(), pre_quantized=True)
        model.config.quantization_config = quantizer.quantization_config
        # As `from_pretrained` leaves a model.
        for name, value in {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}.items():
            setattr(model, name, value)
    elif not isinstance(quantizer, MetalMarlinQuantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"the model is quantised with {method} already: load the original")
    for target in list(model.all_tied_weights_keys):
        head = target.removesuffix(".weight")
        if isinstance(model.get_submodule(head), MetalQuantizedLinear) and head not in quantizer.tied:
            del model.all_tied_weights_keys[target]
            model._tied_weights_keys = dict(model.all_tied_weights_keys)
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    quantizer.describe(model)


def _open(files: list[str] | None) -> Checkpoint:
    if not files or not files[0].endswith(".safetensors"):
        found = os.path.basename(files[0]) if files else "a state dict"
        raise ValueError(
            f"only checkpoints in safetensors can be quantised as they are read, found {found}: convert it with save_pretrained"
        )
    return Checkpoint.open(os.path.dirname(files[0]))


def _matrices(model: nn.Module) -> Iterable[tuple[str, Scheme, tuple[int, int]]]:
    """Packed matrices of a model: name, scheme, shape."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield f"{name}.weight", module.scheme, module.shape
        elif isinstance(module, MetalQuantizedMoE):
            for index, schemes in enumerate(module.schemes):
                for part, scheme in enumerate(schemes):
                    yield f"{name}.{index}.{PARTS[part]}.weight", scheme, module.layout.shape(part)


def _published(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Names by which `save_pretrained` stores tensors, learnt by having it rename numbers."""
    from transformers.core_model_loading import revert_weight_conversion

    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    renamed = revert_weight_conversion(model, numbers)
    published = {names[int(number)]: name for name, number in renamed.items()}
    return {
        name: _rename_part(new, new.partition(".experts.")[0] + ".experts", _parts_of(new)) for name, new in published.items()
    }


def _parts_of(published: str) -> tuple[str, ...]:
    return ("w1", "w3", "w2") if ".block_sparse_moe.experts." in published else PARTS


def _with_parts_of_family(model: PreTrainedModel, layer: str) -> tuple[str, ...]:
    """Names of an expert's matrices in checkpoints of the family."""
    from transformers.core_model_loading import revert_weight_conversion

    (published,) = revert_weight_conversion(model, {f"{layer}.0.{PARTS[0]}.weight": torch.tensor(0)})
    return _parts_of(published)


def _rename_part(name: str, layer: str, parts: tuple[str, ...]) -> str:
    """`layer.N.gate_proj.…` as `layer.N.w1.…`."""
    if not name.startswith(f"{layer}."):
        return name
    index, _, rest = name[len(layer) + 1 :].partition(".")
    part, _, tensor = rest.partition(".")
    return f"{layer}.{index}.{parts[PARTS.index(part)]}.{tensor}" if part in PARTS else name
