"""One subscription for all the streams of a view: what it hears is handed to each of them.

Live topics are heard through ``subscribe()``, on the one listening connection of the process.
Of durable topics that only says when to look into the event log (see ``tail``). The first stream
starts it, the last one ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar, cast

from ..conf import conf
from ..durable.cursor import Cursor
from ..events import Event
from ..exceptions import ListenError
from ..listening.subscribe import subscribe
from ..registry import Receiver, Source, registry
from ..stats import Stats
from .position import Position, Positions
from .tail import Found, LogTail

logger = logging.getLogger("django_pgnotify.streams")

T = TypeVar("T")

stream_stats = Stats()
"""What the streams of this process have done."""


class CannotBeShown(Exception):
    """A function of the view failed on an event, which has been logged."""


class Item:
    """An event on its way to the streams of a view, with what they have in common of it."""

    __slots__ = ("_epoch", "_id", "_made", "cursor", "event")

    def __init__(self, event: Event, cursor: Cursor | None = None, epoch: str = "") -> None:
        self.event = event
        self.cursor = cursor
        """Where a reader of the log is when he has got it."""
        self._epoch = epoch
        self._id: str | None = None
        self._made: dict[str, Any] = {}

    def id(self, positions: Positions) -> str | None:
        """Its ``id:``, None for a live event."""
        if self.cursor is not None and self._id is None:
            self._id = positions.now(self._epoch, self.cursor)
        return self._id

    def once(self, make: Callable[[Item], T]) -> T:
        """What ``make``, a method of the first stream that asks, returns; the same for all others.

        Raises:
            CannotBeShown: it raised.
        """
        name = make.__name__
        if name not in self._made:
            try:
                self._made[name] = make(self)
            except Exception:
                logger.exception(
                    "Event %s on topic %r cannot be shown", self.event.id, self.event.topic
                )
                self._made[name] = CannotBeShown
        found = self._made[name]
        if found is CannotBeShown:
            raise CannotBeShown
        return cast("T", found)


class Queue:
    """What waits for one stream; of its hub's event loop.

    Args:
        limit: items that may wait. When there are more it is ``full``, and is given nothing else.
    """

    def __init__(self, limit: int) -> None:
        self.full = False
        self.ended = False
        self.left = False
        """Whether its stream has gone."""
        self.full_since = 0.0
        self._limit = limit
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, items: Sequence[Item]) -> None:
        room = self._limit - len(self._items)
        self._items.extend(items[:room])
        if len(items) > room:
            self.full, self.full_since = True, time.time()
            stream_stats.add("dropped", len(items) - room)
        self._wake()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._wake()

    def renew(self) -> None:
        """Take items again."""
        self.full = False

    @property
    def has_something(self) -> bool:
        """Whether there is something to take, or to be known."""
        return bool(self._items) or self.full or self.ended

    async def wait(self, seconds: float) -> None:
        """Return once there is something to do, or when ``seconds`` have passed."""
        if self.has_something:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._waiter
        except TimeoutError:
            return
        finally:
            self._waiter = None

    def take(self, most: int) -> list[Item]:
        """Up to ``most`` of those that wait."""
        return [self._items.popleft() for _ in range(min(most, len(self._items)))]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Hub:
    """See the module.

    Args:
        sources: models and topics, checked.
        durable: as of ``receiver()``: which of them are read from the log.
        using: alias that is listened on.
    """

    def __init__(self, sources: tuple[Source, ...], durable: bool | None, using: str) -> None:
        self._sources = sources
        self._using = using
        self._streams = {registry.subscription(source) for source in sources}
        as_receiver = Receiver("stream", lambda event: None, sources, durable=durable)
        self.durable_topics = registry.durable_topics(as_receiver, conf.DELIVERY)
        topics = {stream.topic for stream in self._streams}
        self.live_topics = tuple(sorted(topics.difference(self.durable_topics)))
        self.positions = Positions(topics)
        self._tail: LogTail | None = None
        self._queues: set[Queue] = set()
        self._users = 0
        self._task: asyncio.Task[None] | None = None
        self._established: asyncio.Future[None] | None = None

    # -- the streams --------------------------------------------------------------------------

    async def enter(self) -> None:
        """Return once every later event will be heard; :meth:`leave` has to follow.

        Raises:
            ListenError: that is not so within ``PGNOTIFY_CONNECT_TIMEOUT``.
            django.db.Error: the event log could not be read.
        """
        self._users += 1
        try:
            if self._established is None:
                self._established = asyncio.get_running_loop().create_future()
                self._established.add_done_callback(_look_at)
                self._task = asyncio.create_task(
                    self._run(self._established), name="pgnotify-streams"
                )
            # Shielded, because it is everybody's.
            await asyncio.shield(self._established)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Nobody needs it any more on behalf of one :meth:`enter`."""
        self._users -= 1
        if not self._users:
            task, self._task, self._established = self._task, None, None
            if task is not None:
                task.cancel()

    def join(self, queue: Queue) -> None:
        """Put what comes from now on into ``queue``, until it is full."""
        if queue.left:
            return
        queue.renew()
        self._queues.add(queue)
        if self._established is None:
            queue.end()

    def part(self, queue: Queue) -> None:
        """Put nothing into ``queue`` any more."""
        queue.left = True
        self._queues.discard(queue)

    @property
    def epoch(self) -> str:
        """Which server's log it reads now."""
        return "" if self._tail is None else self._tail.epoch

    @property
    def cursor(self) -> Cursor | None:
        """Where somebody is who joins now; None without durable topics."""
        return None if self._tail is None else self._tail.cursor

    def refuses(self, position: Position) -> str | None:
        """Why the log cannot be read on from ``position``; None if it can."""
        if position.cursor is None or position.epoch != self.epoch:
            return "the server is another one, or was restored or promoted"
        limit = min(conf.LOG_RETENTION, conf.LOG_LIMIT or conf.LOG_RETENTION)
        if time.time() - position.at > limit:
            return "the events were older than the event log keeps them"
        return None

    async def missed(
        self, cursor: Cursor, queue: Queue
    ) -> AsyncIterator[tuple[list[Item], Cursor]]:
        """What the log has between ``cursor`` and where ``queue`` goes on; see ``LogTail.missed``.

        Raises:
            ListenError: the hub has ended meanwhile.
        """
        tail = self._tail
        if tail is None:
            raise ListenError("The streams of this process have ended.")
        async for found, end in tail.missed(cursor, lambda: self.join(queue)):
            yield [Item(*one, tail.epoch) for one in self._wanted(found)], end

    # -- the task -----------------------------------------------------------------------------

    async def _run(self, established: asyncio.Future[None]) -> None:
        following: asyncio.Task[None] | None = None
        tail = None
        try:
            async with subscribe(self._sources, using=self._using) as events:
                if self.durable_topics:
                    rows = conf.rows_database(self._using)
                    tail = LogTail(self.durable_topics, rows, self._logged)
                    await tail.start()
                    self._tail = tail
                    following = asyncio.create_task(tail.follow(), name="pgnotify-stream-tail")
                    following.add_done_callback(_look_at)
                    following.add_done_callback(lambda task: events.close())
                established.set_result(None)
                handled = 0
                while (event := await events.aget()) is not None:
                    self._heard(event)
                    handled += 1
                    if handled % 100 == 0:
                        await asyncio.sleep(0)  # there may be more than enough
                if following is not None:
                    following.result()
        except Exception as exc:
            if established.done():
                logger.exception("The streams of %s ended", ", ".join(self._topics))
            else:
                established.set_exception(exc)
        finally:
            if following is not None:
                following.cancel()
            if tail is not None:
                tail.close()
            if self._tail is tail:
                self._tail = None
            if self._established is established:  # and not that of a successor
                self._task, self._established = None, None
                for queue in self._queues:
                    queue.end()
                self._queues = set()

    @property
    def _topics(self) -> tuple[str, ...]:
        return (*self.live_topics, *self.durable_topics)

    def _heard(self, event: Event) -> None:
        if event.topic in self.durable_topics:
            # Itself it comes from the log; and a gap is none where the log has what was missed,
            # which it has not where the server is another one.
            if self._tail is not None and event.action == "gap":
                self._tail.doubt()
            elif self._tail is not None:
                self._tail.wake()
        else:
            self._hand_on([Item(event)])

    def _logged(self, found: list[Found]) -> None:
        self._hand_on([Item(*one, self.epoch) for one in self._wanted(found)])

    def _wanted(self, found: Sequence[Found]) -> list[Found]:
        return [
            (event, cursor)
            for event, cursor in found
            if any(
                stream.topic == event.topic and stream.model in (None, event.model)
                for stream in self._streams
            )
        ]

    def _hand_on(self, items: list[Item]) -> None:
        full = []
        for queue in self._queues:
            queue.put(items)
            if queue.full:
                full.append(queue)
        self._queues.difference_update(full)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Nobody may be left to look at its exception, which is no reason to complain."""
    if not future.cancelled():
        future.exception()
