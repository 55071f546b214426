"""``InMemoryBus``: the whole way from ``publish()`` to receivers, without PostgreSQL's NOTIFY."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from asgiref.sync import async_to_sync
from django.db import connections

from .. import signals
from ..decoding import event_from, foreign_event, gap_event
from ..dispatching.service import routes_of
from ..events import Event, check_topic
from ..listening.intake import resolve_row
from ..publishing.buffer import pending
from ..publishing.sender import transport_in_use
from ..registry import Receiver, accepts, registry
from ..wire import Outgoing, decode_frame
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
        raise_errors: let the first exception of a receiver through to the test (default), from
            :meth:`deliver` or the end of the block; otherwise it is logged and sent to
            ``receiver_failed``, as a listener does.
    """

    keeps_log = False
    """Durable events need no log here: they are delivered as all others are."""

    def __init__(self, *, raise_errors: bool = True) -> None:
        self.events: list[Event] = []
        self._raise_errors = raise_errors
        self._delivered: set[str] = set()
        self._error: Exception | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for connection in connections.all(initialized_only=True):
            self._delivered |= {event.body for _, event in pending(connection)}
        self._stack.enter_context(transport_in_use(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        # forward() has sent through the channel layer, whose connections would keep a test
        # database from being dropped.
        if loops := sys.modules.get("django_pgnotify.layers.loops"):
            loops.stop_all()
        if exc is None:
            self._raise_error()

    def send(self, events: Sequence[Outgoing], using: str) -> None:
        """The transport's side: called by ``publish()`` and by the commit buffer."""
        for outgoing in events:
            if outgoing.body not in self._delivered:
                self._delivered.add(outgoing.body)
                self._dispatch(to_event(outgoing))

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def deliver(self) -> int:
        """Deliver what waits for the commit of this thread's transactions; returns how many."""
        before = len(self.events)
        for connection in connections.all(initialized_only=True):
            for using, event in pending(connection):
                self.send([event], using)
        self._raise_error()
        return len(self.events) - before

    def notify(self, topic: str, payload: Any = "") -> None:
        """As if another program had sent ``NOTIFY topic, 'payload'``; other values go as JSON.

        Raises:
            FrameError: the payload begins as a frame of ours and is none.
        """
        text = payload if isinstance(payload, str) else json.dumps(payload)
        frame = decode_frame(text)
        source, now = frame.source or "backend:0", datetime.now(UTC)
        check_topic(topic)
        for value in frame.events:
            if frame.foreign:
                event = foreign_event(value, topic=topic, source=source, received_at=now)
            else:
                event = event_from(
                    value, topic=topic, source=source, received_at=now, resolve=resolve_row
                )
            self._dispatch(event)
        self._raise_error()

    def gap(self, cause: str = "a test says so", topics: Iterable[str] | None = None) -> None:
        """As if frames might have been missed: receivers with ``on_gap`` are told."""
        now = datetime.now(UTC)
        for route in routes_of(registry, topics):
            if route.receiver.on_gap:
                for topic in dict.fromkeys(s.topic for s in route.subscriptions):
                    event = gap_event(topic, since=None, until=now, cause=cause)
                    self._call(route.receiver, event)
        self._raise_error()

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
            _run(receiver, event)
        except Exception as exc:
            if self._raise_errors:
                # Raised from here, it would keep the event from other receivers, and the commit
                # buffer would log it and go on.
                self._error = self._error or exc
                return
            logger.exception("Receiver %s failed on event %s", receiver.uid, event.id)
            signals.receiver_failed.send_robust(
                receiver.func, event=event, exception=exc, attempt=1, will_retry=False
            )


def _run(receiver: Receiver, event: Event) -> None:
    """Run a receiver to its end, in a thread of its own where this one has a running loop."""
    func = async_to_sync(receiver.func) if receiver.is_async else receiver.func
    if asyncio._get_running_loop() is None:
        func(event)
        return
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(func, event).result()
        finally:
            thread.submit(connections.close_all).result()
