"""A checkpoint quantised by many nodes, to the byte as by one.

``python -m metal_marlin.ray quantize MODEL OUT --format fp4 --method mse`` does it. Every weight file of the output is a
task of its own; a task whose worker dies is done again elsewhere, and a job that is started again does only what is missing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from metal_marlin.ray import program

#: How often a task is done again whose worker has died.
DEFAULT_RETRIES = 5


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    #: Weight files that are finished.
    finished: int
    #: All weight files.
    total: int
    #: The one that was finished last; empty at the beginning.
    file: str


def quantize(
    arguments: Sequence[str],
    *,
    cpus: float = 1,
    retries: int = DEFAULT_RETRIES,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Quantises a checkpoint on the nodes of the cluster that Ray is connected to.

    The model and the output must be in folders that all nodes share. Until the job is finished, its work is kept in
    ``OUT.partial``, and the same job goes on there; so does ``metal-marlin quantize`` with the same arguments on one machine.

    Args:
        arguments: Of ``metal-marlin quantize``, as in ``["MODEL", "OUT", "--format", "fp4", "--method", "mse"]``. Relative
            paths are relative to the current folder.
        cpus: CPUs of a task: what Ray counts, and its threads.
        retries: How often a weight file is begun again whose worker has died.
        progress: Called at the beginning and after each weight file.

    Returns:
        What ``metal-marlin quantize --json`` reports.

    Raises:
        ProgramError: The arguments are wrong or the model cannot be quantised (the message says why), or it takes running the
            model, which cannot be done in parts.
        RayError: Workers died more often than ``retries`` allow.
    """
    # The report is JSON anyway.
    arguments = program.with_threads([argument for argument in arguments if argument != "--json"], cpus)
    folder = os.getcwd()
    run = ray.remote(num_cpus=cpus, max_retries=retries, scheduling_strategy="SPREAD")(_run)

    def start(*more: str) -> ray.ObjectRef[Any]:
        return run.remote([*arguments, "--json", *more], folder)

    shards = _get(start("--list-shards"))["shards"]
    total, finished = len(shards), sum(shard["finished"] for shard in shards)
    tell = progress or (lambda _: None)
    tell(Progress(finished, total, ""))
    # The largest first, so that none is begun when all others are finished.
    missing = sorted((i for i in range(total) if not shards[i]["finished"]), key=lambda i: -shards[i]["source_bytes"])
    tasks = {start("--shard", f"{i + 1}/{total}"): shards[i]["file"] for i in missing}
    try:
        while tasks:
            (task, *_), _rest = ray.wait(list(tasks), num_returns=1)
            _get(task)
            finished += 1
            tell(Progress(finished, total, tasks.pop(task)))
    except BaseException:
        for task in tasks:
            ray.cancel(task, force=True)
        raise
    report = _get(start())
    assert isinstance(report, dict)
    return report


def _run(arguments: list[str], folder: str) -> Any:
    """Runs ``metal-marlin quantize`` on the node at hand, and returns what it reports."""
    return json.loads(program.run(["quantize", *arguments], folder=folder))


def _get(task: ray.ObjectRef[Any]) -> Any:
    """The result of a task, or its error as it was raised."""
    try:
        return ray.get(task)
    except RayTaskError as error:
        raise error.cause from None


def print_progress(progress: Progress) -> None:
    """Tells how far a job is, a line each time."""
    file = f"  {progress.file}" if progress.file else ""
    print(f"{progress.finished} of {progress.total} weight files{file}", file=sys.stderr, flush=True)
