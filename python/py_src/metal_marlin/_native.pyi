"""What the Rust extension offers. Users want the package itself; this is what it is made of."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

# Activations and plain weights: float32, float16, or bfloat16 as its bits in uint16 (`tensor.view(torch.uint16).numpy()`).
_Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

__all__ = [
    "Checkpoint",
    "Engine",
    "Event",
    "Experts",
    "Finish",
    "Linear",
    "Matrix",
    "Runtime",
    "Scheme",
    "__version__",
    "main",
    "report",
]

__version__: str

@final
class Scheme:
    """How a matrix is stored: what a code means, what shares a scale, what a scale is."""

    @staticmethod
    def of(format: str, group_size: int | str | None = None, *, sparse: bool = False) -> Scheme:
        """The scheme of a format: fp4, int4, int4-sym, int8, fp8, int3, int2, mxfp4, nvfp4, bf16, f16, f32.

        `group_size` is columns that share a scale, "row", "tensor" or "ROWSxCOLUMNS"; the format's own if None. `sparse` keeps
        two of every four weights. Raises ValueError if there is no such format or it has no such groups.
        """
    @staticmethod
    def from_json(text: str) -> Scheme:
        """The scheme that `to_json` wrote."""
    def to_json(self) -> str:
        """As `quantization_config.schemes` of config.json has it."""
    def parts(self, rows: int, cols: int) -> list[tuple[str, str, list[int]]]:
        """Tensors that hold a matrix `[rows, cols]`: suffix of the name, dtype ("U8", "F32", "F16", "BF16", "F8_E4M3", "U32"), shape.

        The first is that of the codes, whose suffix is "". Raises ValueError if the scheme has no such shape.
        """
    @property
    def is_dense(self) -> bool:
        """Whether weights are plain floats."""
    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits of a weight, scales included."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __str__(self) -> str: ...

@final
class Matrix:
    """A packed matrix `[rows, cols]` = `[out_features, in_features]` in canonical order. Immutable."""

    @staticmethod
    def encode(weights: _Floats, scheme: Scheme, search: str = "mse") -> Matrix:
        """Rounds a matrix, `[rows, cols]`, C-contiguous. `search`: "mse" or "absmax". Raises ValueError where a weight is not finite."""
    @staticmethod
    def from_tensors(scheme: Scheme, rows: int, cols: int, tensors: dict[str, npt.NDArray[np.uint8]]) -> Matrix:
        """The matrix whose tensors, by suffix (`Scheme.parts`), have these bytes. Raises ValueError if one is missing, too many, or of another size."""
    def tensors(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Its tensors' bytes by suffix, each flat."""
    def dequantize(self) -> npt.NDArray[np.float32]:
        """Its weights, `[rows, cols]`."""
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""

@final
class Runtime:
    """A processor: its threads and how linears multiply. Layers of one runtime share its threads and scratch memory."""

    def __new__(cls, threads: int | None = None, activations: str = "int8") -> Self:
        """`activations`: "int8" (rounded to 8 bits in groups, fast) or "f32" (exact)."""
    @property
    def threads(self) -> int: ...
    @property
    def activations(self) -> str: ...
    @property
    def detail(self) -> str:
        """Instruction set, threads, arithmetic."""

@final
class Linear:
    """A matrix in the processor's own order, with its bias: the only copy of its weights."""

    def __new__(cls, runtime: Runtime, weight: Matrix, bias: npt.NDArray[np.float32] | None = None) -> Self: ...
    def forward(self, x: _Floats, out: _Floats) -> None:
        """`out = x · Wᵀ + bias` for x `[rows, in_features]` and out `[rows, out_features]`, both C-contiguous and of one dtype. Releases the GIL."""
    def unpack(self) -> Matrix:
        """The matrix as it was loaded, to the bit."""
    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory."""

@final
class Experts:
    """The gated MLPs of a layer's experts: `down(activation(gate(x)) * up(x))`."""

    def __new__(
        cls,
        runtime: Runtime,
        gate: Sequence[Matrix],
        up: Sequence[Matrix],
        down: Sequence[Matrix],
        activation: str,
        biases: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
    ) -> Self:
        """One of each for every expert; `activation`: "silu", "gelu_tanh" or "clamped_swiglu". Biases: `[experts, features]` of gate, up, down."""
    def forward(self, x: _Floats, experts: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], out: _Floats) -> None:
        """`out[t] = Σ weight · expert(x[t])` for x and out `[tokens, hidden]`, experts and weights `[tokens, top_k]`. Releases the GIL.

        Raises ValueError if an expert is not among them.
        """
    def unpack(self) -> list[tuple[Matrix, Matrix, Matrix]]:
        """Gate, up and down of each expert, as they were loaded, to the bit."""
    @property
    def nbytes(self) -> int: ...

