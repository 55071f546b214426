"""``capture_events()``: what a piece of code publishes, without a listener."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import overload

from django.db import connections

from ..conf import conf
from ..decoding import event_from
from ..events import Event
from ..listening.intake import resolve_row
from ..publishing.buffer import pending
from ..publishing.sender import Transport, current_transport, transport_in_use
from ..wire import Outgoing


def to_event(outgoing: Outgoing) -> Event:
    """The event that a listener would make of ``outgoing``."""
    return event_from(
        json.loads(outgoing.body),
        topic=outgoing.topic,
        source=conf.source,
        received_at=datetime.now(UTC),
        resolve=resolve_row,
    )


class CapturedEvents(Sequence[Event]):
    """The events captured so far, in the order they were published.

    Those of an open transaction count as long as it, and the savepoint they were published in,
    have not been rolled back: that is how a TestCase, which never commits, can see them.
    """

    def __init__(self) -> None:
        self._sent: list[Outgoing] = []
        self._atomic: list[_Atomic] = []
        self._before = {event.body for event in self._pending()}
        self._final: list[Event] | None = None

    @staticmethod
    def _pending() -> list[Outgoing]:
        open_connections = connections.all(initialized_only=True)
        return [event for connection in open_connections for _, event in pending(connection)]

    def record(self, events: Sequence[Outgoing], using: str) -> None:
        if connections[using].in_atomic_block:
            self._atomic.append(_Atomic(events, using))
        else:
            self._sent += events

    def finish(self) -> None:
        self._final = self._events()

    def _events(self) -> list[Event]:
        if self._final is not None:
            return self._final
        # Bodies carry the id, so an event that was pending and has been sent counts once.
        atomic = [event for sent in self._atomic if sent.stands for event in sent.events]
        found = {event.body: event for event in [*self._sent, *atomic, *self._pending()]}
        events = [to_event(event) for body, event in found.items() if body not in self._before]
        return sorted(events, key=lambda event: int(event.id.rpartition("-")[2], 16))

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        return self._events()[index]

    def __len__(self) -> int:
        return len(self._events())

    def __repr__(self) -> str:
        return f"CapturedEvents({self._events()!r})"


class _Atomic:
    """Events sent inside a transaction: PostgreSQL forgets them if their savepoint rolls back."""

    def __init__(self, events: Sequence[Outgoing], using: str) -> None:
        self.events = list(events)
        self._connection = connections[using]
        self._committed = False
        self._connection.on_commit(self.commit, robust=True)

    def commit(self) -> None:
        self._committed = True

    @property
    def stands(self) -> bool:
        return self._committed or any(
            hook[1] == self.commit for hook in self._connection.run_on_commit
        )


class _Recorder:
    def __init__(self, captured: CapturedEvents, transport: Transport) -> None:
        self._captured = captured
        self._transport = transport
        self.keeps_log = getattr(transport, "keeps_log", True)

    def send(self, events: Sequence[Outgoing], using: str) -> None:
        self._transport.send(events, using)
        self._captured.record(events, using)


@contextmanager
def capture_events() -> Iterator[CapturedEvents]:
    """Collect the events published in the block, as a sequence of :class:`Event`.

    Works in a TestCase, with its transaction never committed: events of savepoints that rolled
    back are not there, all others are. What would be sent is sent. Events that wait for the
    commit of another thread's transaction are seen once it commits.
    """
    captured = CapturedEvents()
    with transport_in_use(_Recorder(captured, current_transport())):
        try:
            yield captured
        finally:
            captured.finish()
