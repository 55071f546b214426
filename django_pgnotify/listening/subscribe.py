"""``subscribe()``: events in the process that asks for them, as an iterator."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Self

from ..conf import conf
from ..decoding import gap_event
from ..events import Event
from ..exceptions import InvalidArgument, ListenError
from ..publishing.sender import check_alias
from ..registry import Source, check_sources, registry
from ..stats import Stats
from .background import Subscription, background_listener, established, wait_until_established
from .intake import Intake


def subscribe(
    source: Source | Iterable[Source], *, using: str | None = None, max_waiting: int = 10_000
) -> EventStream:
    """Hear the events of a source in this process, whatever ``pglisten`` does.

    ::

        async with subscribe(Order) as events:     # or: with subscribe(Order) as events:
            async for event in events: ...         #         for event in events: ...

    All subscriptions of a process share one background connection. Entering the block returns
    once every later event will arrive. Where some may have been missed (the connection was lost,
    or more than ``max_waiting`` waited here) an event with ``action="gap"`` comes in their place.

    Args:
        source: a model class, a topic, or a list of them.
        using: database alias; default ``PGNOTIFY_LISTEN_DATABASE`` or ``PGNOTIFY_DATABASE``.
        max_waiting: events that may wait to be taken; further ones are dropped into a gap.

    Raises:
        InvalidTopic, InvalidArgument: bad arguments.
        UnsupportedDatabase: ``using`` is not a PostgreSQL alias.
        ListenError: (on entering) not established within ``PGNOTIFY_CONNECT_TIMEOUT``.
    """
    if not isinstance(max_waiting, int) or isinstance(max_waiting, bool) or max_waiting < 1:
        raise InvalidArgument(
            f"max_waiting= takes a whole number of at least 1; got {max_waiting!r}."
        )
    alias = check_alias(conf.listen_database if using is None else using)
    return EventStream(check_sources(source), alias, max_waiting)


class EventStream:
    """The events of a subscription, to be iterated over by one consumer, sync or async."""

    def __init__(self, sources: tuple[Source, ...], using: str, max_waiting: int) -> None:
        self.stats = Stats()
        self._using = using
        self._max_waiting = max_waiting
        self._heard = {registry.subscription(source) for source in sources}
        self._topics = sorted({heard.topic for heard in self._heard})
        self._subscriptions: list[Subscription] = []
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._dropped: tuple[datetime, datetime] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pid = os.getpid()
        self._started = False
        self._ended = False
        self._closed = False

    def close(self) -> None:
        """End the subscription; whoever iterates gets what waits, and then the end."""
        if self._pid != os.getpid():
            self._closed = True  # the parent's: its locks and its connection are not ours to use
            return
        with self._changed:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, []
            self._wake()
        for subscription in subscriptions:
            subscription.close()

    # -- sync -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._start()
        try:
            wait_until_established(self._subscriptions, conf.CONNECT_TIMEOUT)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        if not self._started:
            with self:
                yield from self
            return
        while (event := self.get()) is not None:
            yield event

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None once closed, or when ``timeout`` seconds have passed without one.

        Raises:
            ListenError: the listener of this process has ended, or is another process's.
        """
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._ready() or self._closed, timeout)
            return self._take()

    # -- async ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._start()
        try:
            await established(self._subscriptions, conf.CONNECT_TIMEOUT)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        if not self._started:
            async with self:
                while (heard := await self.aget()) is not None:
                    yield heard
            return
        while (event := await self.aget()) is not None:
            yield event

    async def aget(self) -> Event | None:
        """As :meth:`get`, from async code and without a timeout."""
        self._check_process()
        while True:
            with self._changed:
                if self._ready() or self._closed:
                    return self._take()
                self._waiter = waiter = asyncio.get_running_loop().create_future()
            await waiter

    # -- the listener's thread ----------------------------------------------------------------

    def _start(self) -> None:
        if self._started:
            raise InvalidArgument("This subscription was used before; call subscribe() again.")
        self._started = True
        intake = Intake(self._topics, conf.rows_database(self._using), self, self.stats)

        def on_gap(since: datetime | None, until: datetime, cause: str) -> None:
            intake.gap(since, until, cause, for_leader=False)

        listener = background_listener(self._using)
        for number, channel in enumerate(sorted(intake.channels)):
            # One of them tells of gaps: the connection is the same for all.
            self._subscriptions.append(
                listener.subscribe(
                    channel,
                    intake.notified,
                    on_gap if number == 0 else None,
                    self._listener_ended,
                )
            )

    def _listener_ended(self) -> None:
        with self._changed:
            self._ended = True
            self._wake()

    def _check_process(self) -> None:
        if not self._started:
            raise InvalidArgument("Enter the subscription first: with subscribe(...) as events.")
        if self._pid != os.getpid():
            raise ListenError(
                f"This subscription belongs to process {self._pid}; a forked child calls "
                f"subscribe() itself."
            )

    def dispatch(self, events: Sequence[Event], size: int) -> None:
        with self._changed:
            for event in events:
                if not any(
                    heard.topic == event.topic and heard.model in (None, event.model)
                    for heard in self._heard
                ):
                    continue
                if self._dropped is None and len(self._events) < self._max_waiting:
                    self._events.append(event)
                else:
                    at = event.published_at
                    since, until = self._dropped or (at, at)
                    self._dropped = (min(since, at), max(until, at))
                    self.stats.add("dropped")
            self._wake()

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        with self._changed:
            for topic in self._topics:
                self._events.append(
                    gap_event(topic, since=since, until=until, cause=cause, using=self._using)
                )
            self._wake()

    def led(self, leader: bool) -> None:
        """Never: the background listener does not compete."""

    # -- with the lock held ---------------------------------------------------------------------

    def _ready(self) -> bool:
        return bool(self._events) or self._dropped is not None or self._ended

    def _take(self) -> Event | None:
        if not self._events and self._dropped is not None:
            (since, until), self._dropped = self._dropped, None
            cause = "the subscriber did not keep up"
            self._events.extend(
                gap_event(topic, since=since, until=until, cause=cause, using=self._using)
                for topic in self._topics
            )
        if not self._events and self._ended and not self._closed:
            raise ListenError("The listener of this process has ended; call subscribe() again.")
        return self._events.popleft() if self._events else None

    def _wake(self) -> None:
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(RuntimeError):  # its loop has been closed
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
