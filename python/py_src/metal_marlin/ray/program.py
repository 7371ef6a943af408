"""The program that does the work, as a process that does not outlive the worker that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

#: Names a ``metal-marlin`` binary that runs in place of this package's own.
PROGRAM_VARIABLE = "METAL_MARLIN_PROGRAM"

_GUARD = Path(__file__).with_name("guard.py")


class ProgramError(RuntimeError):
    """The program ended with an error; the message is what it said."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that runs the program with ``arguments`` on this machine."""
    binary = os.environ.get(PROGRAM_VARIABLE)
    program = [binary] if binary else [sys.executable, "-m", "metal_marlin"]
    return [*program, *arguments]


def with_threads(arguments: Sequence[str], cpus: float) -> list[str]:
    """The arguments with as many threads as there are CPUs, unless they say how many."""
    is_given = any(argument.split("=")[0] == "--threads" for argument in arguments)
    return [*arguments] if is_given else [*arguments, "--threads", str(max(1, round(cpus)))]


def start(
    arguments: Sequence[str],
    *,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> subprocess.Popen[bytes]:
    """Starts the program in a session of its own, so that :func:`os.killpg` ends all of it.

    It dies with this process, however that ends: it has an open pipe as its input, and a guard in front of the program ends
    it when the pipe breaks. Whoever starts it must leave ``stdin`` alone until it has ended.
    """
    return subprocess.Popen(
        [sys.executable, "-I", str(_GUARD), *command(arguments)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        start_new_session=True,
    )


def run(arguments: Sequence[str], *, folder: str | None = None) -> bytes:
    """Runs the program in a folder to its end.

    Returns:
        What it wrote to its standard output.

    Raises:
        ProgramError: It failed; the message is what it wrote to its standard error.
        FileNotFoundError: The folder is not there on this machine.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"the folder {folder} is not on this node; start the job in one that all nodes share")
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        with start(arguments, stdout=stdout, stderr=stderr, folder=folder) as process:
            code = process.wait()
        for stream in (stdout, stderr):
            stream.seek(0)
        if code != 0:
            said = stderr.read().decode(errors="replace").strip()
            raise ProgramError(said or f"metal-marlin {' '.join(arguments)} ended with code {code}")
        return stdout.read()
