"""A replica: a server of its own, in a process of its own, and an actor that hands requests to it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import IO

import aiohttp
from ray import serve
from yarl import URL

from metal_marlin.ray import program
from metal_marlin.ray.messages import Headers, HttpRequest, ReplicaLost, ResponseHead

logger = logging.getLogger("ray.serve")

#: What the server says when it listens.
_SERVING = re.compile(r"^Serving .* at (http://\S+)/v1 ")
#: Lines of a server's log that are told when it dies.
_LAST_LINES = 20
#: Headers that are about one connection.
_OF_THE_CONNECTION = frozenset(
    {"connection", "content-length", "date", "host", "keep-alive", "server", "te", "trailer", "transfer-encoding", "upgrade"}
)
#: Seconds within which a server that is alive says so.
_HEALTH_TIMEOUT = 10.0
#: Seconds from the order to end to the end: nothing is under way then.
_END_TIMEOUT = 10.0


def end_to_end(headers: Headers) -> Headers:
    """The headers that are handed on."""
    return tuple((name, value) for name, value in headers if name.lower() not in _OF_THE_CONNECTION)


class Replica:
    """Runs ``metal-marlin serve`` and hands requests to it. If the server dies, so does this, and Ray starts another."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Returns when the server listens.

        Args:
            arguments: Of ``metal-marlin serve``, without host and port.
            environment: Variables of the server's environment, beside this process's own.

        Raises:
            ProgramError: The server does not start; the message is what it said.
        """
        self._name = serve.get_replica_context().replica_id.unique_id
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._url = ""
        self._settled = threading.Event()
        self._ends = False
        self._session: aiohttp.ClientSession | None = None
        arguments = ["serve", *arguments, "--host", "127.0.0.1", "--port", "0"]
        self._server = program.start(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, environment=environment)
        assert self._server.stderr is not None
        threading.Thread(target=self._follow, args=(self._server.stderr,), daemon=True).start()
        self._settled.wait()
        if not self._url:
            self._end(at_once=True)
            raise program.ProgramError("\n".join(self._last_lines) or "the server ended without a word")

    async def forward(self, request: HttpRequest) -> AsyncIterator[ResponseHead | bytes]:
        """Hands a request to the server.

        Yields:
            The head of the answer, then its body: a stream of events in pieces as they come, anything else in one piece, and
            not before it has come as a whole.

        Raises:
            ReplicaLost: The server broke off.
        """
        try:
            async with self._client().request(
                request.method,
                URL(self._url + request.path, encoded=True),
                headers=end_to_end(request.headers),
                data=request.body,
                allow_redirects=False,
            ) as response:
                head = ResponseHead(response.status, end_to_end(tuple(response.headers.items())), self._name)
                if head.is_stream:
                    yield head
                    async for piece in response.content.iter_any():
                        yield piece
                else:
                    body = await response.read()
                    yield head
                    yield body
        except aiohttp.ClientError as error:
            raise ReplicaLost(self._name, str(error) or type(error).__name__) from None

    async def fetch(self, request: HttpRequest) -> tuple[ResponseHead, bytes]:
        """Hands over a request whose answer is no stream.

        Raises:
            ReplicaLost: The server broke off.
        """
        parts = self.forward(request)
        head, body = await anext(parts), await anext(parts)
        assert isinstance(head, ResponseHead)
        assert isinstance(body, bytes)
        return head, body

    async def check_health(self) -> None:
        """Asked by Ray every few seconds.

        Raises:
            ReplicaLost: The server is dead, or does not answer.
        """
        if self._server.poll() is not None:
            raise ReplicaLost(self._name, "the server has ended")
        try:
            timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT)
            async with self._client().get(f"{self._url}/health", timeout=timeout):
                return
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ReplicaLost(self._name, f"the server does not answer: {error}") from None

    def __del__(self) -> None:
        """Called by Ray when no answer is under way any more, or the time for them is over."""
        self._end(at_once=False)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            # Answers take as long as they do; the server has limits of its own.
            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session

    def _follow(self, log: IO[bytes]) -> None:
        """Reads the server's log to its end, which is that of the server."""
        for line in log:
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            logger.info("%s", text)
            serving = _SERVING.match(text)
            if serving:
                self._url = serving[1]
                self._settled.set()
        if self._settled.is_set() and not self._ends:
            # Ray sees the death of an actor at once, and those who wait for it are told.
            logger.error("The server of replica %s has died:\n%s", self._name, "\n".join(self._last_lines))
            self._end(at_once=True)
            os._exit(1)
        self._settled.set()

    def _end(self, *, at_once: bool) -> None:
        """Ends the server and all that belongs to it, once."""
        if self._ends:
            return
        self._ends = True
        if not at_once:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(_END_TIMEOUT)
                return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
