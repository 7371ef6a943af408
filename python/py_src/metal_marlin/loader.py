"""Models of Transformers out of any checkpoint that the program reads, quantised as they are read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ._native import Checkpoint, Scheme
from ._placement import plain_tensor
from .quantizer import MetalMarlinConfig, Source
from .replace import DEFAULT_SKIP
from .schemes import resolve_scheme

# Where config.json says how matrices are packed, which concerns the checkpoint and not the model.
_QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")


def from_pretrained(
    path: str | Path | None = None,
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | str | None = None,
    skip: Iterable[str] = DEFAULT_SKIP,
    search: str = "mse",
    activations: str = "int8",
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model of Transformers whose linear layers and experts are packed, without ever holding it in full precision.

    Matrices are read one by one. Those that the checkpoint holds packed stay as they are, in whatever layout: Metal Marlin's own,
    GPTQ, AWQ, compressed-tensors, MLX, GGUF, MXFP4 of gpt-oss, and others. If there are none, or if `bits`, `format` or
    `group_size` are given, the other ones are rounded. What is no matrix of a linear layer or an expert is loaded as it is.
    Packed embeddings stay packed, too, and a head that is tied to one computes with the same matrix.

    Args:
        path: A model folder, a GGUF file, an id on the Hub; the bundled model if left out.
        bits: As of `replace_linear_layers`, like the next ones.
        format: See there.
        group_size: See there.
        skip: See there; applies to experts, too, and not to what is packed already.
        search: See there.
        activations: See there.
        dtype: Of what is not packed; "auto" for the checkpoint's.
        revision: Of an id on the Hub.
        kwargs: For the model's own `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: The format is unknown or does not fit; weights expect rotated activations, or are missing; Transformers has no
            such model.
        RuntimeError: The checkpoint cannot be read; the message says why.
    """
    if kwargs.pop("output_loading_info", False):
        raise ValueError("output_loading_info is of no use here: a weight that is missing is an error")
    checkpoint = Checkpoint.open(None if path is None else str(path), revision)
    config = _config(checkpoint)
    quantization = MetalMarlinConfig(bits, format, group_size, skip, search, activations)
    wanted = (bits, format, group_size) != (None, None, None) or not _is_packed(checkpoint)
    quantization.source = source = Source(checkpoint, resolve_scheme(bits, format, group_size) if wanted else None)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    model, info = cast(
        tuple[PreTrainedModel, dict[str, set[str]]],
        _model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=_PlainTensors(source),
            quantization_config=quantization,
            dtype=dtype,
            output_loading_info=True,
            **kwargs,
        ),
    )
    if missing := sorted(info["missing_keys"]):
        # Transformers only warns, and leaves random values there.
        raise ValueError(
            f"{checkpoint.name} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which "
            f"{type(model).__name__} of Transformers {transformers.__version__} needs: is a weight file missing? Or run the "
            "model with metal_marlin.inference.pipeline.MarlinPipeline"
        )
    if checkpoint.folder is not None:
        model.name_or_path = model.config.name_or_path = checkpoint.folder
        if model.can_generate() and (Path(checkpoint.folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


class _PlainTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint that no packed module takes, read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _names(self) -> list[str]:
        # The quantiser has noted by now what is taken.
        checkpoint = self._source.checkpoint
        return [name for name in checkpoint.names() if name not in self._source.taken and not _is_scheme(checkpoint.info(name))]

    def __getitem__(self, name: str) -> torch.Tensor:
        return plain_tensor(self._source.checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def _is_scheme(info: tuple[list[int], str | Scheme] | None) -> bool:
    return info is not None and isinstance(info[1], Scheme)


def _is_packed(checkpoint: Checkpoint) -> bool:
    names = checkpoint.names()
    return any(_is_scheme(checkpoint.info(name)) for name in names) or any(name.endswith("gate_up_proj_blocks") for name in names)


def _config(checkpoint: Checkpoint) -> PreTrainedConfig:
    fields = json.loads(checkpoint.config())
    for field in _QUANTIZATION_FIELDS:
        fields.pop(field, None)
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{checkpoint.name}: Transformers {transformers.__version__} has no model_type {model_type!r}: update it, or run "
            "the model with metal_marlin.inference.pipeline.MarlinPipeline"
        )
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
    return config


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    for architecture in config.architectures or ():
        named = getattr(transformers, architecture, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"Transformers {transformers.__version__} has no causal language model of model_type {config.model_type!r}"
        )
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
