"""Which replica answers a request: the one that has computed its prompt's beginning, unless that one has too much to do."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from metal_marlin.ray.messages import HttpRequest

#: Requests that a replica may have more than the one with the fewest and still get one whose whole prompt it knows.
DEFAULT_AFFINITY = 8.0
#: Blocks that are remembered of a replica: 4 MiB of text, about a million tokens.
DEFAULT_REMEMBERED_BLOCKS = 65_536


class PrefixMemory:
    """What replicas were given, each the most recent of it."""

    def __init__(self, capacity: int) -> None:
        """Remembers at most ``capacity`` blocks of each replica."""
        self._capacity = capacity
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def matched(self, replica: str, prefix: Sequence[int]) -> int:
        """How many of the first blocks a replica has been given."""
        known = self._blocks.get(replica, OrderedDict())
        return next((index for index, block in enumerate(prefix) if block not in known), len(prefix))

    def add(self, replica: str, prefix: Sequence[int]) -> None:
        """A replica is given a prompt."""
        known = self._blocks.setdefault(replica, OrderedDict())
        # The beginning last: it is of use without the end, and the end is not without the beginning.
        for block in reversed(prefix):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forgets all other replicas."""
        kept = set(replicas)
        self._blocks = {replica: blocks for replica, blocks in self._blocks.items() if replica in kept}


def ranking(request: HttpRequest, loads: dict[str, int], memory: PrefixMemory, affinity: float = DEFAULT_AFFINITY) -> list[str]:
    """Replicas in the order in which a request would best be answered by them.

    A replica's load counts against it, and the part of the prompt that it knows for it: all of the prompt as much as
    ``affinity`` requests. Those that come to the same are ordered by a hash of the prompt's beginning and the replica, so that
    several gateways agree on where a new prompt goes, and different prompts go to different replicas. Replicas that have failed
    at the request come last.

    Args:
        request: The request.
        loads: Requests that each of the replicas has.
        memory: What they were given.
        affinity: See above.
    """

    def cost(replica: str) -> tuple[bool, float, bytes]:
        known = memory.matched(replica, request.prefix) / len(request.prefix) if request.prefix else 0.0
        beginning = request.prefix[0] if request.prefix else hash(request.body)
        tie = hashlib.blake2b(f"{beginning} {replica}".encode(), digest_size=8).digest()
        return replica in request.failed, loads[replica] - affinity * known, tie

    if request.owner in loads:
        return [request.owner]
    return sorted(loads, key=cost)


class PrefixRouter(RequestRouter):
    """Ray's interface to :func:`ranking`. It lives in a gateway, and counts that gateway's requests."""

    def initialize_state(
        self, affinity: float = DEFAULT_AFFINITY, remembered_blocks: int = DEFAULT_REMEMBERED_BLOCKS, **_: Any
    ) -> None:
        """Called by Ray with ``request_router_kwargs``."""
        self._affinity = affinity
        self._memory = PrefixMemory(remembered_blocks)
        #: Replicas of requests that are under way, by the requests' ids.
        self._under_way: dict[str, str] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each: the first that can take another request gets it."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return [list(by_id.values())]
        # Where no replica can take it now, Ray asks again, after a pause.
        pending_request.routing_context.should_backoff = True
        request = _request_of(pending_request)
        if request is None:
            return [list(by_id.values())]
        counts = Counter(self._under_way.values())
        loads = {
            name: max(counts[name], self.replica_queue_len_cache.get(replica.replica_id) or 0) for name, replica in by_id.items()
        }
        return [[by_id[name]] for name in ranking(request, loads, self._memory, self._affinity)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken a request."""
        self._under_way[pending_request.metadata.internal_request_id] = replica_id.unique_id
        request = _request_of(pending_request)
        if request is not None:
            self._memory.add(replica_id.unique_id, request.prefix)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has ended, however it did."""
        self._under_way.pop(internal_request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have come or gone."""
        super().update_replicas(replicas)
        self._memory.keep_only(replica.replica_id.unique_id for replica in replicas)


def _request_of(pending_request: PendingRequest) -> HttpRequest | None:
    return next((value for value in pending_request.args if isinstance(value, HttpRequest)), None)
