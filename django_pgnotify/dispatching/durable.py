"""The durable side of a service: which routes read the log, and what wakes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..conf import conf
from ..durable.waking import waking_channel
from ..events import Event
from ..listening.connection import Notification
from ..registry import Receiver, Registry, Subscription
from ..stats import Stats
from ..wire import wire_channel
from .dispatcher import Route

Observe = Callable[[Sequence[Event]], None]


class DurableSide:
    """Parts the routes of a service into live ones and durable consumers, and runs the latter.

    A consumer hears nothing of what NOTIFY carries; that there was one makes it read the log.

    Args:
        routes: all routes of the service.
        registry: where the receivers are from.
        using: alias that the service listens on; the consumers' locks are held through it.
        stats: of the service.
        observe: told, on the loop, of the events of topics that only consumers read.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        registry: Registry,
        *,
        using: str,
        stats: Stats,
        observe: Observe | None,
    ) -> None:
        self.live_routes: list[Route] = []
        self._entries: list[tuple[Receiver, tuple[Subscription, ...]]] = []
        default = conf.DELIVERY
        topics: set[str] = set()
        for route in routes:
            durable = registry.durable_topics(route.receiver, default)
            live = tuple(one for one in route.subscriptions if one.topic not in durable)
            if live:
                self.live_routes.append(Route(route.receiver, live))
            if len(live) < len(route.subscriptions):
                # Whole, whatever --topic says: it has one cursor for all of its topics.
                streams = tuple(
                    one for one in registry.subscriptions(route.receiver) if one.topic in durable
                )
                self._entries.append((route.receiver, streams))
                topics.update(one.topic for one in streams)
        self.registered = not self._entries
        """Whether every consumer exists, so that what is published now will be read by it."""
        heard_live = {one.topic for route in self.live_routes for one in route.subscriptions}
        self.topics = frozenset(topics)
        self._only_woken = self.topics - heard_live
        prefix = conf.CHANNEL_PREFIX
        self._wakes = {wire_channel(topic, prefix): frozenset([topic]) for topic in self.topics}
        self._silent = {wire_channel(one, prefix) for one in self._only_woken}
        self._operators = waking_channel()
        self._using = using
        self._stats = stats
        self._observe = observe
        self._loop: asyncio.AbstractEventLoop | None = None
        self._consumers: Any = None
        self._stopping = False

    @property
    def channels(self) -> frozenset[str]:
        """The wire channels on which it is woken."""
        return frozenset(self._wakes) | ({self._operators} if self._entries else frozenset())

    @property
    def held(self) -> list[str]:
        """The names of the consumers that this process runs now."""
        return [] if self._consumers is None else self._consumers.held

    def hear_live(self, channels: frozenset[str]) -> None:
        """What comes on these is for the caches too, whoever else reads it."""
        self._silent -= channels

    def start(self, registered: Callable[[], None]) -> None:
        """Begin to share and run the consumers; ``registered`` is called once they exist.

        Once the listener's way has been proven, and not before: through a pooler the consumers'
        locks would outlive this process on a connection of the pooler's. Again, it does nothing.
        """
        if not self._entries or self._stopping or self._consumers is not None:
            return
        from ..durable.sharing import Consumers  # models are not importable before the apps are

        def now_registered() -> None:
            self.registered = True
            registered()

        self._loop = asyncio.get_running_loop()
        self._consumers = Consumers(
            self._entries,
            using=conf.rows_database(self._using),
            locks=self._using,
            stats=self._stats,
            observe=None if self._observe is None else self._handled,
        )
        self._consumers.start(now_registered)

    def notified(self, notifications: Sequence[Notification]) -> Sequence[Notification]:
        """Wake whom these concern; returns those that somebody hears live."""
        if self._consumers is None:
            return notifications
        channels = {notification.channel for notification in notifications}
        if self._operators in channels:
            self._consumers.wake()
        for topics in {self._wakes[name] for name in channels & self._wakes.keys()}:
            self._consumers.wake(topics)
        silent = self._silent | {self._operators}
        if silent.isdisjoint(channels):
            return notifications
        return [one for one in notifications if one.channel not in silent]

    def wake_all(self) -> None:
        """Something may have been missed."""
        if self._consumers is not None:
            self._consumers.wake()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping = True
        if self._consumers is not None:
            self._consumers.stop()

    async def close(self, timeout: float) -> bool:
        """Let the events at hand finish and store the cursors; whether that was done in time."""
        return self._consumers is None or await self._consumers.close(timeout)

    def _handled(self, events: Sequence[Event]) -> None:
        only = [event for event in events if event.topic in self._only_woken]
        if only and self._loop is not None:
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._tell, only)

    def _tell(self, events: Sequence[Event]) -> None:
        if self._observe is not None:
            self._observe(events)
