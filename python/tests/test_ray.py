"""Serving and quantising on a Ray cluster of two nodes, some of whose workers are killed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'metal_marlin[ray]'")
pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx
import numpy as np
import openai
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster

from metal_marlin.ray import program, quantize
from metal_marlin.ray.gateway import REPLICA_HEADER
from metal_marlin.ray.program import ProgramError
from metal_marlin.ray.serve import API_KEY_VARIABLE, APPLICATION, ServeArgs, run

pytestmark = pytest.mark.ray

KEY = "secret"
MODEL = "tiny"
#: More than the first and the last steps of anything, on any machine.
PATIENCE = 60.0
OF_SERVERS = ["--served-name", MODEL, "--max-running", "8", "--kv-tokens", "8192"]
SYSTEM = "You are a narrator who tells long stories of the sea, the wind and the people who live by them. " * 2


def until(happens: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Waits until something happens."""
    deadline = time.monotonic() + patience
    while not happens():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str


def processes() -> list[Process]:
    """All processes of the machine."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    fields = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [Process(int(pid), int(parent), " ".join(command)) for pid, parent, *command in fields]


def descendants(pid: int) -> list[Process]:
    """What a process has started, and what that has, parents first."""
    found, everything = [], processes()
    todo = [pid]
    while todo:
        parent = todo.pop()
        children = [process for process in everything if process.parent == parent]
        found += children
        todo += [child.pid for child in children]
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs each, as far as Ray is concerned."""
    if shutil.which("ps") is None:
        pytest.skip("needs ps, to find the workers that it kills")
    with pytest.MonkeyPatch.context() as environment:
        # Workers find the package and this file where this process does.
        import metal_marlin

        here = [str(Path(metal_marlin.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))
        node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]


