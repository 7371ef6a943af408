"""Torch tensors as the native code takes and gives them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ._native import Matrix, Scheme

# What activations and plain weights can be.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# By their names in safetensors.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a contiguous tensor on the CPU that needs no gradient; bfloat16 as its bits."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def as_tensor(values: npt.NDArray[np.uint8], dtype: str, shape: list[int]) -> torch.Tensor:
    """Bytes as a tensor of a dtype that safetensors names."""
    if dtype not in _DTYPES:
        raise ValueError(f"tensors of dtype {dtype} cannot be given to torch; known are {', '.join(_DTYPES)}")
    return torch.from_numpy(values).view(_DTYPES[dtype]).reshape(shape)


def encode(weight: torch.Tensor, scheme: Scheme, search: str) -> Matrix:
    """Rounds a weight `[out_features, in_features]` to a scheme."""
    if weight.is_meta:
        raise ValueError(
            "the weight is a meta tensor, which has no values to quantise: load the model first, or let "
            "metal_marlin.from_pretrained quantise it as it is read"
        )
    weight = weight.detach().to("cpu")
    if weight.dtype not in FLOATS:
        if not weight.is_floating_point():
            raise TypeError(
                f"the weight is of dtype {weight.dtype}, not of floats: is it quantised already? Quantise the original"
            )
        weight = weight.float()
    return Matrix.encode(as_numpy(weight.contiguous()), scheme, search)


def matrix_to_tensors(matrix: Matrix) -> dict[str, torch.Tensor]:
    """The tensors of a packed matrix as a checkpoint has them, by suffix of its name."""
    found = matrix.tensors()
    parts = matrix.scheme.parts(matrix.rows, matrix.cols)
    return {suffix: as_tensor(found[suffix], dtype, shape) for suffix, dtype, shape in parts}


def matrix_from_tensors(scheme: Scheme, rows: int, cols: int, tensors: Mapping[str, torch.Tensor]) -> Matrix:
    """The packed matrix that these tensors, by suffix, hold.

    Raises ValueError where one is missing, too many, or of another shape or dtype.
    """
    found = {}
    for suffix, dtype, shape in scheme.parts(rows, cols):
        tensor = tensors.get(suffix)
        if tensor is None:
            raise ValueError(f"a matrix [{rows}, {cols}] in {scheme} needs a tensor weight{suffix}, which is missing")
        if list(tensor.shape) != shape or tensor.dtype is not _DTYPES[dtype]:
            raise ValueError(
                f"weight{suffix} of a matrix [{rows}, {cols}] in {scheme} must be {_DTYPES[dtype]} of shape {shape}, "
                f"found {tensor.dtype} of shape {list(tensor.shape)}"
            )
        found[suffix] = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    if unknown := tensors.keys() - found.keys():
        raise ValueError(f"a matrix in {scheme} has no tensor weight{min(unknown)}")
    return Matrix.from_tensors(scheme, rows, cols, found)


def stored_names(name: str, scheme: Scheme, rows: int, cols: int) -> list[str]:
    """Names of the tensors that hold the packed matrix `name`."""
    return [name + suffix for suffix, _, _ in scheme.parts(rows, cols)]
