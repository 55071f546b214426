"""What ``forward(direct=True)`` sends to groups, heard in each process that has members of any.

One hop less: the event's own NOTIFY reaches the process, and not a second one from ``pglisten``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol

from channels.layers import channel_layers

from .. import signals
from ..conf import conf
from ..decoding import gap_event
from ..events import Event
from ..listening.background import Subscription, background_listener, established
from ..listening.intake import Intake
from ..registry import Receiver, accepts, registry
from ..registry import Subscription as Stream
from ..stats import Stats

logger = logging.getLogger("django_pgnotify.layers")


_beginning_anew = threading.Lock()


class Direct(Protocol):
    """How an event is forwarded: ``purpose["direct"]`` of the receiver."""

    @property
    def groups(self) -> Callable[[Event], list[str]]: ...
    @property
    def message(self) -> Callable[[Event], dict[str, Any]]: ...


class Target(Protocol):
    """A layer, as its feed sees it; called in any thread."""

    @property
    def stats(self) -> Stats: ...
    def has_members(self, group: str) -> bool: ...
    def deliver(self, group: str, message: dict[str, Any]) -> None: ...
    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None: ...


class DirectFeed:
    """The feed of one layer (see ``layers.postgres.Feed``); it listens from the first member on."""

    def __init__(self, layer: Target, using: str) -> None:
        self._layer = layer
        self._using = using
        self._reset()

    def _reset(self) -> None:
        """Begin anew: at first, and in a forked child."""
        self._lock = threading.Lock()
        self._routes: list[tuple[Receiver, frozenset[Stream]]] = []
        self._subscriptions: list[Subscription] = []
        self._pid = os.getpid()  # last: another thread may be looking

    async def listening(self) -> None:
        """Return once every later event that is forwarded to this layer directly will be heard.

        Raises:
            ListenError: that is not so within ``PGNOTIFY_CONNECT_TIMEOUT``.
        """
        if self._pid != os.getpid():
            with _beginning_anew:
                if self._pid != os.getpid():
                    self._reset()
        with self._lock:
            if not all(subscription.alive for subscription in self._subscriptions):
                self._subscriptions = []
            if not self._subscriptions:
                self._start()
            subscriptions = list(self._subscriptions)
        await established(subscriptions, conf.CONNECT_TIMEOUT)

    def close(self) -> None:
        """Hear no more; :meth:`listening` begins again."""
        if self._pid == os.getpid():
            with self._lock:
                subscriptions, self._subscriptions = self._subscriptions, []
            for subscription in subscriptions:
                subscription.close()

    def _start(self) -> None:
        ours = {alias for alias, layer in channel_layers.backends.items() if layer is self._layer}
        self._routes = [
            (receiver, frozenset(registry.subscriptions(receiver)))
            for receiver in registry.receivers
            if "direct" in receiver.purpose and receiver.purpose["layer"] in ours
        ]
        topics = sorted({stream.topic for _, streams in self._routes for stream in streams})
        if not topics:
            return
        intake = Intake(topics, conf.rows_database(self._using), self, self._layer.stats)

        def on_gap(since: datetime | None, until: datetime, cause: str) -> None:
            intake.gap(since, until, cause, for_leader=False)

        listener = background_listener(self._using)
        for number, channel in enumerate(sorted(intake.channels)):
            # One of them tells of gaps: the connection is the same for all.
            self._subscriptions.append(
                listener.subscribe(channel, intake.notified, None if number else on_gap)
            )

    # -- in the listener's thread -------------------------------------------------------------

    def dispatch(self, events: Sequence[Event], size: int) -> None:
        for event in events:
            for receiver, streams in self._routes:
                if accepts(receiver, event) and any(
                    stream.topic == event.topic and stream.model in (None, event.model)
                    for stream in streams
                ):
                    self._pass_on(receiver, event)

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        # To all members: a template with {pk} has no names for the groups that missed something.
        self._layer.note_gap(since, until, cause)
        for receiver, streams in self._routes:
            if receiver.on_gap:
                for topic in sorted({stream.topic for stream in streams}):
                    gap = gap_event(topic, since=since, until=until, cause=cause, using=self._using)
                    self._pass_on(receiver, gap)

    def led(self, leader: bool) -> None:
        """Never: nobody competes for what each process does for itself."""

    def _pass_on(self, receiver: Receiver, event: Event) -> None:
        direct: Direct = receiver.purpose["direct"]
        try:
            groups = [name for name in direct.groups(event) if self._layer.has_members(name)]
            if groups:
                message = direct.message(event)
                for name in groups:
                    self._layer.deliver(name, message)
        except Exception as exc:
            logger.exception(
                "Event %s on topic %r could not be forwarded by %s",
                event.id,
                event.topic,
                receiver.uid,
                extra={"receiver": receiver.uid, "topic": event.topic},
            )
            signals.receiver_failed.send_robust(
                receiver.func, event=event, exception=exc, attempt=1, will_retry=False
            )