class Served:
    """An application that serves, and its replicas."""

    def __init__(self, url: str, application: str = APPLICATION) -> None:
        self.url = url
        self.application = application
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def http(self, method: str, path: str, **options: Any) -> Any:
        headers = {"authorization": f"Bearer {KEY}", **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=PATIENCE, **options)

    def workers(self, deployment: str = "Replica") -> dict[str, int]:
        """Processes of the replicas' workers (or the gateways'), by their names."""
        found: dict[str, int] = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if f"#{deployment}#" not in actor["name"]:
                continue
            try:
                handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
                pid: Any = ray.get(handle.__ray_call__.remote(lambda _self: os.getpid()), timeout=PATIENCE)
            except (ray.exceptions.RayError, ValueError):
                continue
            found[actor["name"].rsplit("#", 1)[1]] = pid
        return found

    def server(self, replica: str) -> Process:
        """The process of a replica's server."""
        return descendants(self.workers()[replica])[-1]

    def replica_states(self) -> dict[str, int]:
        """How many replicas are in which state."""
        return dict(ray_serve.status().applications[self.application].deployments["Replica"].replica_states)

    def is_whole(self) -> bool:
        """Whether all replicas run."""
        return self.replica_states() == {"RUNNING": 2} and len(self.workers()) == 2

    def complete(self, prompt: str, **options: Any) -> tuple[Any, str]:
        """A completion, and the replica that it is from."""
        options = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}, **options}
        raw = self.client.completions.with_raw_response.create(model=MODEL, prompt=prompt, **options)
        return raw.parse(), raw.headers[REPLICA_HEADER]

    def prompts_of_each(self) -> dict[str, str]:
        """A prompt that each replica has the beginning of."""
        found: dict[str, str] = {}
        for number in range(200):
            prompt = f"Tale number {number}, of {number} ships. {SYSTEM}"
            found.setdefault(self.complete(prompt, max_tokens=1)[1], prompt)
            if len(found) == 2:
                return found
        raise AssertionError(f"all of 200 prompts went to {set(found)}")


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[Served]:
    """Two replicas of the bundled model, a node each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(API_KEY_VARIABLE, KEY)
        run(ServeArgs(replicas="2", cpus=1, options=OF_SERVERS, drain=5))
    yield Served(f"http://127.0.0.1:{port}")
    ray_serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def whole(served: Served) -> Served:
    """The same with both replicas, whatever the test before did to them."""
    until(served.is_whole, "the restart of all replicas")
    return served


def test_the_official_client_works(whole: Served) -> None:
    client = whole.client
    assert [model.id for model in client.models.list()] == [MODEL]
    messages: Any = [{"role": "user", "content": "Tell me of the sea."}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert chat.usage is not None
    assert chat.usage.completion_tokens > 0
    stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 2
    assert "".join(pieces) == chat.choices[0].message.content
    vectors = client.embeddings.create(model=MODEL, input=["sea", "wind"]).data
    assert len(vectors) == 2
    assert len(vectors[0].embedding) == len(vectors[1].embedding) > 0


def test_other_endpoints_and_errors_pass(whole: Served) -> None:
    message = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    assert whole.http("POST", "/v1/messages", json=message).json()["type"] == "message"
    assert whole.http("GET", "/health").status_code == 200
    assert "/v1/chat/completions" in whole.http("GET", "/openapi.json").json()["paths"]
    assert whole.http("GET", "/v1/models/no%2Fmodel").status_code == 404
    with pytest.raises(openai.NotFoundError, match="nobody"):
        whole.client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        whole.client.with_options(api_key="wrong").models.list()
    large = whole.http("POST", "/v1/completions", content=b" " * ((16 << 20) + 1))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")


def test_prompts_that_begin_alike_go_where_the_beginning_is(whole: Served) -> None:
    prompt, cached, replicas = SYSTEM, [], set()
    for chapter in range(4):
        # More than a block of the cache each time.
        prompt += f" Chapter {chapter} is about the people of the island, their boats and what they catch with them." * 2
        answer, replica = whole.complete(prompt)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        replicas.add(replica)
    assert len(replicas) == 1
    assert cached == sorted(set(cached)), f"{cached} grows"
    # Others are spread.
    assert set(whole.prompts_of_each()) == set(whole.workers())


def test_load_outweighs_prefixes(whole: Served) -> None:
    prompt = f"All at once. {SYSTEM}"
    whole.complete(prompt)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: whole.complete(prompt, max_tokens=256), range(40)))
    # How many each gets depends on how fast they are; by the prompt alone all would go to one.
    assert {replica for _, replica in answers} == set(whole.workers())


def test_a_replica_is_added_under_load(whole: Served) -> None:
    prompts = [f"Tale number {number} is of a ship" for number in range(8)]
    expected = {prompt: whole.complete(prompt, max_tokens=64)[0].choices[0].text for prompt in prompts}
    growing = Served(f"{whole.url}/growing", "growing")
    answered: set[str] = set()
    done = threading.Event()

    def ask(prompt: str) -> None:
        """Asks again and again."""
        while not done.is_set():
            answer, replica = growing.complete(prompt, max_tokens=64)
            assert answer.choices[0].text == expected[prompt]
            answered.add(replica)

    args = ServeArgs(replicas="1-2", cpus=1, options=OF_SERVERS, target_requests=2, upscale_delay=0, drain=5)
    run(args, name=growing.application, route_prefix="/growing")
    try:
        assert growing.replica_states() == {"RUNNING": 1}
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            asked = [pool.submit(ask, prompt) for prompt in prompts]
            try:
                # Ray learns of the load every ten seconds, and a machine that is busy with it starts a replica slowly.
                happens = lambda: len(answered) == 2 or any(task.done() for task in asked)  # noqa: E731
                until(happens, "an answer of a second replica", 3 * PATIENCE)
            finally:
                done.set()
        # None of them was wrong, or missing.
        assert [task.exception() for task in asked] == [None] * len(prompts)
        assert len(answered) == 2
        assert growing.replica_states() == {"RUNNING": 2}
    finally:
        ray_serve.delete(growing.application)


def test_stored_responses_are_found(whole: Served) -> None:
    client = whole.client
    for topic in ("sea", "wind", "island"):
        first = client.responses.create(model=MODEL, input=f"A word on the {topic}.", max_output_tokens=8)
        stream = client.responses.create(
            model=MODEL, input="Go on.", previous_response_id=first.id, max_output_tokens=8, stream=True
        )
        last: Any = list(stream)[-1]
        for response in (first.id, last.response.id):
            assert client.responses.retrieve(response).id == response
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_servers_that_do_not_start_say_why(whole: Served) -> None:
    with pytest.raises(ProgramError, match="no-model"):
        run(ServeArgs(model="no-model", cpus=0.1), name="other", route_prefix="/other")
    assert set(ray_serve.status().applications) == {APPLICATION}


def test_metrics_are_those_of_all_replicas(whole: Served) -> None:
    text = whole.http("GET", "/metrics").text
    assert set(re.findall(r'replica="([^"]+)"', text)) == set(whole.workers())
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(types) == len(set(types)) > 5


def metric(served: Served, name: str) -> float:
    """The sum of a metric over the replicas."""
    text = served.http("GET", "/metrics").text
    samples = re.findall(rf"^metal_marlin_{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert len(samples) == 2, text
    return sum(map(float, samples))


def test_a_client_that_leaves_takes_its_request_along(whole: Served) -> None:
    def is_idle() -> bool:
        return metric(whole, "requests_running") == 0

    until(is_idle, "the end of earlier answers")
    before = metric(whole, "generated_tokens_total")
    # So many tokens that the end of the request comes long before their own, on a busy machine, too.
    answers, tokens = 8, 900
    stream = whole.client.completions.create(
        model=MODEL, prompt=SYSTEM, n=answers, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert metric(whole, "requests_running") > 0
    stream.close()
    until(is_idle, "the end of the request")
    assert metric(whole, "generated_tokens_total") - before < answers * tokens, "it came to its own end"


def read(stream: Any) -> tuple[str, Exception | None]:
    """A stream's text, and the error that it ends with."""
    text = ""
    try:
        for chunk in stream:
            text += chunk.choices[0].text
    except openai.APIError as error:
        return text, error
    return text, None