@final
class Checkpoint:
    """A model folder or GGUF file, mapped into memory; every layout that the program reads (GPTQ, AWQ, compressed-tensors, MLX, …)."""

    @staticmethod
    def open(model: str | None, revision: str | None = None) -> Checkpoint:
        """What a person calls a model: a folder, a GGUF file, an id on the Hub, or the bundled one (None)."""
    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str | None:
        """Where its files are; None of the bundled model."""
    def config(self) -> str:
        """config.json."""
    def names(self) -> list[str]:
        """Names of tensors, quantised matrices as one each."""
    def info(self, name: str) -> tuple[list[int], str | Scheme] | None:
        """Shape, and dtype of a plain tensor or scheme of a packed matrix."""
    def matrix(self, name: str, index: int | None = None) -> Matrix:
        """A matrix, packed or plain; of a tensor of three dimensions, such as those of all experts, the one at `index`."""
    def tensor(self, name: str) -> tuple[str, list[int], npt.NDArray[np.uint8]]:
        """A plain tensor: dtype, shape, bytes."""
    def dequantized(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in f32, whatever it is stored in."""
    def release(self, name: str) -> None:
        """Forgets what was read of a tensor, so that a model larger than memory does not stay mapped."""
    def is_rotated(self) -> bool:
        """Whether activations have to be rotated for its weights, which Transformers' models do not do."""

@final
class Event:
    """One of a request's answers got a token, or ended."""

    @property
    def request(self) -> int: ...
    @property
    def choice(self) -> int:
        """Which of the request's answers, counted from 0."""
    @property
    def token(self) -> int | None:
        """None if it failed."""
    @property
    def text(self) -> str:
        """The text that is certain by now; empty while a character or a stop text may be incomplete."""
    @property
    def seconds(self) -> float:
        """Seconds since the request was added."""
    @property
    def logprob(self) -> float | None:
        """The natural logarithm of the token's probability, if the request asks."""
    @property
    def top_logprobs(self) -> list[tuple[int, float]]:
        """The likeliest tokens in its place with theirs, the likeliest first."""
    @property
    def finish(self) -> Finish | None:
        """Set on the last event of an answer."""

@final
class Finish:
    """How an answer ended."""

    @property
    def reason(self) -> str:
        """stop_token, stop_string, complete (nothing can follow in its form), length, context; not_finite, grammar or failed."""
    @property
    def stop_token(self) -> int | None: ...
    @property
    def stop_text(self) -> str | None: ...
    @property
    def error(self) -> str | None:
        """What went wrong, if something did."""
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that need not be computed."""
    @property
    def generated_tokens(self) -> int:
        """The token that ended the answer included."""

@final
class Engine:
    """A model that is loaded, and the requests that run on it together.

    Threads share it: each adds requests and waits for their events. Whoever waits steps the engine, with the GIL released, and
    what comes of other requests is kept for those who ask for it.
    """

    def __new__(cls, arguments: Sequence[str]) -> Engine:
        """Opens a model. The arguments are those of `metal-marlin serve` that say which model is loaded, where and how.

        Raises ValueError if they are wrong, FileNotFoundError if there is no such model, RuntimeError if it does not fit or load.
        """
    def add(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, Any]],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        stop: Sequence[str] = ...,
        stop_token_ids: Sequence[int] = ...,
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        json_object: bool = False,
        regex: str | None = None,
        grammar: str | None = None,
        special_tokens: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        template_variables: dict[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str = ...,
    ) -> int:
        """Queues a text or tokens to continue, or a chat to answer `n` times, and gives the request's number.

        `GenerationOptions` of the pipeline explains the options. Raises ValueError if an option is wrong, or the prompt too long.
        """
    def events(self, requests: Sequence[int]) -> list[Event]:
        """Steps the engine until something has come of one of these requests, and gives that: at least one event.

        An answer's last event has `finish`. Raises ValueError if none of the requests is under way, RuntimeError if the model
        fails.
        """
    def cancel(self, request: int) -> bool:
        """Ends a request; nothing more comes of it. Tells whether it was under way."""
    def close(self) -> None:
        """Gives the model's memory back. Everything but this, the tokenizer and `info` raises RuntimeError from now on."""
    @property
    def is_closed(self) -> bool: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: dict[str, Any] | None = None,
    ) -> str:
        """A chat as the text that the model reads, special tokens spelled out. Raises ValueError if the template refuses it."""
    @property
    def info(self) -> dict[str, Any]:
        """What is known of the model.

        model, architecture, layers, hidden_size, vocabulary, context, weight_bytes, kv, device, device_detail, max_running,
        has_chat_template.
        """

def main(arguments: Sequence[str]) -> int:
    """Runs the program with these arguments, the first of which is its name, and gives its exit status.

    Signals become the program's.
    """

def report(arguments: Sequence[str]) -> str:
    """What a command found out, as JSON: quantize, eval, verify-kernels, plan, inspect or doctor.

    The arguments are those of the command line. Ctrl-C ends the work where it tells of its progress. Raises ValueError if the arguments are wrong.
    """
