"""What prompts begin with, in a form that can be compared without keeping them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

#: Bytes of a prompt that are told apart as one: about as many as half of a server's cache block of 32 tokens stands for.
BLOCK_BYTES = 64
#: Longer prompts are the same if they begin alike for so long: 128 KiB.
MAX_BLOCKS = 2048

#: Where the parts of a prompt are in a request, in the order in which chat templates write them.
_PARTS = ("tools", "system", "instructions", "prompt", "messages", "input")
#: Endpoints that use the prefix cache.
_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


def prefix_blocks(path: str, body: bytes) -> tuple[int, ...]:
    """Numbers that stand for ever longer beginnings of a request's prompt.

    Two prompts have as many first numbers in common as they have blocks of :data:`BLOCK_BYTES` in common before their first
    difference. The last number stands for the whole prompt. Prompts for different models, or with different salts, have none
    in common.

    Args:
        path: Path of the request, without the query.
        body: What may be a JSON object of one of OpenAI's or Anthropic's endpoints.

    Returns:
        At most :data:`MAX_BLOCKS` numbers; none if the request has no prompt, or one that is no JSON.
    """
    if path not in _PATHS:
        return ()
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(request, dict):
        return ()
    digest = hashlib.blake2b(repr((request.get("model"), request.get("cache_salt"))).encode(), digest_size=8)
    text = b"".join(_pieces(request))
    blocks = []
    for start in range(0, min(len(text), MAX_BLOCKS * BLOCK_BYTES), BLOCK_BYTES):
        digest.update(text[start : start + BLOCK_BYTES])
        blocks.append(int.from_bytes(digest.copy().digest(), "little"))
    return tuple(blocks)


def _pieces(request: dict[str, Any]) -> Iterator[bytes]:
    """A request's prompt in pieces, such that a conversation's are the first ones of the same conversation when it is longer."""
    for part in _PARTS:
        value = request.get(part)
        if value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            yield (item if isinstance(item, str) else json.dumps(item, sort_keys=True)).encode(errors="replace") + b"\0"
