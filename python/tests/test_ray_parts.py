"""What the Ray part consists of, without a cluster."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'metal_marlin[ray]'")

from metal_marlin.ray import guard, metrics
from metal_marlin.ray.messages import HttpRequest
from metal_marlin.ray.prompts import BLOCK_BYTES, MAX_BLOCKS, prefix_blocks
from metal_marlin.ray.router import PrefixMemory, ranking
from metal_marlin.ray.serve import ServeArgs, app

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "You are a poet who answers in rhymes. " * 8}


def chat(*messages: dict[str, str], **more: object) -> tuple[int, ...]:
    return prefix_blocks(CHAT, json.dumps({"model": "m", "messages": messages, **more}).encode())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_a_longer_conversation_begins_like_the_shorter_one() -> None:
    short = chat(SYSTEM, user("A poem about rivers, please."))
    answer = {"role": "assistant", "content": "The river runs, the river bends. " * 5}
    long = chat(SYSTEM, user("A poem about rivers, please."), answer, user("And one about hills."))
    # All but the last block, which stands for the end of the short one.
    assert common(short, long) >= len(short) - 1
    assert len(long) > len(short)


def test_prompts_share_what_is_before_their_first_difference() -> None:
    one, other = chat(SYSTEM, user("rivers")), chat(SYSTEM, user("hills"))
    system = len(json.dumps(SYSTEM)) // BLOCK_BYTES
    assert common(one, other) in (system, system + 1)
    assert one[-1] != other[-1]
    assert chat(SYSTEM, user("rivers")) == one
    assert common(one, chat(user("rivers"))) == 0


def test_model_and_salt_tell_prompts_apart() -> None:
    plain = chat(SYSTEM)
    assert common(plain, chat(SYSTEM, model="other")) == 0
    assert common(plain, chat(SYSTEM, cache_salt="mine")) == 0
    # What does not change the prompt does not change its blocks.
    assert chat(SYSTEM, temperature=0.5, stream=True) == plain


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Once upon a time"}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/responses", {"input": "Hello", "instructions": "Be kind."}),
        ("/v1/messages", {"system": "Be kind.", "messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_every_endpoint_has_prompts(path: str, body: dict[str, object]) -> None:
    assert prefix_blocks(path, json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"messages": []}', b"\xff", b'{"messages": "\\ud800"}'])
def test_bodies_that_make_no_sense_are_left_to_the_server(body: bytes) -> None:
    assert len(prefix_blocks(CHAT, body)) <= 1
    assert prefix_blocks("/v1/embeddings", b'{"input": "text"}') == ()


def test_long_prompts_have_a_bounded_number_of_blocks() -> None:
    assert len(chat(user("word " * 100_000))) == MAX_BLOCKS


def request(prefix: tuple[int, ...], **more: object) -> HttpRequest:
    return HttpRequest("POST", CHAT, (), b"", prefix, **more)  # type: ignore[arg-type]


def test_a_prompt_goes_where_its_beginning_is_known() -> None:
    memory = PrefixMemory(100)
    memory.add("b", (1, 2, 3, 4))
    loads = dict.fromkeys("abc", 0)
    assert ranking(request((1, 2, 3, 9)), loads, memory)[0] == "b"
    memory.add("c", (1, 2, 3, 9, 5))
    assert ranking(request((1, 2, 3, 9, 5)), loads, memory)[0] == "c"


def test_load_outweighs_what_is_known() -> None:
    memory = PrefixMemory(100)
    memory.add("b", (1, 2, 3, 4))
    assert ranking(request((1, 2, 3, 4)), {"a": 0, "b": 7}, memory, affinity=8)[0] == "b"
    assert ranking(request((1, 2, 3, 4)), {"a": 0, "b": 9}, memory, affinity=8)[0] == "a"
    # Half of the prompt outweighs half as much.
    assert ranking(request((1, 2, 8, 9)), {"a": 0, "b": 3}, memory, affinity=8)[0] == "b"
    assert ranking(request((1, 2, 8, 9)), {"a": 0, "b": 5}, memory, affinity=8)[0] == "a"


def test_new_prompts_spread_and_gateways_agree() -> None:
    loads = dict.fromkeys("abcd", 0)
    first = [ranking(request((prompt,)), loads, PrefixMemory(1))[0] for prompt in range(400)]
    assert first == [ranking(request((prompt,)), loads, PrefixMemory(1))[0] for prompt in range(400)]
    assert all(60 < first.count(replica) < 140 for replica in loads)
    # One that goes takes only its own prompts along.
    without = [ranking(request((prompt,)), dict.fromkeys("abc", 0), PrefixMemory(1))[0] for prompt in range(400)]
    assert all(now == before for now, before in zip(without, first, strict=True) if before != "d")


def test_owners_and_failures_count_more_than_load() -> None:
    loads = {"a": 0, "b": 50}
    assert ranking(request((1,), owner="b"), loads, PrefixMemory(1)) == ["b"]
    assert ranking(request((1,), owner="gone"), loads, PrefixMemory(1)) == ["a", "b"]
    assert ranking(request((1,), failed=frozenset("a")), loads, PrefixMemory(1)) == ["b", "a"]


def test_the_ends_of_old_prompts_are_forgotten_first() -> None:
    memory = PrefixMemory(6)
    memory.add("a", (1, 2, 3, 4))
    memory.add("a", (7, 8, 9, 10))
    assert memory.matched("a", (7, 8, 9, 10)) == 4
    assert memory.matched("a", (1, 2, 3, 4)) == 2
    memory.keep_only(["b"])
    assert memory.matched("a", (7, 8, 9, 10)) == 0


def test_metrics_of_several_servers_are_one_text() -> None:
    first = '# HELP hits Hits.\n# TYPE hits counter\nhits_total{model="m"} 3\n# TYPE up gauge\nup 1\n'
    second = first.replace("3", "5")
    assert metrics.merge({"a": first, "b": second}) == (
        "# HELP hits Hits.\n# TYPE hits counter\n"
        'hits_total{replica="a",model="m"} 3\nhits_total{replica="b",model="m"} 5\n'
        '# TYPE up gauge\nup{replica="a"} 1\nup{replica="b"} 1\n'
    )
    assert metrics.merge({"a": "up 1\n# EOF\n", "b": "up 1\n# EOF\n"}).count("# EOF") == 1


@pytest.mark.parametrize("replicas", ["0", "2-1", "a", "1-", "-1", "1.5", ""])
def test_replicas_are_numbers(replicas: str) -> None:
    with pytest.raises(ValueError, match="no number of replicas"):
        ServeArgs(replicas=replicas)


def test_arguments_are_checked() -> None:
    args = ServeArgs.model_validate({"model": "m", "replicas": 2, "options": "--kv int8 --context 4096", "cpus": "0.5"})
    assert args.options == ["--kv", "int8", "--context", "4096"]
    assert args.replicas == "2"
    with pytest.raises(ValueError, match="no option of a replica"):
        ServeArgs(options=["--port=80"])
    with pytest.raises(ValueError, match="nonsense"):
        ServeArgs.model_validate({"nonsense": 1})


def test_ray_knows_what_arguments_the_application_takes() -> None:
    assert inspect.signature(app).parameters["args"].annotation is ServeArgs


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("how", ["the pipe breaks", "it is told to end"])
def test_what_is_guarded_does_not_outlive_its_starter(how: str) -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    command = [sys.executable, "-I", guard.__file__, sys.executable, "-c", sleeper]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_alive(pid)
    if how == "the pipe breaks":
        process.stdin.close()
        assert process.wait(30) == 128 + signal.SIGKILL
    else:
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, "the command goes on"
        time.sleep(0.01)
    process.stdin.close()
    process.stdout.close()


def test_a_guard_tells_how_the_command_ended() -> None:
    command = [sys.executable, "-I", guard.__file__, sys.executable, "-c", "exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(30) == 7
