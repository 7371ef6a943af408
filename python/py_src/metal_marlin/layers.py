"""Linear layers and embeddings whose weights stay packed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ._native import Matrix, Scheme
from ._runtime import PackedLinear, check_activations
from ._tensors import FLOATS, as_numpy, encode, matrix_from_tensors, matrix_to_tensors
from .schemes import resolve_scheme

_INFERENCE_ONLY = (
    "quantised layers compute no gradients: run the model under torch.no_grad() or torch.inference_mode(), "
    "or freeze what comes before the layer with model.requires_grad_(False)"
)


class PackedModule(nn.Module):
    """A module of one packed matrix, which its state dict has as a checkpoint does: `weight`, `weight_scale` and so on."""

    def __init__(self, rows: int, cols: int, scheme: Scheme, dtype: torch.dtype | None) -> None:
        """Without the matrix yet. Raises ValueError if the scheme has no such shape."""
        super().__init__()
        scheme.parts(rows, cols)
        self.shape = (rows, cols)
        self.scheme = scheme
        self.dtype = dtype if dtype is not None else torch.get_default_dtype()

    @property
    def is_loaded(self) -> bool:
        """Whether there is a matrix yet."""
        raise NotImplementedError

    @property
    def matrix(self) -> Matrix:
        """The packed matrix in canonical order, made anew."""
        raise NotImplementedError

    def load_matrix(self, matrix: Matrix) -> None:
        """Takes another matrix, in whatever scheme it has. Raises ValueError if it is of another shape."""
        if (matrix.rows, matrix.cols) != self.shape:
            raise ValueError(f"the weight must be {list(self.shape)}, found [{matrix.rows}, {matrix.cols}]")
        self._take(matrix)
        self.scheme = matrix.scheme

    def _take(self, matrix: Matrix) -> None:
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights as this module computes with them, of its dtype if left out."""
        return torch.from_numpy(self.matrix.dequantize()).to(self.dtype if dtype is None else dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_loaded:
            tensors = matrix_to_tensors(self.matrix)
            destination.update({f"{prefix}weight{suffix}": tensor for suffix, tensor in tensors.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        name = f"{prefix}weight"
        matrix = load_matrix_tensors(state_dict, name, self.scheme, self.shape, missing_keys, unexpected_keys, error_msgs)
        if matrix is not None:
            self.load_matrix(matrix)


class MetalQuantizedLinear(PackedModule):
    """`y = x · Wᵀ + b` with W packed in 2 to 8 bits, in place of `torch.nn.Linear`.

    Weights are held once, in the order in which the processor reads them; `state_dict()` gives them in the canonical order of
    a Metal Marlin checkpoint: `weight` (codes) with `weight_scale` and whatever else the format has, and `bias`. Activations may
    be float32, float16 or bfloat16 and of any shape `[..., in_features]`; the output has their dtype. Inputs on `mps` are
    computed on the CPU by way of host memory. For inference only.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | str | None = None,
        scheme: Scheme | None = None,
        activations: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer without weights, for `load_state_dict` to fill; `from_linear` quantises a layer.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            bias: Whether there is one.
            bits: As of `resolve_scheme`, like the next ones.
            format: See there.
            group_size: See there.
            scheme: See there.
            activations: "int8" rounds inputs to 8 bits in fine groups, which is fast; "f32" computes with them as they are.
            dtype: Of the bias, and what `weight.dtype` says; torch's default if left out.
        """
        super().__init__(out_features, in_features, resolve_scheme(bits, format, group_size, scheme), dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.activations = check_activations(activations)
        self._packed: PackedLinear | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | str | None = None,
        *,
        scheme: Scheme | None = None,
        search: str = "mse",
        activations: str = "int8",
    ) -> "MetalQuantizedLinear":
        """Quantises a layer, which stays as it is.

        Args:
            linear: A `torch.nn.Linear` with its weights in memory.
            bits: As of `resolve_scheme`, like the next ones.
            format: See there.
            group_size: See there.
            scheme: See there.
            search: How scales are chosen: "mse" for the least squared error, "absmax" so that the largest weight just fits.
            activations: "int8" or "f32", as for the layer itself.

        Raises:
            TypeError: It is quantised already, or not a `torch.nn.Linear`.
            ValueError: The format is unknown, lacks such groups, or does not fit `in_features`; a weight is a meta tensor or not
                finite.
        """
        if isinstance(linear, MetalQuantizedLinear):
            raise TypeError(
                f"the layer is quantised already ({linear.scheme}): quantise the original, or what its to_linear() gives back"
            )
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected a torch.nn.Linear, found {type(linear).__name__}")
        matrix = encode(linear.weight, resolve_scheme(bits, format, group_size, scheme), search)
        return cls.from_packed(matrix, bias=linear.bias, activations=activations, dtype=linear.weight.dtype)

    @classmethod
    def from_packed(
        cls,
        weight: Matrix | Mapping[str, torch.Tensor],
        scheme: Scheme | None = None,
        in_features: int | None = None,
        *,
        bias: torch.Tensor | None = None,
        activations: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> "MetalQuantizedLinear":
        """A layer of a weight that is packed already.

        Args:
            weight: A matrix; or its tensors by name as `state_dict()` has them: `weight` `[out_features, bytes]`, `weight_scale`,
                …
            scheme: What tensors hold. A matrix knows its own.
            in_features: Columns of the weight, which tensors do not tell. A matrix knows its own.
            bias: `[out_features]`.
            activations: "int8" or "f32", as for the layer itself.
            dtype: What `weight.dtype` says; the bias's, or torch's default, if left out.

        Raises:
            ValueError: A tensor is missing, too many, or of another shape or dtype than the scheme has; the bias has another
                length.
        """
        if not isinstance(weight, Matrix):
            if scheme is None or in_features is None:
                raise ValueError("tensors do not say what they hold: pass scheme and in_features with them")
            if "weight" not in weight:
                raise ValueError(f"the codes are missing: expected a tensor `weight`, found {', '.join(weight) or 'none'}")
            tensors = {name.removeprefix("weight"): tensor for name, tensor in weight.items()}
            weight = matrix_from_tensors(scheme, weight["weight"].shape[0], in_features, tensors)
        if bias is not None and list(bias.shape) != [weight.rows]:
            raise ValueError(f"the bias must have the shape [{weight.rows}], found {list(bias.shape)}")
        if dtype is None and bias is not None:
            dtype = bias.dtype
        layer = cls(weight.cols, weight.rows, bias is not None, scheme=weight.scheme, activations=activations, dtype=dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.load_matrix(weight)
        return layer

    def _take(self, matrix: Matrix) -> None:
        self._packed = PackedLinear(matrix, self.activations)

    def set_activations(self, activations: str) -> None:
        """Computes with "int8" or "f32" activations from now on. Raises ValueError for others."""
        check_activations(activations)
        if self._packed is not None:
            self._packed = self._packed.with_activations(activations)
        self.activations = activations

    @property
    def is_loaded(self) -> bool:
        """Whether there is a weight yet."""
        return self._packed is not None

    @property
    def matrix(self) -> Matrix:
        """The packed weight in canonical order, made anew."""
        return self._loaded().unpack()

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return self._loaded().nbytes

    @property
    def weight(self) -> torch.Tensor:
        """What code expects that looks at a linear layer's weight: shape, dtype and device. Values are dequantised when used."""
        return _WeightOnDemand.of(self)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` of the dequantised weights; of the layer's dtype if left out."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]` of the same dtype.

        Raises:
            RuntimeError: The last dimension, dtype or device does not fit, a gradient is wanted, or the layer has no weights.
        """
        packed = self._packed
        if packed is None or not is_usual(input, self.in_features):
            return self._forward_unusual(input)
        # A token calls hundreds of layers: what is written here in a roundabout way takes a fraction of the plain way's time.
        output = input.new_empty((*input.shape[:-1], self.out_features))
        packed.forward(
            as_numpy(input.detach().contiguous()).reshape(-1, self.in_features), as_numpy(output).reshape(-1, self.out_features)
        )
        bias = self._parameters["bias"]
        return output if bias is None else output.add_(bias)

    def _forward_unusual(self, input: torch.Tensor) -> torch.Tensor:
        self._loaded()
        check_input(input, self.in_features, self.out_features)
        # Left is `mps`, whose memory the native code does not share.
        return self.forward(input.cpu()).to(input.device)

    def _loaded(self) -> PackedLinear:
        if self._packed is None:
            raise RuntimeError(
                "the layer has no weights yet: load_state_dict() fills it, from_linear() and from_packed() make a full one"
            )
        return self._packed

    def extra_repr(self) -> str:
        """As `torch.nn.Linear` has it, and how weights are stored."""
        bits = self.scheme.bits_per_weight(*self.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={str(self.scheme)!r}, bits_per_weight={bits:.2f}"
        )


class MetalQuantizedEmbedding(PackedModule):
    """Rows of a packed table, in place of `torch.nn.Embedding`. Rows are dequantised as they are looked up."""

    weight: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype | None = None,
        embed_scale: float | None = None,
    ) -> None:
        """A table without weights.

        Args:
            num_embeddings: Rows.
            embedding_dim: Columns.
            scheme: How they are stored; a row must have its scales to itself.
            dtype: Of what is looked up; torch's default if left out.
            embed_scale: What rows are multiplied by in families that do so, such as Gemma; rounded to `dtype` first, as there.
        """
        super().__init__(num_embeddings, embedding_dim, scheme, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.embed_scale = None if embed_scale is None else torch.tensor(embed_scale, dtype=self.dtype, device="cpu").item()
        # Bytes of the packed matrix by suffix, a row for each of its own, or flat where rows share them.
        self._bytes: dict[str, torch.Tensor] = {}

    def _take(self, matrix: Matrix) -> None:
        if not rows_are_separate(matrix.scheme, matrix.rows, matrix.cols):
            raise ValueError(f"rows of {matrix.scheme} share scales and cannot be looked up by themselves")
        shapes = {suffix: shape for suffix, _, shape in matrix.scheme.parts(matrix.rows, matrix.cols)}
        self._bytes = {
            suffix: torch.from_numpy(found if is_shared_by_rows(suffix, shapes[suffix]) else found.reshape(matrix.rows, -1))
            for suffix, found in matrix.tensors().items()
        }

    @property
    def is_loaded(self) -> bool:
        """Whether there is a table yet."""
        return bool(self._bytes)

    @property
    def matrix(self) -> Matrix:
        """The packed table in canonical order."""
        self._check_loaded()
        found = {suffix: of.reshape(-1).numpy() for suffix, of in self._bytes.items()}
        return Matrix.from_tensors(self.scheme, *self.shape, found)

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes in memory."""
        return sum(of.nbytes for of in self._bytes.values())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices of any shape to rows `[..., embedding_dim]`.

        Raises:
            IndexError: There is no such row.
        """
        self._check_loaded()
        indices = input.reshape(-1).to("cpu")
        if indices.numel() == 0:
            return torch.empty(*input.shape, self.embedding_dim, dtype=self.dtype, device=input.device)
        found = {suffix: (of if of.dim() == 1 else of[indices]).reshape(-1).numpy() for suffix, of in self._bytes.items()}
        rows = Matrix.from_tensors(self.scheme, indices.numel(), self.embedding_dim, found)
        output = torch.from_numpy(rows.dequantize()).to(self.dtype).reshape(*input.shape, self.embedding_dim).to(input.device)
        return output if self.embed_scale is None else output * self.embed_scale

    def _check_loaded(self) -> None:
        if not self.is_loaded:
            raise RuntimeError("the embedding has no weights yet: load_state_dict() or load_matrix() fills it")

    def extra_repr(self) -> str:
        """As `torch.nn.Embedding` has it, and how rows are stored."""
        bits = self.scheme.bits_per_weight(*self.shape)
        return f"{self.num_embeddings}, {self.embedding_dim}, format={str(self.scheme)!r}, bits_per_weight={bits:.2f}"


def is_shared_by_rows(suffix: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a matrix is the same for every row: the order of columns, or one scale for the whole matrix."""
    return suffix == "_group_index" or (suffix == "_global" and list(shape) == [1])


def rows_are_separate(scheme: Scheme, rows: int, cols: int) -> bool:
    """Whether rows of a matrix can be taken by themselves."""
    return all(shape[0] == rows or is_shared_by_rows(suffix, shape) for suffix, _, shape in scheme.parts(rows, cols))


def is_usual(input: torch.Tensor, features: int) -> bool:
    """Whether the native code can take an input as it is, in any layout."""
    return (
        input.dtype in FLOATS
        and input.dim() > 0
        and input.shape[-1] == features
        and input.is_cpu
        and not (input.requires_grad and torch.is_grad_enabled())
    )


def check_input(input: torch.Tensor, in_features: int, out_features: int) -> None:
    """Raises RuntimeError for what no layer can take, as torch does, and says what to do."""
    if input.dtype not in FLOATS:
        raise RuntimeError(
            f"expected an input of dtype float32, float16 or bfloat16, but got {input.dtype}: "
            "convert it, for example with x.float()"
        )
    if input.dim() == 0 or input.shape[-1] != in_features:
        rows = input.numel() // input.shape[-1] if input.dim() and input.shape[-1] else 1
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{input.shape[-1] if input.dim() else 1} and "
            f"{in_features}x{out_features}): the last dimension of the input must be in_features={in_features}"
        )
    if input.is_meta:
        raise RuntimeError(
            "the input is a meta tensor, which has no values: quantised layers compute at once, give them real tensors"
        )
    if input.device.type not in ("cpu", "mps"):
        raise RuntimeError(
            f"expected all tensors to be on the same device, but the input is on {input.device} and the quantised weights are on "
            "cpu: keep the model and its inputs on the CPU (or on mps, by way of host memory)"
        )
    if input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(_INFERENCE_ONLY)


def load_matrix_tensors(
    state_dict: Mapping[str, Any],
    name: str,
    scheme: Scheme,
    shape: tuple[int, int],
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> Matrix | None:
    """The packed matrix `name` of a state dict; notes what is wrong in the lists that `load_state_dict` reports."""
    rows, cols = shape
    suffixes = [suffix for suffix, _, _ in scheme.parts(rows, cols)]
    found = {suffix: state_dict[name + suffix] for suffix in suffixes if name + suffix in state_dict}
    unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(name) not in found]
    if len(found) < len(suffixes):
        missing_keys.extend(name + suffix for suffix in suffixes if suffix not in found)
        if found:
            error_msgs.append(
                f"{name} is to be loaded in {scheme}, but the state dict has only "
                f"{', '.join(name + suffix for suffix in found)}: is it of an unquantised model? Quantise that one, "
                "with replace_linear_layers for example"
            )
        return None
    try:
        return matrix_from_tensors(scheme, rows, cols, found)
    except ValueError as error:
        error_msgs.append(f"{name}: {error}. Was it saved in another format?")
        return None


class _WeightOnDemand(torch.Tensor):
    """The weight of a quantised layer: shape, dtype and device of the dequantised one, which any computation makes."""

    _layer: MetalQuantizedLinear

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, layer: MetalQuantizedLinear) -> "_WeightOnDemand":
        cpu = torch.device("cpu")
        weight: _WeightOnDemand = torch.Tensor._make_wrapper_subclass(cls, layer.shape, dtype=layer.dtype, device=cpu)
        weight._layer = layer
        return weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dequantized(value: Any) -> Any:
            return value._layer.dequantize(value.dtype) if isinstance(value, cls) else value

        return func(*tree_map(dequantized, args), **tree_map(dequantized, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<weight of {self._layer!r}, dequantised when it is used>"
