"""One listener with its receivers: what ``pglisten`` runs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.db import DatabaseError, close_old_connections

from .. import signals
from ..conf import conf
from ..durable.retention import LogPruner, logged_topics
from ..epochs.node import node_table
from ..epochs.use import heartbeat_interval, is_in_use
from ..events import Event
from ..listening.connection import Notification
from ..listening.feed import EpochFeed
from ..listening.intake import Consumer, Intake
from ..listening.listener import Listener
from ..registry import Registry, registry
from ..stats import Stats
from .dispatcher import Dispatcher, Route
from .durable import DurableSide

logger = logging.getLogger("django_pgnotify.dispatching")

PRUNE_INTERVAL = 60.0
PRUNE_AGAIN = 1.0
"""Seconds between two runs: the latter while there is more to remove than one run does."""


LOOK_INTERVAL = 1.0
"""Seconds between two looks whether caches have come to use the epoch table."""


def routes_of(registry: Registry, topics: Iterable[str] | None = None) -> list[Route]:
    """The registered receivers with their streams; only those on ``topics`` where given."""
    only = None if topics is None else frozenset(topics)
    routes = []
    for receiver in registry.receivers:
        subscriptions = registry.subscriptions(receiver)
        if only is not None:
            subscriptions = tuple(s for s in subscriptions if s.topic in only)
        if subscriptions:
            routes.append(Route(receiver, subscriptions))
    return routes


class _Observed:
    """A consumer that shows every batch to somebody before the dispatcher gets it."""

    def __init__(self, dispatcher: Dispatcher, observe: Callable[[Sequence[Event]], None]) -> None:
        self._observe = observe
        self._dispatcher = dispatcher
        self.gap = dispatcher.gap
        self.led = dispatcher.led

    def dispatch(self, events: Sequence[Event], size: int) -> None:
        self._observe(events)
        self._dispatcher.dispatch(events, size)


class _Fed:
    """A consumer that has the epoch table brought up to date before anybody else hears of it."""

    def __init__(self, consumer: Consumer, feed: EpochFeed, topics: frozenset[str]) -> None:
        self._consumer = consumer
        self._feed = feed
        self._topics = topics
        self.led = consumer.led

    def dispatch(self, events: Sequence[Event], size: int) -> None:
        self._feed.apply(events)
        heard = [event for event in events if event.topic in self._topics]
        if heard:
            self._consumer.dispatch(heard, size * len(heard) // len(events))

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        self._feed.gap(since, until, cause, for_leader=for_leader)
        self._consumer.gap(since, until, cause, for_leader=for_leader)


class Service:
    """A listener, its intake and its dispatcher. Make it and run it on one event loop.

    Args:
        using: database alias to listen on.
        topics: only these; default all topics that have a receiver.
        concurrency: receivers that may run at once; default ``PGNOTIFY_CONCURRENCY``.
        observe: told of every batch of events before it is dispatched.
        on_ready: called when established: at the start and after each loss.
        on_lost: called with the cause and the seconds to the next attempt.
        health_file: kept up to date with the state of this listener, as JSON.
    """

    def __init__(
        self,
        using: str,
        *,
        topics: Sequence[str] | None = None,
        concurrency: int | None = None,
        observe: Callable[[Sequence[Event]], None] | None = None,
        on_ready: Callable[[], None] | None = None,
        on_lost: Callable[[str, float], None] | None = None,
        health_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.using = using
        self.stats = Stats()
        self.routes = routes_of(registry, topics)
        heard = {s.topic: None for route in self.routes for s in route.subscriptions}
        self.topics = list(heard | dict.fromkeys(topics or ()))
        self.durable = DurableSide(
            self.routes, registry, using=using, stats=self.stats, observe=observe
        )
        self._live = self.durable.live_routes
        self.dispatcher = Dispatcher(
            self._live,
            concurrency=concurrency or conf.CONCURRENCY,
            max_waiting=conf.QUEUE_MAX_EVENTS,
            max_bytes=conf.QUEUE_MAX_BYTES,
            stats=self.stats,
            using=conf.rows_database(self.using),
            overflowed=self._overflowed,
        )
        self._compared = False
        self._pruner = LogPruner(conf.rows_database(using))
        self._established = False
        self._telling: set[asyncio.Future[Any]] = set()
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._health_file = None if health_file is None else Path(health_file)
        self._consumer: Consumer = self.dispatcher
        if observe is not None:
            self._consumer = _Observed(self.dispatcher, observe)
        self._intake = Intake(
            self.topics,
            conf.rows_database(self.using),
            self._consumer,
            self.stats,
            overflowed=self._overflowed,
        )
        self.feed: EpochFeed | None = None
        # Only who hears all that caches depend on can say that all of it was heard.
        self._may_feed = topics is None and using == conf.listen_database
        if self._may_feed and is_in_use():
            self._begin_to_feed()
        for_leader = any(not route.receiver.every_node for route in self._live)
        # Listeners of different topics must not keep each other from leading. Where their topics
        # overlap both lead: docs/explanation/leader-and-standby says not to do that.
        name = "all" if topics is None else ",".join(sorted(set(topics)))
        self._leadership = name if for_leader else None
        self.listener = Listener(
            using,
            self._channels,
            self,
            leadership=self._leadership,
            gap_on_start=conf.GAP_ON_START,
            on_proven=self._proven if self._may_feed else None,
            heartbeat_interval=None if self.feed is None else heartbeat_interval(),
        )

    @property
    def _channels(self) -> frozenset[str]:
        return self._intake.channels | self.durable.channels

    @property
    def role(self) -> str:
        """``leader``, ``standby``, or ``every node`` where no receiver needs a leader.

        Durable consumers need none: they are shared out one by one. ``shared`` is who has no
        other receivers.
        """
        if self.durable.topics and not self._live:
            return "shared"
        if all(route.receiver.every_node for route in self._live):
            return "every node"
        return "leader" if self.dispatcher.leader else "standby"

    def stop(self) -> None:
        """Stop the intake; :meth:`run` returns soon after. Call it on the loop."""
        self.durable.stop()
        self.listener.stop()

    async def run(self, shutdown_timeout: float | None = None) -> bool:
        """Listen until :meth:`stop`, then let receivers finish.

        Args:
            shutdown_timeout: seconds they get; default ``PGNOTIFY_SHUTDOWN_TIMEOUT``.

        Returns:
            Whether all of them finished in time.
        """
        chores = [asyncio.create_task(self._prune_for_ever(), name="pgnotify-prune")]
        if self._health_file is not None:
            chores.append(asyncio.create_task(self._report_for_ever(), name="pgnotify-health"))
        if self._may_feed and self.feed is None:
            chores.append(asyncio.create_task(self._feed_once_in_use(), name="pgnotify-feed"))
        try:
            await self.listener.run()
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.wait(chores)
            limit = conf.SHUTDOWN_TIMEOUT if shutdown_timeout is None else shutdown_timeout
            drained = all(await asyncio.gather(self._finish(limit), self.durable.close(limit)))
            if self._health_file is not None:
                self._health_file.unlink(missing_ok=True)
        return drained

    async def _finish(self, limit: float) -> bool:
        """Hand on and handle what was heard, within ``limit`` seconds altogether."""
        begun = time.monotonic()
        settled = await self._intake.settled(limit)
        left = max(0.0, limit - (time.monotonic() - begun))
        return await self.dispatcher.drain(left) and settled

    # -- sink of the listener -------------------------------------------------------------------

    def established(self, channels: frozenset[str]) -> None:
        self._established = True
        self._report_health()
        self.durable.start(self._ready)
        self.durable.wake_all()
        self._ready()

    @property
    def _is_ready(self) -> bool:
        return self._established and self.durable.registered

    def _ready(self) -> None:
        """Ready is: what is published from now on is heard, and read by every consumer."""
        if self._is_ready and self._on_ready is not None:
            self._on_ready()

    def lost(self, cause: str, retry_in: float) -> None:
        self._established = False
        if self.feed is not None:
            self._intake.in_turn(self.feed.lost)
        self._report_health()
        if self._on_lost is not None:
            self._on_lost(cause, retry_in)

    def notified(self, notifications: Sequence[Notification]) -> None:
        live = self.durable.notified(notifications)
        if live:
            self._intake.notified(live)

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        self._intake.gap(since, until, cause, for_leader=for_leader)

    def _proven(self, at: int, channels: frozenset[str]) -> None:
        feed = self.feed
        if feed is not None:
            self._intake.in_turn(lambda: feed.proven(at, channels))

    def _overflowed(self, since: datetime, until: datetime, cause: str) -> None:
        self.listener.health.note_gap(since, until, cause)
        task = asyncio.ensure_future(
            signals.listener_gap.asend_robust(self.listener, since=since, until=until, cause=cause)
        )
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def led(self, leader: bool) -> None:
        self._intake.led(leader)
        self._report_health()

    # -- the epoch table ------------------------------------------------------------------------

    def _begin_to_feed(self) -> None:
        feed = self.feed = EpochFeed(node_table())
        live = frozenset(s.topic for route in self._live for s in route.subscriptions)
        self._intake.take_in(feed.topics, _Fed(self._consumer, feed, live), feed.missed)
        self.durable.hear_live(feed.channels)

    async def _feed_once_in_use(self) -> None:
        """Nobody has to tell us of a cache that a template is the first to use."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            if is_in_use():
                break
        self._begin_to_feed()
        logger.info("Caches of this node use the epoch table, which is kept from here on")
        interval = heartbeat_interval()
        if interval is not None:
            self.listener.beat_every(interval)
        self.listener.want(self._channels)

    # -- chores ---------------------------------------------------------------------------------

    async def _prune_for_ever(self) -> None:
        pause = PRUNE_INTERVAL
        while True:
            await asyncio.sleep(pause)
            if self.role != "standby":
                try:
                    more = await sync_to_async(self._prune)()
                    pause = PRUNE_AGAIN if more else PRUNE_INTERVAL
                except DatabaseError as exc:
                    logger.warning("Stored events could not be pruned: %s", exc)

    def _prune(self) -> bool:
        """Remove what is old; whether there is more of it than one run removes."""
        from ..publishing.store import PRUNE_BATCH, prune

        close_old_connections()
        try:
            while prune(conf.STORED_RETENTION, conf.rows_database(self.using)) >= PRUNE_BATCH:
                pass
            if not self._compared:
                self._compare_tiers()
            return self._pruner.run().more
        finally:
            close_old_connections()

    def _compare_tiers(self) -> None:
        """Warn, once, of receivers that hear live what is published to be read from the log."""
        self._compared = True
        heard: dict[str, list[str]] = {}
        for route in self._live:
            if route.receiver.durable is None:
                for stream in route.subscriptions:
                    heard.setdefault(stream.topic, []).append(route.receiver.uid)
        for topic in logged_topics(heard, conf.rows_database(self.using)) if heard else ():
            logger.warning(
                "Topic %r is in the event log, and these receivers hear it live only: %s; pass "
                "Topic(%r, delivery='durable') or durable=True, or durable=False if it is meant",
                topic,
                ", ".join(heard[topic]),
                topic,
            )

    async def _report_for_ever(self) -> None:
        while True:
            await asyncio.sleep(conf.HEARTBEAT_INTERVAL / 2)
            self._report_health()

    def status(self) -> dict[str, Any]:
        """The state of this listener, as plain values."""
        return {
            "node": conf.NODE,
            "pid": os.getpid(),
            "backend": self.listener.backend_pid,
            "database": self.using,
            "role": self.role,
            "leadership": self._leadership,
            **self.listener.status(),
            "ready": self._is_ready,
            "topics": self.topics,
            "waiting": self.dispatcher.waiting,
            "running": self.dispatcher.running,
            "consumers": len(self.durable.held),
            **({"epoch_table": None, "caches": {}} if self.feed is None else self.feed.status()),
            "counts": self.stats.snapshot(),
            "at": datetime.now(UTC).isoformat(),
        }

    def _report_health(self) -> None:
        if self._health_file is None:
            return
        try:
            new = self._health_file.with_name(f".{self._health_file.name}.{os.getpid()}")
            new.write_text(json.dumps(self.status()))
            new.replace(self._health_file)  # at once: a probe never reads half of it
        except OSError as exc:
            logger.error("The health file %s could not be written: %s", self._health_file, exc)
