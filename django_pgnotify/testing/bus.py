"""``InMemoryBus``: the whole way from ``publish()`` to receivers, without PostgreSQL's NOTIFY."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from asgiref.sync import async_to_sync
from django.db import connections

from .. import signals
from ..dispatching.service import routes_of
from ..events import Event, check_topic
from ..publishing.buffer import pending
from ..publishing.sender import transport_in_use
from ..registry import Receiver, accepts, registry
from ..wire import Outgoing, decode_frame, foreign_event, gap_event
from .capture import to_event

logger = logging.getLogger("django_pgnotify.dispatching")


class InMemoryBus:
    """Delivers what is published straight to the registered receivers, in the calling thread.

    ::

        with InMemoryBus() as bus:
            publish("jobs", {"task_id": 1})      # its receivers have run when this returns
        assert bus.events[0].data == {"task_id": 1}

    Transactions keep their meaning: events leave with the commit. In a TestCase nothing commits;
    call :meth:`deliver` where the commit would be, or use ``captureOnCommitCallbacks``.

    Args:
        raise_errors: let the exception of a receiver through to the test (default), instead of
            logging it and sending ``receiver_failed`` as a listener does.
    """

    def __init__(self, *, raise_errors: bool = True) -> None:
        self.events: list[Event] = []
        self._raise_errors = raise_errors
        self._delivered: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(transport_in_use(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def send(self, events: Sequence[Outgoing], using: str) -> None:
        """The transport's side: called by ``publish()`` and by the commit buffer."""
        for outgoing in events:
            if outgoing.body not in self._delivered:
                self._delivered.add(outgoing.body)
                self._dispatch(to_event(outgoing))

    def deliver(self) -> int:
        """Deliver what waits for the commit of this thread's transactions; returns how many."""
        before = len(self.events)
        for connection in connections.all(initialized_only=True):
            for using, event in pending(connection):
                self.send([event], using)
        return len(self.events) - before

    def notify(self, topic: str, payload: Any = "") -> None:
        """As if another program had sent ``NOTIFY topic, 'payload'``; other values go as JSON."""
        text = payload if isinstance(payload, str) else json.dumps(payload)
        frame = decode_frame(text)
        for value in frame.events:
            event = foreign_event(
                value,
                topic=check_topic(topic),
                source="backend:0",
                received_at=datetime.now(UTC),
            )
            self._dispatch(event)

    def gap(self, cause: str = "a test says so", topics: Iterable[str] | None = None) -> None:
        """As if frames might have been missed: receivers with ``on_gap`` are told."""
        now = datetime.now(UTC)
        for route in routes_of(registry, topics):
            if route.receiver.on_gap:
                for topic in dict.fromkeys(s.topic for s in route.subscriptions):
                    event = gap_event(topic, since=None, until=now, cause=cause)
                    self._call(route.receiver, event)

    def _dispatch(self, event: Event) -> None:
        self.events.append(event)
        for route in routes_of(registry):
            heard = any(
                s.topic == event.topic and s.model in (None, event.model)
                for s in route.subscriptions
            )
            if heard and accepts(route.receiver, event):
                self._call(route.receiver, event)

    def _call(self, receiver: Receiver, event: Event) -> None:
        try:
            if receiver.is_async:
                _run_async(receiver, event)
            else:
                receiver.func(event)
        except Exception as exc:
            if self._raise_errors:
                raise
            logger.exception("Receiver %s failed on event %s", receiver.uid, event.id)
            signals.receiver_failed.send_robust(
                receiver.func, event=event, exception=exc, attempt=1, will_retry=False
            )


def _run_async(receiver: Receiver, event: Event) -> None:
    """Run an async receiver to its end, in a thread where this one has a running loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        async_to_sync(receiver.func)(event)
    else:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(async_to_sync(receiver.func), event).result()
