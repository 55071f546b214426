"""The epoch feed: bumps the epoch table for what a listener hears, and moves its heartbeat on.

Everything happens on the listener's loop, in the order in which it came. The heartbeat is the time
at which the last answered echo was sent: whatever was committed and notified before has been heard,
and has been applied here, by the time that the echo has come back. Before the first heartbeat after
a loss, and at the start, everything is made stale: nobody heard what came meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from ..conf import conf
from ..epochs.counts import busiest, latest_counts
from ..epochs.names import EVERYTHING, INVALIDATIONS
from ..epochs.rules import heard_topics, is_known_to, names_of
from ..epochs.table import EpochTable
from ..events import Event
from ..templates import fields_of
from ..wire import wire_channel

logger = logging.getLogger("django_pgnotify.caching")

MOST_TAGS_TOLD = 10
"""Tags of a cache that a status names: those that were looked up most."""


class EpochFeed:
    """Keeps ``table`` for one listener, which has to hear all of ``topics``."""

    def __init__(self, table: EpochTable, topics: Iterable[str] | None = None) -> None:
        self.table = table
        self.topics = frozenset(heard_topics() if topics is None else topics)
        prefix = conf.CHANNEL_PREFIX
        self.channels = frozenset(wire_channel(topic, prefix) for topic in self.topics)
        self._since: int | None = None
        """The id of the table that all was heard for since its last heartbeat; None: not all."""

    def status(self) -> dict[str, Any]:
        """The table and the caches of this node, as plain values."""
        return status_of(self.table)

    def apply(self, events: Sequence[Event]) -> None:
        """Make stale what these events tell of.

        Should that fail, everything is before the next heartbeat.
        """
        since, self._since = self._since, None
        names: set[str] = set()
        for event in events:
            if event.topic == INVALIDATIONS and is_known_to(self.table, event.data):
                continue
            if event.topic in self.topics:
                names.update(
                    names_of(
                        event.topic, event.action, event.model, event.pk, partial(fields_of, event)
                    )
                )
        if EVERYTHING in names:
            self.table.bump_all()
        elif names:
            self.table.bump(names)
        self._since = since

    def missed(self) -> None:
        """Something may not have been heard, or was heard and could not be understood."""
        self.table.bump_all()

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        if not for_leader:
            self.missed()

    def lost(self) -> None:
        """From here on nothing is heard; the heartbeat stands still until it is made good."""
        self._since = None

    def proven(self, at: int, channels: frozenset[str]) -> None:
        """All that was committed by ``at`` and concerns ``channels`` has been applied.

        Args:
            at: a reading of ``node_clock``: when the echo that has come back was sent.
        """
        if not self.channels <= channels:
            return
        table = self.table
        table.verify(at)
        if self._since != table.id:
            table.bump_all()
            self._since = table.id
        table.beat(at)


def status_of(table: EpochTable) -> dict[str, Any]:
    """A table and what the caches that depend on it have counted, as plain values."""
    heartbeat = table.heartbeat
    counts = {} if table.path is None else latest_counts(table.path)
    return {
        "epoch_table": {
            "path": table.path,
            "age": round(table.age(), 3) if heartbeat else None,
            "problem": table.problem or None,
        },
        "caches": {
            alias: {**of_alias, "tags": busiest(of_alias.get("tags", {}), MOST_TAGS_TOLD)}
            for alias, of_alias in counts.items()
        },
    }
