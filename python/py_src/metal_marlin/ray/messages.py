"""What a gateway and a replica tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Names and values, in their order.
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HttpRequest:
    """A request to the API, and what decides where it goes."""

    method: str
    #: With the query.
    path: str
    headers: Headers
    body: bytes
    #: Of the prompt; see :func:`metal_marlin.ray.prompts.prefix_blocks`.
    prefix: tuple[int, ...] = ()
    #: The replica that must have it, if one must.
    owner: str | None = None
    #: Replicas that have failed at it.
    failed: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class ResponseHead:
    """What comes before the body of an answer."""

    status: int
    headers: Headers
    #: Who answers.
    replica: str

    @property
    def is_stream(self) -> bool:
        """Whether the body comes as events, one after the other."""
        return any(name.lower() == "content-type" and value.startswith("text/event-stream") for name, value in self.headers)


class ReplicaLost(RuntimeError):
    """A replica's server broke off."""

    def __init__(self, replica: str, reason: str) -> None:
        """Says which replica's, and how."""
        super().__init__(replica, reason)
        self.replica = replica
        self.reason = reason

    def __str__(self) -> str:
        """Both in a line."""
        return f"replica {self.replica}: {self.reason}"
