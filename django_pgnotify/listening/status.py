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
    """A status as NOTIFY payload; of too many topics only the first ones are named."""
    text = json.dumps(status)
    while byte_length(text) > PAYLOAD_LIMIT and status["topics"]:
        status = status | {"topics": status["topics"][: len(status["topics"]) // 2]}
        text = json.dumps(status)
    return text