def test_a_killed_worker_disturbs_no_neighbour(whole: Served) -> None:
    prompts = whole.prompts_of_each()
    kept, killed = sorted(prompts)
    expected = whole.complete(prompts[kept], max_tokens=700)[0].choices[0].text
    worker, server = whole.workers()[killed], whole.server(killed)
    streams = {
        replica: whole.client.completions.with_raw_response.create(
            model=MODEL, prompt=prompts[replica], max_tokens=700, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        for replica in (kept, killed)
    }
    assert {replica: stream.headers[REPLICA_HEADER] for replica, stream in streams.items()} == {kept: kept, killed: killed}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = {replica: pool.submit(read, stream.parse()) for replica, stream in streams.items()}
        os.kill(worker, signal.SIGKILL)
        # New requests are answered at once, that of the dead replica's prompt, too.
        for prompt in prompts.values():
            assert whole.complete(prompt)[0].usage.completion_tokens == 8
        assert texts[kept].result() == (expected, None)
        text, error = texts[killed].result()
    assert error is not None, "a stream that breaks off must not look whole"
    assert "died" in str(error)
    assert len(text) < len(expected) or text == ""
    until(lambda: server.pid not in {process.pid for process in processes()}, "the end of the dead worker's server")
    until(whole.is_whole, "the restart of the replica")
    assert killed not in whole.workers()


def test_a_request_whose_replica_dies_before_it_answers_is_given_to_another(whole: Served) -> None:
    prompts = whole.prompts_of_each()
    killed = min(prompts)
    worker, server = whole.workers()[killed], whole.server(killed)
    # It takes the request and says nothing.
    os.kill(server.pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(whole.complete, prompts[killed])
        with pytest.raises(TimeoutError):
            answer.result(timeout=1)
        os.kill(worker, signal.SIGKILL)
        completion, replica = answer.result()
    assert completion.usage.completion_tokens == 8
    assert replica != killed


def test_a_replica_whose_server_dies_is_replaced(whole: Served) -> None:
    prompts = whole.prompts_of_each()
    killed = min(prompts)
    os.kill(whole.server(killed).pid, signal.SIGKILL)
    assert whole.complete(prompts[killed])[1] != killed
    until(lambda: killed not in whole.workers() and whole.is_whole(), "the restart of the replica")


def test_a_killed_gateway_is_replaced(whole: Served) -> None:
    (gateway,) = whole.workers("Gateway").values()
    os.kill(gateway, signal.SIGKILL)
    assert whole.complete(SYSTEM)[0].usage.completion_tokens == 8
    assert gateway not in whole.workers("Gateway").values()


# Quantising.

OPTIONS = ["--format", "fp4", "--method", "mse", "--max-shard-size", "2MiB"]
MATRICES, SIZE = 24, 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("model")
    random = np.random.default_rng(1)
    tensors, length = {}, SIZE * SIZE * 2
    for layer in range(MATRICES):
        offsets = [layer * length, (layer + 1) * length]
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = {"dtype": "BF16", "shape": [SIZE, SIZE], "data_offsets": offsets}
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(MATRICES):
            weights = random.standard_normal((SIZE, SIZE), dtype=np.float32)
            file.write((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return str(folder)


@pytest.fixture(scope="module")
def at_once(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes of it."""
    out = tmp_path_factory.mktemp("at_once") / "out"
    program.run(["quantize", model, str(out), *OPTIONS])
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def writers() -> dict[int, str]:
    """Workers that write weight files, and which."""
    found = ((process.parent, re.search(r"guard\.py .* --shard (\S+)", process.command)) for process in processes())
    return {worker: shard[1] for worker, shard in found if shard}


def test_a_killed_worker_does_not_change_a_byte(cluster: Cluster, model: str, at_once: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[quantize.Progress] = []
    killed: list[str] = []

    def kill() -> None:
        until(lambda: bool(writers()), "the begin of a weight file")
        worker, shard = next(iter(writers().items()))
        os.kill(worker, signal.SIGKILL)
        killed.append(shard)
        until(lambda: worker not in writers(), "the end of what the worker ran")

    killer = threading.Thread(target=kill)
    killer.start()
    report = quantize.quantize([model, str(out), *OPTIONS], progress=told.append)
    killer.join()
    assert len(killed) == 1
    assert [progress.finished for progress in told] == list(range(len(told)))
    assert told[-1].total == len(told) - 1 > 4
    assert report["scheme"] == "fp4 g128"
    assert contents(out) == at_once
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_job_goes_on_where_it_was(cluster: Cluster, model: str, at_once: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stopped(Exception):
        pass

    def stop(progress: quantize.Progress) -> None:
        if progress.finished == 2:
            raise Stopped

    with pytest.raises(Stopped):
        quantize.quantize([model, str(out), *OPTIONS], progress=stop)
    until(lambda: not writers(), "the end of the job's workers")
    assert not out.exists()
    told: list[quantize.Progress] = []
    quantize.quantize([model, str(out), *OPTIONS], progress=told.append)
    assert told[0].finished >= 2
    assert contents(out) == at_once


def test_what_cannot_be_done_in_parts_is_refused(cluster: Cluster, model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ProgramError, match=r"--method gptq .*choose --method mse or rtn"):
        quantize.quantize([model, out, "--format", "fp4"])
    with pytest.raises(ProgramError, match="no-model"):
        quantize.quantize([str(tmp_path / "no-model"), out, *OPTIONS])
    assert list(tmp_path.iterdir()) == []


def test_the_commands_say_what_is_wrong(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from metal_marlin.ray.__main__ import main

    assert main(["serve", "--replicas", "none"]) == 2
    assert "--replicas" in capsys.readouterr().err
    assert main(["serve", "--cpus", "-1"]) == 2
    assert "--cpus" in capsys.readouterr().err
    assert main(["serve", "--replicas", "1-2", "--upscale-delay", "-1", "--downscale-delay", "soon"]) == 2
    assert re.findall(r"--\w+-delay", capsys.readouterr().err) == ["--upscale-delay", "--downscale-delay"]
    assert main(["serve", "--replicas", "2", "--upscale-delay", "1"]) == 2
    assert "error: upscale_delay is for replicas that come and go" in capsys.readouterr().err


def test_the_command_quantises(cluster: Cluster, model: str, at_once: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metal_marlin.ray", "quantize", model, "out", "--address", cluster.address, *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["scheme"] == "fp4 g128"
    assert "weight files" in done.stderr
    assert contents(tmp_path / "out") == at_once
