"""The door to the replicas: every request goes through here to one of them, and its answer back."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from metal_marlin.ray import metrics
from metal_marlin.ray.messages import Headers, HttpRequest, ReplicaLost, ResponseHead
from metal_marlin.ray.prompts import prefix_blocks
from metal_marlin.ray.replica import end_to_end

logger = logging.getLogger("ray.serve")

#: Says in an answer's headers which replica it is from.
REPLICA_HEADER = "x-metal-marlin-replica"
#: How often a request is tried whose replicas die before they have answered.
ATTEMPTS = 5
#: Seconds before it is tried again.
_PAUSE = 0.2
#: Seconds for what all replicas are asked at once.
_BROADCAST_TIMEOUT = 10.0
#: Responses whose replicas are remembered.
_REMEMBERED_RESPONSES = 65_536
#: Where a response's id is, in an answer or in the first event of a stream.
_RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[^"]+)"')
_RESPONSE_PATH = re.compile(r"/v1/responses/([^/]+)")

#: What says that a replica died, or is dying.
_LOST = (RayActorError, ReplicaLost)


class Gateway:
    """Answers HTTP requests by handing them to replicas.

    A request whose replica dies before anything of the answer was sent is given to another one. A stream that breaks
    later ends with an error in the form of its endpoint.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body: int) -> None:
        """Takes requests whose bodies have at most ``max_body`` bytes."""
        self._replicas = replicas
        self._forward = replicas.options(method_name="forward", stream=True)
        self._max_body = max_body
        self._owners: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, request: Request) -> Response:
        """Answers a request."""
        prefix = request.scope.get("root_path", "")
        path = request.scope["path"].removeprefix(prefix)
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        if body is None:
            limit = f"the body is larger than {self._max_body} bytes; the option --max-body sets the limit"
            return _error(path, 413, "invalid_request_error", limit)
        # Paths are handed on as they came, escapes included.
        raw_path = request.scope.get("raw_path", quote(path).encode()).decode().removeprefix(prefix)
        query = request.scope.get("query_string", b"").decode()
        raw_path += f"?{query}" if query else ""
        headers = end_to_end(tuple(request.headers.items()))
        forwarded = HttpRequest(request.method, raw_path, headers, body, prefix_blocks(path, body))
        try:
            if path == "/metrics" and request.method == "GET":
                return await self._metrics(forwarded)
            forwarded = replace(forwarded, owner=await self._owner(path, forwarded))
            return await self._answer(path, forwarded)
        except BackPressureError:
            busy = "too many requests wait for a replica; try again later"
            return _error(path, 429, "rate_limit_error", busy, {"retry-after": "1"})
        except DeploymentUnavailableError as error:
            return _error(path, 503, "server_error", f"the replicas cannot be started: {error}")

    async def _body(self, request: Request) -> bytes | None:
        """The body; ``None`` if it is too large."""
        pieces, length = [], 0
        async for piece in request.stream():
            length += len(piece)
            if length > self._max_body:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    async def _answer(self, path: str, request: HttpRequest) -> Response:
        """Gives a request to replicas until one has answered it, or begun to."""
        lost: BaseException | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE)
            parts = self._forward.remote(request)
            assert isinstance(parts, DeploymentResponseGenerator)
            try:
                head = await anext(parts)
                piece = await anext(parts, b"")
            except _LOST as error:
                logger.warning("A replica was lost before it answered %s %s: %s", request.method, path, error)
                lost = error
                if isinstance(error, ReplicaLost):
                    request = replace(request, failed=request.failed | {error.replica})
                continue
            except asyncio.CancelledError:
                # Who asked has left.
                parts.cancel()  # type: ignore[no-untyped-call]  # Ray's
                raise
            assert isinstance(head, ResponseHead)
            assert isinstance(piece, bytes)
            if path == "/v1/responses":
                self._learn_owner(piece, head.replica)
            headers = (*head.headers, (REPLICA_HEADER, head.replica))
            if head.is_stream:
                return _with_headers(StreamingResponse(self._stream(path, piece, parts), head.status), headers)
            return _with_headers(Response(piece, head.status), headers)
        message = f"{ATTEMPTS} times the replica that was to answer died; the last one: {lost}"
        return _error(path, 503, "server_error", message, {"retry-after": "1"})

    async def _stream(self, path: str, first: bytes, parts: Any) -> AsyncIterator[bytes]:
        """The events of a stream. Whoever stops reading them ends the request."""
        try:
            yield first
            async for piece in parts:
                yield piece
        except (*_LOST, RayTaskError) as error:
            logger.warning("A replica was lost in the middle of a stream of %s: %s", path, error)
            yield _error_event(path, "the replica that made this answer has died; ask again")
        finally:
            # Of no effect if it has ended.
            parts.cancel()

    async def _metrics(self, request: HttpRequest) -> Response:
        """What the servers tell, each sample with its replica."""
        answers = await self._ask_all(request)
        if not answers:
            return _error("/metrics", 503, "server_error", "no replica answers")
        for head, body in answers:
            if head.status != 200:
                return _with_headers(Response(body, head.status), head.headers)
        text = metrics.merge({head.replica: body.decode() for head, body in answers})
        return _with_headers(Response(text, 200), answers[0][0].headers)

    async def _owner(self, path: str, request: HttpRequest) -> str | None:
        """The replica that has the response which a request is about; ``None`` if it is about none, or nobody has it."""
        response = _response_of(path, request)
        if response is None:
            return None
        owner = self._owners.get(response)
        if owner is None:
            # Another gateway may have seen it come to be.
            get = HttpRequest("GET", f"/v1/responses/{quote(response, safe='')}", request.headers, b"")
            owner = next((head.replica for head, _ in await self._ask_all(get) if head.status == 200), None)
        return owner

    def _learn_owner(self, body: bytes, replica: str) -> None:
        found = _RESPONSE_ID.search(body)
        if found:
            self._owners[found[1].decode()] = replica
            while len(self._owners) > _REMEMBERED_RESPONSES:
                self._owners.popitem(last=False)

    async def _ask_all(self, request: HttpRequest) -> list[tuple[ResponseHead, bytes]]:
        """Answers of all replicas that answer."""
        asked = self._replicas.broadcast("fetch", request)
        answers = await asked.results_async(timeout_s=_BROADCAST_TIMEOUT, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _response_of(path: str, request: HttpRequest) -> str | None:
    """The id of the stored response that a request is about."""
    named = _RESPONSE_PATH.fullmatch(path)
    if named:
        return named[1]
    if path != "/v1/responses":
        return None
    try:
        previous = json.loads(request.body).get("previous_response_id")
    except (ValueError, AttributeError, RecursionError):
        # The server says what is wrong with it.
        return None
    return previous if isinstance(previous, str) else None


def _with_headers(response: Response, headers: Headers) -> Response:
    for name, value in headers:
        # Names may come several times.
        response.headers.append(name, value)
    return response


def _error(path: str, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the shape of the endpoint's API."""
    body = json.dumps(_error_body(path, kind, message))
    return Response(body, status, headers, media_type="application/json")


def _error_body(path: str, kind: str, message: str) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        anthropic = {"server_error": "overloaded_error"}.get(kind, kind)
        return {"type": "error", "error": {"type": anthropic, "message": message}}
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _error_event(path: str, message: str) -> bytes:
    """The last event of a stream that breaks off, after whatever piece of an event came last."""
    if path == "/v1/responses":
        body = {"type": "error", "message": message, "code": "server_error", "param": None}
    else:
        body = _error_body(path, "server_error", message)
    name = "event: error\n" if path in ("/v1/responses", "/v1/messages") else ""
    return f"\n\n{name}data: {json.dumps(body)}\n\n".encode()
