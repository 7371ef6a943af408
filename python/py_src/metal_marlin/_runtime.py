"""The processor that layers run on, and weights in its own order.

What is held here never changes, so copies of a layer share it; pickled, it is the canonical tensors.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ._native import Experts, Linear, Matrix, Runtime, Scheme

ACTIVATIONS = ("int8", "f32")

Floats = npt.NDArray[Any]


def check_activations(activations: str) -> str:
    """The same. Raises ValueError if nothing computes with them."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(map(repr, ACTIVATIONS))}, found {activations!r}")
    return activations


@cache
def _runtime(activations: str, threads: int) -> Runtime:
    return Runtime(threads, activations)


def runtime(activations: str) -> Runtime:
    """The processor with as many threads as torch has when its first layer is made. Layers share it and take turns."""
    return _runtime(check_activations(activations), torch.get_num_threads())


class PackedLinear:
    """A matrix in the processor's order."""

    def __init__(self, matrix: Matrix, activations: str) -> None:
        """Packs `[out_features, in_features]`."""
        self.activations = activations
        self.scheme = matrix.scheme
        self.rows = matrix.rows
        self.cols = matrix.cols
        self._linear = Linear(runtime(activations), matrix)
        self.forward: Callable[[Floats, Floats], None] = self._linear.forward

    def unpack(self) -> Matrix:
        """The matrix, to the bit."""
        return self._linear.unpack()

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory."""
        return self._linear.nbytes

    def with_activations(self, activations: str) -> "PackedLinear":
        """The same matrix for other activations, which may have another order."""
        return self if activations == self.activations else PackedLinear(self.unpack(), activations)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _packed_linear, (_state(self.unpack()), self.activations)


class PackedExperts:
    """The matrices of a layer's experts in the processor's order, with their biases."""

    def __init__(
        self,
        matrices: Sequence[tuple[Matrix, Matrix, Matrix]],
        activation: str,
        biases: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
        activations: str,
    ) -> None:
        """Packs gate, up and down of each expert; biases are `[experts, features]` of the three."""
        self.activations = activations
        self.activation = activation
        self.biases = biases
        gate, up, down = (list(part) for part in zip(*matrices, strict=True))
        self.schemes = [(g.scheme, u.scheme, d.scheme) for g, u, d in matrices]
        self._experts = Experts(runtime(activations), gate, up, down, activation, biases)
        self.forward = self._experts.forward

    def unpack(self) -> list[tuple[Matrix, Matrix, Matrix]]:
        """Gate, up and down of each expert, to the bit."""
        return self._experts.unpack()

    @property
    def nbytes(self) -> int:
        """Bytes they take in memory."""
        return self._experts.nbytes

    def with_activations(self, activations: str) -> "PackedExperts":
        """The same matrices for other activations, which may have another order."""
        if activations == self.activations:
            return self
        return PackedExperts(self.unpack(), self.activation, self.biases, activations)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedExperts":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        states = [(_state(gate), _state(up), _state(down)) for gate, up, down in self.unpack()]
        return _packed_experts, (states, self.activation, self.biases, self.activations)


# Scheme, rows, columns, bytes by suffix.
_State = tuple[str, int, int, dict[str, npt.NDArray[np.uint8]]]


def _state(matrix: Matrix) -> _State:
    return matrix.scheme.to_json(), matrix.rows, matrix.cols, matrix.tensors()


def _matrix(state: _State) -> Matrix:
    scheme, rows, cols, tensors = state
    return Matrix.from_tensors(Scheme.from_json(scheme), rows, cols, tensors)


def _packed_linear(state: _State, activations: str) -> PackedLinear:
    return PackedLinear(_matrix(state), activations)


def _packed_experts(states: list[tuple[_State, _State, _State]], activation: str, biases: Any, activations: str) -> PackedExperts:
    matrices = [(_matrix(gate), _matrix(up), _matrix(down)) for gate, up, down in states]
    return PackedExperts(matrices, activation, biases, activations)


def scheme_fields(scheme: Scheme) -> dict[str, Any]:
    """A scheme as config.json has it."""
    fields: dict[str, Any] = json.loads(scheme.to_json())
    return fields
