"""What keeps the epoch table of this process: for one in a file, ``pglisten``; else we do."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from datetime import datetime

from ..conf import conf
from ..epochs.clock import node_clock
from ..epochs.node import node_table
from ..epochs.table import EpochTable
from ..listening.background import BackgroundListener, Subscription, background_listener
from ..listening.feed import EpochFeed
from ..listening.intake import Intake
from ..publishing.announcer import announcer
from ..stats import Stats
from .reporting import report_when_due

logger = logging.getLogger("django_pgnotify.caching")


def current_table() -> EpochTable:
    """The node's epoch table, looked at anew where that is due, and fed."""
    table = node_table()
    now = node_clock()
    if now >= table.checked_until:
        table.verify(now)
    if table.path is None:
        keep_fed(table)
    else:
        report_when_due(table.path, now)
    return table


def announce(names: Iterable[str]) -> None:
    """Tell all other nodes, in the background, that these are stale; this one has been told."""
    announcer.put(names)


class ProcessFeed(EpochFeed):
    """Feeds a table in memory from the background listener of this process."""

    def __init__(self, table: EpochTable) -> None:
        super().__init__(table)
        self._pid = os.getpid()
        self._intake = Intake(
            sorted(self.topics),
            conf.rows_database(conf.listen_database),
            self,
            Stats(),
            on_broken=self.missed,
        )
        self._subscriptions: list[Subscription] = []

    @property
    def alive(self) -> bool:
        return self._pid == os.getpid() and all(one.alive for one in self._subscriptions)

    def start(self) -> None:
        background_listener(conf.listen_database, self._subscribe)

    def _subscribe(self, listener: BackgroundListener) -> None:
        for number, channel in enumerate(sorted(self.channels)):
            first = number == 0  # one of them is told what concerns the connection
            self._subscriptions.append(
                listener.subscribe(
                    channel,
                    self._intake.notified,
                    self._gap if first else None,
                    None,
                    self._in_turn_proven if first else None,
                    self._in_turn_lost if first else None,
                )
            )

    def dispatch(self, events: object, size: int) -> None:
        self.apply(events)  # type: ignore[arg-type]

    def led(self, leader: bool) -> None:
        """Never: the background listener does not compete."""

    def _gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        self._intake.gap(since, until, cause, for_leader=False)

    def _in_turn_proven(self, at: int, channels: frozenset[str]) -> None:
        self._intake.in_turn(lambda: self.proven(at, channels))

    def _in_turn_lost(self) -> None:
        self._intake.in_turn(self.lost)


_AGAIN_AFTER = 1.0

_feeds: dict[int, ProcessFeed] = {}
_started_at = float("-inf")
_guard = threading.Lock()


def keep_fed(table: EpochTable) -> None:
    """Have a table in memory fed by this process, a forked child's by the child."""
    global _started_at
    feed = _feeds.get(id(table))
    if feed is not None and feed.alive:
        return
    with _guard:
        feed = _feeds.get(id(table))
        now = time.monotonic()
        if (feed is None or not feed.alive) and now - _started_at >= _AGAIN_AFTER:
            _started_at = now
            feed = ProcessFeed(table)
            feed.start()
            _feeds[id(table)] = feed


def _forked() -> None:
    global _guard, _started_at
    _guard = threading.Lock()  # another thread of the parent may have held it
    _started_at = float("-inf")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
