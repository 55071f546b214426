"""The dispatcher: routes batches of events to the lanes of the receivers that asked for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from ..decoding import gap_event
from ..events import Action, Event
from ..registry import Receiver, Subscription
from ..stats import Stats
from .lane import Lane
from .runner import Runner

logger = logging.getLogger("django_pgnotify.dispatching")


class Route(NamedTuple):
    """One receiver and the streams it hears."""

    receiver: Receiver
    subscriptions: tuple[Subscription, ...]


class _Way(NamedTuple):
    """From a topic to a lane: which of its events the lane takes."""

    lane: Lane
    models: frozenset[str] | None
    actions: frozenset[Action] | None
    every_node: bool

    def takes(self, event: Event) -> bool:
        return (self.models is None or event.model in self.models) and (
            self.actions is None or event.action in self.actions
        )


class Dispatcher:
    """Consumer of an intake: the receivers' side of a listener.

    Args:
        routes: the receivers and their streams.
        concurrency: receivers that may run at once, of all together.
        max_waiting: events that may wait for one receiver.
        max_bytes: bytes of payload that may wait for one receiver.
        stats: ``handled``, ``failed``, ``retried``, ``dropped`` are counted here.
        using: alias that gap events say they came from.
        overflowed: told of the gap (since, until, cause) of a receiver that did not keep up.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        concurrency: int,
        max_waiting: int,
        max_bytes: int,
        stats: Stats,
        using: str | None = None,
        overflowed: Callable[[datetime, datetime, str], None] | None = None,
    ) -> None:
        self._stats = stats
        self._using = using
        self._overflowed = overflowed
        self._leader = False
        self._stopping = False
        self._settling = 0
        self._idle: asyncio.Event = asyncio.Event()
        self._runner = Runner(concurrency, stats, self._worker_ended)
        self._routes = [(route, Lane(route.receiver, max_waiting, max_bytes)) for route in routes]
        self._by_topic: dict[str, list[_Way]] = {}
        for route, lane in self._routes:
            receiver = route.receiver
            for topic in dict.fromkeys(s.topic for s in route.subscriptions):
                models = {s.model for s in route.subscriptions if s.topic == topic}
                chosen = None if None in models else frozenset(filter(None, models))
                way = _Way(lane, chosen, receiver.actions, receiver.every_node)
                self._by_topic.setdefault(topic, []).append(way)
        self._overflowing: dict[Lane, datetime] = {}

    @property
    def waiting(self) -> int:
        """Events that wait in all lanes."""
        return sum(lane.waiting for _, lane in self._routes)

    @property
    def running(self) -> int:
        """Receivers that run now."""
        return sum(lane.running for _, lane in self._routes)

    # -- from the intake, on the loop ---------------------------------------------------------

    def dispatch(self, events: Sequence[Event], size: int = 0) -> None:
        """Hand each event to the lanes of its topic; a batch goes to a lane together.

        Args:
            size: bytes of payload the events came in.
        """
        if self._stopping or not events:
            return
        topics = {event.topic for event in events}
        for topic in topics - self._by_topic.keys():
            logger.info("No receiver for an event of topic %r", topic)
        if len(topics) == 1:
            (topic,) = topics
            for way in self._by_topic.get(topic, ()):
                if self._leader or way.every_node:
                    chosen = events
                    if way.models is not None or way.actions is not None:
                        chosen = [event for event in events if way.takes(event)]
                    self._put(way.lane, chosen, size * len(chosen) // len(events))
            return
        # A receiver of several topics gets them in the order in which they came.
        batches: dict[Lane, list[Event]] = {}
        for event in events:
            for way in self._by_topic.get(event.topic, ()):
                if (self._leader or way.every_node) and way.takes(event):
                    batches.setdefault(way.lane, []).append(event)
        for lane, batch in batches.items():
            self._put(lane, batch, size * len(batch) // len(events))

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        for route, lane in self._routes:
            receiver = lane.receiver
            if receiver.on_gap and receiver.every_node is not for_leader:
                for topic in dict.fromkeys(s.topic for s in route.subscriptions):
                    self._put_gap(lane, topic, since, until, cause)

    def led(self, leader: bool) -> None:
        if leader is not self._leader:
            self._leader = leader
            logger.info("This listener is %s", "the leader" if leader else "a standby")

    @property
    def leader(self) -> bool:
        return self._leader

    # -- lanes and workers --------------------------------------------------------------------

    def _put(self, lane: Lane, batch: Sequence[Event], size: int) -> None:
        # Once one event is dropped, so is all that follows, until the gap that tells of it is in.
        coalesced = lane.coalesced
        refused = batch if lane in self._overflowing else lane.put(batch, size)
        if lane.coalesced > coalesced:
            self._stats.add("coalesced", lane.coalesced - coalesced)
        if refused:
            self._overflow(lane, refused)
        self._runner.staff(lane)

    def _overflow(self, lane: Lane, refused: Sequence[Event]) -> None:
        self._stats.add("dropped", len(refused))
        # From when the first of them was published: we may have been late to read it.
        since = min(event.published_at for event in refused)
        known = self._overflowing.get(lane)
        self._overflowing[lane] = since if known is None else min(since, known)
        if known is None:
            logger.error(
                "Receiver %s does not keep up: events are dropped into a gap",
                lane.receiver.uid,
                extra={"receiver": lane.receiver.uid},
            )
        if lane.idle:
            # Its last worker went before it could know that somebody waits for it to go.
            self._end_overflow(lane)

    def _put_gap(
        self, lane: Lane, topic: str, since: datetime | None, until: datetime, cause: str
    ) -> None:
        lane.put_gap(gap_event(topic, since=since, until=until, cause=cause, using=self._using))
        self._runner.staff(lane)

    def _worker_ended(self, lane: Lane) -> None:
        """By any thread; the loop is woken only where something waits for it."""
        if (self._settling or lane in self._overflowing) and lane.idle:
            self._runner.on_loop(self._emptied, lane)

    def _emptied(self, lane: Lane) -> None:
        if not self._stopping:
            self._end_overflow(lane)
        self._idle.set()

    def _end_overflow(self, lane: Lane) -> None:
        """A lane that has emptied hears of what it missed, before anything newer."""
        since = self._overflowing.pop(lane, None)
        if since is None:
            return
        now = datetime.now(UTC)
        cause = f"receiver {lane.receiver.uid} did not keep up"
        if self._overflowed is not None:
            self._overflowed(since, now, cause)
        if lane.receiver.on_gap:
            route = next(route for route, other in self._routes if other is lane)
            for topic in dict.fromkeys(s.topic for s in route.subscriptions):
                self._put_gap(lane, topic, since, now, cause)

    # -- the end ------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait until every event handed over so far has been handled, or told of by a gap."""
        self._settling += 1
        try:
            while self._unsettled:
                self._idle.clear()
                await self._idle.wait()
        finally:
            self._settling -= 1

    @property
    def _unsettled(self) -> bool:
        # A lane that has emptied may have a gap coming, of which the loop has yet to hear.
        if self._overflowing and not self._stopping:
            return True
        return not all(lane.idle for _, lane in self._routes)

    async def drain(self, timeout: float) -> bool:
        """Finish what runs and what waits, within ``timeout`` seconds; tells whether it did."""
        self._runner.stop_retrying()
        try:
            async with asyncio.timeout(timeout):
                await self.settled()
        except TimeoutError:
            pass
        self._stopping = True
        unfinished = self.running
        for _, lane in self._routes:
            dropped = lane.clear()
            if dropped:
                self._stats.add("dropped", dropped)
                logger.error("Receiver %s: %d event(s) dropped", lane.receiver.uid, dropped)
        await self._runner.close(drained=unfinished == 0)
        return unfinished == 0
