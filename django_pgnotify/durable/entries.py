"""An event of the log on its way to a receiver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..decoding import event_from
from ..events import Event
from ..exceptions import FrameError
from ..listening.intake import resolve_row
from ..strict_json import loads
from .cursor import Logged
from .log import storable

BYTES_AT_ONCE = 4 * 1024 * 1024
"""Bytes of JSON, about, that are decoded before they are handled."""


class Entry(NamedTuple):
    """A row of the log, with the event that it stands for, or what is wrong with it."""

    logged: Logged
    body: str
    event: Event | None
    problem: str = ""

    @property
    def key(self) -> str | None:
        """Its key as it is stored, and compared with stored ones."""
        return None if self.event is None else storable(self.event.key)


def prepare(logged: Logged, body: str | None, using: str) -> Entry:
    """Decode a row of the log; never raises."""
    if body is None:
        return Entry(logged, "", None, "its row was removed from the log")
    try:
        event = event_from(
            loads(body),
            topic=logged.topic,
            source=logged.source,
            received_at=logged.created_at,
            using=using,
            resolve=resolve_row,
        )
    except (FrameError, ValueError) as exc:
        return Entry(logged, body, None, str(exc))
    return Entry(logged, body, event)


def prepare_some(
    ahead: deque[Logged], body: Callable[[Logged], str | None], using: str
) -> list[Entry]:
    """Decode and remove the first of the rows ahead, as many as may be in memory whole."""
    entries: list[Entry] = []
    size = 0
    while ahead and size < BYTES_AT_ONCE:
        logged = ahead.popleft()
        text = body(logged)
        entries.append(prepare(logged, text, using))
        size += len(text or "")
    return entries
