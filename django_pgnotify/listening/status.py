"""How the roll call and the listeners that answer it understand each other."""

from __future__ import annotations

import json
from typing import Any

from ..wire import CHANNEL_LIMIT, PAYLOAD_LIMIT, byte_length

STATUS_CHANNEL = "pgnotify.status"
"""Whoever sends the name of a reply channel here gets the status of every listener there."""

REPLY_PREFIX = "pgnotify.reply."


def may_reply_on(channel: str, prefix: str) -> bool:
    """Whether ``channel`` is one for replies; anybody may NOTIFY the status channel anything."""
    return channel.startswith(prefix + REPLY_PREFIX) and byte_length(channel) <= CHANNEL_LIMIT


def status_payload(status: dict[str, Any]) -> str:
    """A status as NOTIFY payload; of too many topics, and tags of caches, some are left out."""
    text = json.dumps(status)
    while byte_length(text) > PAYLOAD_LIMIT:
        caches = status.get("caches", {})
        if any(counts.get("tags") for counts in caches.values()):
            status = status | {"caches": {name: _fewer_tags(caches[name]) for name in caches}}
        elif status["topics"]:
            status = status | {"topics": status["topics"][: len(status["topics"]) // 2]}
        elif caches:
            status = status | {"caches": {}}
        else:
            break
        text = json.dumps(status)
    return text


def _fewer_tags(counts: dict[str, Any]) -> dict[str, Any]:
    tags = list(counts.get("tags", {}).items())
    return counts | {"tags": dict(tags[: len(tags) // 2])}
