"""Calls a durable consumer's receiver: sync or async, one by one or several keys at once.

What was begun is finished before a call returns, so what has been handled is always a beginning
of what was given: the cursor needs no more than one position.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

from asgiref.sync import sync_to_async
from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from ..events import Event
from ..registry import Receiver, Subscription, accepts
from .log import storable
from .losses import close_lost, is_loss

logger = logging.getLogger("django_pgnotify.durable")

Outcome = Literal["done", "behind"] | BaseException
"""Of one event: handled; not tried, since one before it of the same key waits; or its failure."""

EVENTS_AHEAD = 8
"""Events per worker that are begun together: all of them are finished, even when stopping."""


@dataclass
class Limits:
    """When to come back with what has been done so far.

    Attributes:
        ends: value of ``time.monotonic()`` after which nothing more is begun.
        stopping: tells the same, at any time.
    """

    ends: float
    stopping: Callable[[], bool]

    @property
    def reached(self) -> bool:
        return time.monotonic() >= self.ends or self.stopping()


class Calls:
    """The calls of one receiver. Close it when the consumer ends.

    Args:
        receiver: what is called.
        subscriptions: the streams it reads: events of other models on its topics are not for it.
        loop: where async receivers run.
    """

    def __init__(
        self,
        receiver: Receiver,
        subscriptions: Sequence[Subscription],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._receiver = receiver
        self._is_async = receiver.is_async  # which is looked up in the function each time
        self._subscriptions = frozenset((one.topic, one.model) for one in subscriptions)
        self._loop = loop
        self._connections: set[BaseDatabaseWrapper] = set()
        self._several = receiver.concurrency > 1
        self._threads: ThreadPoolExecutor | None = None
        if self._several and not self._is_async:
            self._threads = ThreadPoolExecutor(
                receiver.concurrency, thread_name_prefix=f"pgnotify-{receiver.uid}"
            )

    def wants(self, event: Event) -> bool:
        """Whether an event of the consumer's topics is for its receiver."""
        streams = self._subscriptions
        heard = (event.topic, None) in streams or (event.topic, event.model) in streams
        return heard and accepts(self._receiver, event)

    def run(self, events: Sequence[Event], blocked: set[str], limits: Limits) -> list[Outcome]:
        """Call the receiver with events in order; returns the outcomes of the first ones.

        Args:
            blocked: keys whose events must wait; a key joins them when one of its events fails
                and is to be tried again.
        """
        if self._several:
            events = events[: self._receiver.concurrency * EVENTS_AHEAD]
        if self._is_async:
            run = self._run_async(events, blocked, limits)
            return cast("list[Outcome]", self._on_loop(run))
        if self._threads is not None:
            return self._in_threads(self._threads, events, blocked)
        close_lost()  # by an error that the receiver has kept to itself
        outcomes: list[Outcome] = []
        for event in events:
            outcomes.append(self._call(event, blocked))
            if limits.reached or isinstance(outcomes[-1], DatabaseError | InterfaceError):
                break  # of the latter: if the database is away, what follows would fail too
        return outcomes

    def call(self, event: Event) -> None:
        """Call it with one event, in this thread or on the loop; what it raises is raised."""
        if self._is_async:
            self._on_loop(self._await(event))
        else:
            # A fresh context: nothing of one call is seen by the next.
            contextvars.Context().run(self._receiver.func, event)

    def handle(self, event: Event) -> None:
        """The same, and once more, at once, where a connection has been lost.

        Not for use in a transaction, which would keep a part of the first call.
        """
        if self._is_async:
            self._on_loop(self._handle_async(event))
            return
        try:
            contextvars.Context().run(self._receiver.func, event)
        except Exception as exc:
            close_lost()
            if not is_loss(exc):
                raise
            self._note_loss(event, exc)
        else:
            return
        contextvars.Context().run(self._receiver.func, event)

    def close(self) -> None:
        """Let go of the threads and of their connections."""
        if self._threads is not None:
            self._threads.shutdown()
            for connection in self._connections:
                connection.inc_thread_sharing()
                connection.close()

    # -- one event --------------------------------------------------------------------------

    def _call(self, event: Event, blocked: set[str]) -> Outcome:
        if blocked and storable(event.key) in blocked:
            return "behind"
        if not self.wants(event):
            return "done"
        try:
            self.handle(event)
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a receiver is its failure
            return self._note(event, exc, blocked)
        return "done"

    async def _call_async(self, event: Event, blocked: set[str]) -> Outcome:
        if blocked and storable(event.key) in blocked:
            return "behind"
        if not self.wants(event):
            return "done"
        try:
            await self._handle_async(event)
        except (Exception, SystemExit, asyncio.CancelledError) as exc:  # noqa: BLE001 - as above
            return self._note(event, exc, blocked)
        return "done"

    async def _await(self, event: Event) -> None:
        try:
            async with asyncio.timeout(self._receiver.timeout) as limit:
                await self._receiver.func(event)
        except TimeoutError as exc:
            if limit.expired():
                exc.args = (self._receiver.timed_out,)
            raise

    async def _handle_async(self, event: Event) -> None:
        try:
            await self._await(event)
        except Exception as exc:
            if not is_loss(exc):
                raise
            # There it has its connections, if it has any, and shares them with others.
            await sync_to_async(close_lost)()
            self._note_loss(event, exc)
        else:
            return
        await self._await(event)

    def _note_loss(self, event: Event, exc: BaseException) -> None:
        logger.info(
            "Consumer %s lost a connection on event %s, and handles it again: %s",
            self._receiver.uid,
            event.id,
            (str(exc).strip().splitlines() or [type(exc).__name__])[0],
        )

    def _note(self, event: Event, exc: BaseException, blocked: set[str]) -> BaseException:
        key = storable(event.key)
        if self._receiver.retries > 0 and key is not None:
            blocked.add(key)
        return exc

    # -- several at once ----------------------------------------------------------------------

    def _in_threads(
        self, threads: ThreadPoolExecutor, events: Sequence[Event], blocked: set[str]
    ) -> list[Outcome]:
        outcomes: list[Outcome] = ["done"] * len(events)

        def run_group(places: list[int]) -> None:
            close_lost()
            try:
                for place in places:
                    outcomes[place] = self._call(events[place], blocked)
            finally:
                self._connections.update(connections.all(initialized_only=True))

        for future in [threads.submit(run_group, group) for group in by_key(events)]:
            future.result()
        return outcomes

    async def _run_async(
        self, events: Sequence[Event], blocked: set[str], limits: Limits
    ) -> list[Outcome]:
        if not self._several:
            in_order: list[Outcome] = []
            for event in events:
                in_order.append(await self._call_async(event, blocked))
                if limits.reached or isinstance(in_order[-1], DatabaseError | InterfaceError):
                    break
                await asyncio.sleep(0)  # the loop has others to serve
            return in_order
        outcomes: list[Outcome] = ["done"] * len(events)
        slots = asyncio.Semaphore(self._receiver.concurrency)

        async def run_group(places: list[int]) -> None:
            for place in places:
                async with slots:
                    outcomes[place] = await self._call_async(events[place], blocked)

        await asyncio.gather(*map(run_group, by_key(events)))
        return outcomes

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def by_key(events: Sequence[Event]) -> list[list[int]]:
    """Places of events that must be handled one after the other, in the order of the first."""
    groups: dict[object, list[int]] = {}
    for place, event in enumerate(events):
        groups.setdefault(place if event.key is None else event.key, []).append(place)
    return list(groups.values())
