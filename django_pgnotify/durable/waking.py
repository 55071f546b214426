"""Tells running consumers to look again, from any process."""

from __future__ import annotations

from django.db import connections

from ..conf import conf
from ..wire import wire_channel

_CHANNEL = "pgnotify.consumers"


def waking_channel() -> str:
    """The wire channel on which an operator's change is announced."""
    return wire_channel(_CHANNEL, conf.CHANNEL_PREFIX)


def wake_consumers(using: str) -> None:
    """Have every consumer of alias ``using`` look at once, after the commit."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [waking_channel()])
