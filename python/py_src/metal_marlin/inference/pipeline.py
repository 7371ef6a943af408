"""Text from a model, by the package's own engine.

    pipe = MarlinPipeline.from_pretrained("Qwen/Qwen3-4B", format="fp4")
    print(pipe("The capital of France is", max_tokens=20))
    for piece in pipe.stream([{"role": "user", "content": "Why is the sky blue?"}]):
        print(piece, end="", flush=True)

What is generated, and how, is decided by the options of a call, where they are silent by the model's generation_config.json, and
where that is silent too as by `metal-marlin run`: temperature 0.7, top-k 40, top-p 0.95, repetition penalty 1.1 (1 at temperature
0), at most 256 tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

from metal_marlin._native import Engine, Event, Finish
from metal_marlin.commands import Option, arguments

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# A message of a chat: "role", "content", and what else the model's template reads.
Message = dict[str, Any]
# A text to continue, its tokens, or a chat to answer.
Prompt = str | list[int] | list[Message]

# What PyTorch calls the devices that the engine knows as GPUs.
_GPUS = ("cuda", "mps")


class GenerationOptions(TypedDict, total=False):
    """How to generate, and what the answer must look like. What is left out is as the model recommends."""

    # Divides the logits; 0 takes the most likely token.
    temperature: float | None
    # Keep this many of the most likely tokens; 0 keeps all.
    top_k: int | None
    # Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    top_p: float | None
    # Drop tokens less likely than this share of the most likely one; 0 keeps all.
    min_p: float | None
    # Divides positive and multiplies negative logits of tokens that occurred; 1 is neutral.
    repetition_penalty: float | None
    # Subtracted from logits of tokens already generated, once or as often as they were; between -2 and 2.
    presence_penalty: float | None
    frequency_penalty: float | None
    # Added to the logits of tokens, by their ids.
    logit_bias: dict[int, float] | None
    # The same seed gives the same text, whatever runs at the same time.
    seed: int | None
    # Generate at most, and at least, this many tokens.
    max_tokens: int | None
    min_tokens: int
    # End before these texts, or at these tokens.
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    # Go on past the model's end-of-sequence tokens.
    ignore_eos: bool
    # Tell how likely each token was, and so many of the likeliest in its place.
    logprobs: int | None
    # The answer is an instance of this JSON schema, any JSON object, a match of this regular expression, or a text of this
    # grammar (in the dialect of Lark that llguidance reads). One of them.
    json_schema: Mapping[str, Any] | bool | None
    json_object: bool
    regex: str | None
    grammar: str | None
    # Text holds special tokens as they are spelled.
    special_tokens: bool
    # For chats: functions that the model may call, as JSON schemas, and further variables of the template (`enable_thinking`).
    tools: Sequence[dict[str, Any]] | None
    template_variables: dict[str, Any] | None
    # The lower, the sooner it is served.
    priority: int
    # Cached prefixes are shared only among prompts with the same salt.
    cache_salt: str


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was by the model itself: the natural logarithm of its probability, and the likeliest with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Timings:
    """Seconds from the request to the first token, and from the first token to the last."""

    prefill: float
    decode: float


class Completion(str):
    """What a model said: a text that knows how it came about."""

    #: Its tokens, the one that ended it included.
    tokens: list[int]
    #: Why it ended: "stop_token", "stop_string", "complete" (nothing can follow in its form), "length" or "context"; None if it
    #: has not ended.
    finish_reason: str | None
    #: The token or text that it was stopped by.
    stopped_at: int | str | None
    #: Tokens of the prompt, and those of them that need not be computed.
    prompt_tokens: int
    cached_tokens: int
    #: Where the time went.
    timings: Timings
    #: How likely each token was, if that was asked for.
    logprobs: list[TokenLogprob] | None

    @property
    def text(self) -> str:
        """The text as a plain str."""
        return str.__str__(self)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None if there was no other."""
        return (len(self.tokens) - 1) / self.timings.decode if len(self.tokens) > 1 and self.timings.decode > 0 else None


