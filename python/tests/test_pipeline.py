"""The pipeline: one prompt, many, streams, chats, threads, and what goes wrong."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metal_marlin import _native
from metal_marlin.inference.pipeline import Completion, MarlinPipeline

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def pipe() -> Iterator[MarlinPipeline]:
    with MarlinPipeline.from_pretrained(device="cpu", context=512, max_running=8) as pipe:
        yield pipe


def cli_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the program prints with --json."""
    capfd.readouterr()
    assert _native.main(["metal-marlin", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    return report


def test_a_text_is_continued_as_by_the_program(pipe: MarlinPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    completion = pipe(PROMPT, **GREEDY)
    run = cli_json(capfd, "run", PROMPT, "--device=cpu", "--temperature=0", "--max-tokens=16")
    assert isinstance(completion, Completion)
    assert completion == completion.text == run["text"]
    assert completion.tokens == run["tokens"]
    assert (completion.finish_reason, completion.stopped_at) == (run["finish_reason"], run["stopped_at"]) == ("length", None)
    assert completion.prompt_tokens == run["prompt_tokens"] == len(pipe.encode(PROMPT))
    assert completion.timings.prefill > 0
    assert completion.timings.decode > 0
    assert completion.tokens_per_second is not None
    assert completion.logprobs is None

    sampled = pipe(PROMPT, seed=3, max_tokens=16, top_k=20, temperature=0.9)
    run = cli_json(capfd, "run", PROMPT, "--device=cpu", "--seed=3", "--max-tokens=16", "--top-k=20", "--temperature=0.9")
    assert sampled == run["text"]
    assert sampled != completion


def test_completions_are_texts(pipe: MarlinPipeline) -> None:
    completion = pipe(PROMPT, **GREEDY)
    assert f"{completion}" == completion.text
    assert type(completion.text) is str
    for other in (pickle.loads(pickle.dumps(completion)), copy.deepcopy(completion)):
        assert (other, other.tokens, other.timings) == (completion, completion.tokens, completion.timings)


def test_tokens_are_prompts_and_are_told(pipe: MarlinPipeline) -> None:
    tokens = pipe.encode(PROMPT)
    assert pipe.decode(tokens) == PROMPT
    completion = pipe(tokens, **GREEDY)
    assert completion == pipe(PROMPT, **GREEDY)
    assert pipe.decode(completion.tokens) == completion
    assert pipe(np.array(tokens), **GREEDY) == completion  # type: ignore[call-overload]
    assert pipe(np.array([tokens, tokens]), **GREEDY) == [completion, completion]  # type: ignore[call-overload]


def test_a_batch_is_what_each_is_alone(pipe: MarlinPipeline) -> None:
    prompts = [f"{PROMPT} there were {count}" for count in range(12)]
    alone = [pipe(prompt, **GREEDY) for prompt in prompts]
    together = pipe(prompts, **GREEDY)
    assert together == alone
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert pipe([pipe.encode(prompt) for prompt in prompts[:2]], **GREEDY) == alone[:2]
    assert pipe([], **GREEDY) == []


def test_a_stream_is_the_completion_in_pieces(pipe: MarlinPipeline) -> None:
    whole = pipe(PROMPT, **GREEDY)
    stream = pipe.stream(PROMPT, **GREEDY)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 1:
            assert stream.completion.finish_reason is None
            assert whole.startswith(stream.completion)
    assert len(pieces) > 4
    assert "".join(pieces) == whole == stream.completion
    assert stream.completion.finish_reason == "length"
    assert list(stream) == []


def test_a_stream_that_is_left_ends_its_request(pipe: MarlinPipeline) -> None:
    with pipe.stream(PROMPT, max_tokens=400, ignore_eos=True) as stream:
        next(stream)
        request = stream.request
    assert not pipe._engine.cancel(request), "it was cancelled before"
    stream = pipe.stream(PROMPT, max_tokens=400)
    request = stream.request
    del stream
    assert not pipe._engine.cancel(request)
    with pytest.raises(ValueError, match="under way"):
        pipe._engine.events([request])


def test_where_to_end(pipe: MarlinPipeline) -> None:
    free = pipe(PROMPT, temperature=0, max_tokens=40, ignore_eos=True)
    word = free.split()[3]
    stopped = pipe(PROMPT, temperature=0, max_tokens=40, stop=[word], ignore_eos=True)
    assert (stopped.finish_reason, stopped.stopped_at) == ("stop_string", word)
    assert stopped == free[: free.index(word)]
    token = free.tokens[5]
    stopped = pipe(PROMPT, temperature=0, max_tokens=40, stop_token_ids=[token], ignore_eos=True)
    assert (stopped.finish_reason, stopped.stopped_at) == ("stop_token", token)
    assert stopped.tokens == free.tokens[: free.tokens.index(token) + 1]


def test_logprobs(pipe: MarlinPipeline) -> None:
    completion = pipe(PROMPT, **GREEDY, logprobs=3)
    assert completion.logprobs is not None
    assert [one.token for one in completion.logprobs] == completion.tokens
    for one in completion.logprobs:
        assert len(one.top) == 3
        # Greedy takes the likeliest.
        assert one.top[0] == (one.token, one.logprob)
        assert one.logprob <= 0


def test_answers_have_the_form_that_is_asked_for(pipe: MarlinPipeline) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = pipe(PROMPT, seed=1, max_tokens=40, json_schema=schema)
    assert answer.finish_reason in ("complete", "stop_token")
    assert json.loads(answer).keys() == {"age"}
    answer = pipe(PROMPT, seed=1, max_tokens=40, regex="[a-c]{4,8}")
    assert re.fullmatch("[a-c]{4,8}", answer)
    with pytest.raises(ValueError, match="one form"):
        pipe(PROMPT, regex="a", json_object=True)
    with pytest.raises(ValueError, match="grammar of the answer"):
        pipe(PROMPT, regex="(")


def test_chats(pipe: MarlinPipeline) -> None:
    chat = [{"role": "user", "content": "Hello there"}]
    answer = pipe(chat, **GREEDY)
    prompt = pipe.apply_chat_template(chat)
    assert "Hello there" in prompt
    assert answer.prompt_tokens == len(pipe.encode(prompt, add_special_tokens=False))
    assert pipe([chat, chat], **GREEDY) == [answer, answer]
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    assert pipe([{"role": "user", "content": parts}], **GREEDY) == answer
    with pytest.raises(ValueError, match="type"):
        pipe([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="role"):
        pipe([{"content": "Hello"}])
    with pytest.raises(ValueError, match="for chats"):
        pipe(PROMPT, tools=[{"type": "function", "function": {"name": "look"}}])


def test_a_template_of_ones_own_reads_tools_and_variables(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ tools[0].function.name if tools }}|{{ mood }}|{% for m in messages %}{{ m.content }}{% endfor %}")
    with MarlinPipeline.from_pretrained(device="cpu", context=128, chat_template=template) as pipe:
        tools = [{"type": "function", "function": {"name": "look"}}]
        assert pipe.apply_chat_template([{"role": "user", "content": "Hi"}], tools=tools, mood="glad") == "look|glad|Hi"
        answer = pipe([{"role": "user", "content": "Hi"}], tools=tools, template_variables={"mood": "glad"}, **GREEDY)
        assert answer == pipe("look|glad|Hi", **GREEDY)


def test_threads_share_a_pipe(pipe: MarlinPipeline) -> None:
    prompts = [f"{PROMPT} there was {count}" for count in range(6)]
    alone = [pipe(prompt, temperature=0, max_tokens=24) for prompt in prompts]
    heard: dict[int, str] = {}

    def listen(index: int) -> None:
        # Streams and calls side by side.
        if index % 2:
            heard[index] = "".join(pipe.stream(prompts[index], temperature=0, max_tokens=24))
        else:
            heard[index] = pipe(prompts[index], temperature=0, max_tokens=24)

    threads = [threading.Thread(target=listen, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert [heard[index] for index in range(len(prompts))] == alone


def test_ctrl_c_leaves_the_pipe_usable(pipe: MarlinPipeline) -> None:
    before = pipe(PROMPT, **GREEDY)
    for _ in range(3):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (it comes at any time)
            while True:
                pipe(PROMPT, max_tokens=400, ignore_eos=True)
        timer.join()
        assert pipe(PROMPT, **GREEDY) == before


def test_what_is_wrong_is_said(pipe: MarlinPipeline) -> None:
    with pytest.raises(ValueError, match=r"frequency_penalty must be between -2 and 2, found 2\.000000000000001"):
        pipe(PROMPT, frequency_penalty=2.000000000000001)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        pipe(PROMPT, max_tokens=0)
    with pytest.raises(ValueError, match="context of 512 tokens"):
        pipe("word " * 2000)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        pipe([10**9])
    with pytest.raises(ValueError, match="that an f32 holds"):
        pipe(PROMPT, logit_bias={1: 1e300})
    with pytest.raises(TypeError, match="temprature"):
        pipe(PROMPT, temprature=0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"a prompt must be a text, a list of token ids or .*, found 5"):
        pipe(5)  # type: ignore[call-overload]
    # One that is wrong ends the others of its batch, and the pipe goes on.
    with pytest.raises(ValueError, match="context"):
        pipe([PROMPT, "word " * 2000])
    assert pipe(PROMPT, **GREEDY)


def test_models_that_do_not_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        MarlinPipeline.from_pretrained(tmp_path / "missing" / "model")
    with pytest.raises(ValueError, match=r"^invalid value 'fp5' for '--format"):
        MarlinPipeline.from_pretrained(format="fp5")
    with pytest.raises(ValueError, match=r"^unexpected argument '--contxt' found"):
        MarlinPipeline.from_pretrained(contxt=5)
    with pytest.raises(ValueError, match="--device"):
        MarlinPipeline.from_pretrained(device="tpu")
    with pytest.raises(RuntimeError, match="memory"):
        MarlinPipeline.from_pretrained(memory="1MiB", device="cpu")


def test_a_closed_pipe_says_so() -> None:
    pipe = MarlinPipeline.from_pretrained(device="cpu", context=128)
    stream = pipe.stream(PROMPT, max_tokens=20)
    next(stream)
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    with pytest.raises(RuntimeError, match="closed"):
        pipe(PROMPT)
    assert "closed" in repr(pipe)
    pipe.close()


def test_info(pipe: MarlinPipeline) -> None:
    info = pipe.info
    assert (info["context"], info["max_running"]) == (512, 8)
    assert info["vocabulary"] > 1000
    assert info["model"] in repr(pipe)


def test_models_of_every_kind(models: Path, tmp_path: Path) -> None:
    """Folders as they are, quantised while they are opened, and quantised before."""
    folder = models / "tiny-qwen3"
    with MarlinPipeline.from_pretrained(folder, device="cpu", exact=True) as pipe:
        plain = pipe(PROMPT, **GREEDY)
    with MarlinPipeline.from_pretrained(folder, device="cpu", format="int8", no_cache=True) as pipe:
        assert pipe.info["weight_bytes"] < 0.8 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert pipe(PROMPT, **GREEDY).split()[0] == plain.split()[0]