class MarlinPipeline:
    """A model that continues texts and answers chats. Threads may share it: what they ask runs together."""

    def __init__(self, engine: Engine) -> None:
        """Of an engine that is open; `from_pretrained` opens one."""
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: object = None,
        format: str | None = None,
        context: int | None = None,
        **options: Option,
    ) -> Self:
        """Opens a model: a folder, a GGUF file, an id on the Hub, or the bundled one (None).

        `device` is "cpu", "gpu" or "gpu:1" ("mps", "cuda" and torch's devices are GPUs, too); by default what suits the machine.
        With `format` (fp4, int4, …) the model is quantised first, once: the result is kept. `context` is most tokens of prompt
        and answer together. Further options are those of `metal-marlin serve` that load a model: `group_size`, `kv`,
        `kv_tokens`, `max_running`, `threads`, `exact`, `memory`, `speculate`, `draft_model`, `expert_device`, `revision`,
        `no_cache`, `chat_template` and so on.

        Raises ValueError if an option is wrong, FileNotFoundError if there is no such model, RuntimeError if it does not fit the
        memory or does not load.
        """
        chosen = {"device": _device(device), "format": format, "context": context, **options}
        return cls(Engine([*arguments(chosen), *([] if path is None else ["--", os.fspath(path)])]))

    @overload
    def __call__(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Completion: ...
    @overload
    def __call__(
        self, prompt: list[str] | list[list[int]] | list[list[Message]], **options: Unpack[GenerationOptions]
    ) -> list[Completion]: ...
    def __call__(
        self,
        prompt: Prompt | list[str] | list[list[int]] | list[list[Message]],
        **options: Unpack[GenerationOptions],
    ) -> Completion | list[Completion]:
        """Continues a text or answers a chat; of a list of prompts, all of them together.

        Raises ValueError if an option is wrong or a prompt too long, RuntimeError if the model fails.
        """
        prompts, is_batch = _prompts(prompt)
        streams: list[TextStream] = []
        try:
            streams.extend(self.stream(one, **options) for one in prompts)
            running = {stream.request: stream for stream in streams}
            while running:
                for event in self._engine.events(list(running)):
                    running[event.request]._take(event)
                    if event.finish is not None:
                        del running[event.request]
        finally:
            for stream in streams:
                stream.close()
        completions = [stream.completion for stream in streams]
        return completions if is_batch else completions[0]

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> TextStream:
        """The same for one prompt, piece by piece as it comes. Closing the stream early ends the request."""
        return TextStream(self._engine, self._engine.add(prompt, **options))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        return self._engine.encode(text, add_special_tokens)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self._engine.decode(tokens, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A chat as the text that the model reads, special tokens spelled out. Raises ValueError if the template refuses it."""
        return self._engine.chat_prompt(messages, tools, add_generation_prompt, variables or None)

    @property
    def info(self) -> dict[str, Any]:
        """The model's name, architecture and sizes, its device, and the context it was opened with."""
        return self._engine.info

    def close(self) -> None:
        """Gives the model's memory back. Requests under way end with RuntimeError."""
        self._engine.close()

    def __enter__(self) -> Self:
        """Closes the pipeline at the end of a `with`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the pipeline."""
        self.close()

    def __repr__(self) -> str:
        """The model and its device."""
        state = ", closed" if self._engine.is_closed else ""
        return f"MarlinPipeline({self.info['model']!r}, {self.info['device']}{state})"


class TextStream(Iterator[str]):
    """The pieces of an answer, as they come. `completion` is what there is of it so far."""

    def __init__(self, engine: Engine, request: int) -> None:
        """Of a request that was added to an engine."""
        self.request = request
        self._engine = engine
        self._pieces: deque[str] = deque()
        self._answer = _Answer()

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> str:
        """Waits for the next piece."""
        while not self._pieces:
            if self._answer.is_over:
                raise StopIteration
            for event in self._engine.events([self.request]):
                self._take(event)
        return self._pieces.popleft()

    def _take(self, event: Event) -> None:
        """Takes note of an event. A failure of the model is raised."""
        self._answer.add(event)
        if event.text:
            self._pieces.append(event.text)
        if event.finish is not None and event.finish.error is not None:
            raise RuntimeError(event.finish.error)

    @property
    def completion(self) -> Completion:
        """What there is of the answer: all of it when the stream has come to its end."""
        return self._answer.completion()

    def close(self) -> None:
        """Ends the request, unless it has ended."""
        if not self._answer.is_over:
            self._answer.is_over = True
            self._engine.cancel(self.request)

    def __enter__(self) -> Self:
        """Ends the request at the end of a `with`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the request, unless it has ended."""
        self.close()

    def __del__(self) -> None:
        """Nobody is left to hear the rest."""
        self.close()


@dataclass
class _Answer:
    """What has come of a request."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    finish: Finish | None = None
    is_over: bool = False

    def add(self, event: Event) -> None:
        if event.token is not None:
            self.first = self.first if self.tokens else event.seconds
            self.tokens.append(event.token)
            if event.logprob is not None:
                self.logprobs.append(TokenLogprob(event.token, event.logprob, event.top_logprobs))
        self.texts.append(event.text)
        self.last = event.seconds
        if event.finish is not None:
            self.finish, self.is_over = event.finish, True

    def completion(self) -> Completion:
        finish = self.finish
        completion = Completion("".join(self.texts))
        completion.tokens = list(self.tokens)
        completion.finish_reason = finish.reason if finish else None
        completion.stopped_at = None
        if finish:
            completion.stopped_at = finish.stop_text if finish.stop_token is None else finish.stop_token
        completion.prompt_tokens = finish.prompt_tokens if finish else 0
        completion.cached_tokens = finish.cached_tokens if finish else 0
        completion.timings = Timings(self.first, self.last - self.first)
        completion.logprobs = list(self.logprobs) if self.logprobs else None
        return completion


def _prompts(
    prompt: Prompt | list[str] | list[list[int]] | list[list[Message]],
) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a list of several."""
    if isinstance(prompt, str):
        return [prompt], False
    # Arrays and tensors of token ids.
    plain = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(plain, Sequence) or isinstance(next(iter(plain), None), int | Mapping):
        return [cast("Prompt", plain)], False
    return list(cast("Sequence[Prompt]", plain)), True


def _device(device: object) -> str | None:
    """A device as the engine calls it; PyTorch's are told from its own by their names."""
    if device is None:
        return None
    kind, colon, index = str(device).partition(":")
    return f"gpu{colon}{index}" if kind in _GPUS else str(device)
