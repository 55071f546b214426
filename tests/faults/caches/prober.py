"""Finds out what each node's table has applied, without asking how long that takes.

A probe is a tag of its own that is invalidated from outside. Once it is stale in a node's table,
so is everything that was published before it. A gap makes everything stale and proves nothing
about the probe: then the control, which depends on no name, is stale too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from django.db import Error, connection

from django_pgnotify.caching import EpochTable, invalidate_tags
from django_pgnotify.epochs.names import tag_name
from django_pgnotify.epochs.table import Snapshot
from tests.faults.caches.records import Probe

EVERY = 0.05
LOOK = 0.001
GIVE_UP = 20.0
"""Seconds after which a probe is forgotten."""


@dataclass
class _Pending:
    node: int
    published: int
    snapshots: list[Snapshot]
    control: Snapshot


class Prober(threading.Thread):
    """Probes the tables of ``nodes`` until :meth:`finish`."""

    def __init__(self, tables: Mapping[int, EpochTable]) -> None:
        super().__init__(name="prober", daemon=True)
        self.seen: dict[int, list[Probe]] = {node: [] for node in tables}
        self.error: BaseException | None = None
        self._tables = tables
        self._pending: list[_Pending] = []
        self._number = 0
        self._stopping = threading.Event()

    def finish(self) -> None:
        self._stopping.set()
        self.join(30)
        if self.error is not None:
            raise self.error

    def applied_since(self, node: int, moment: int) -> bool:
        """Whether a probe published after ``moment`` was seen in a node's table."""
        seen = self.seen[node]
        return bool(seen) and seen[-1].published > moment

    def run(self) -> None:
        try:
            due = 0.0
            while not self._stopping.wait(LOOK):
                if time.monotonic() > due:
                    self._publish()
                    due = time.monotonic() + EVERY
                self._look()
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            connection.close()

    def _publish(self) -> None:
        self._number += 1
        # Two tags: a slot that some other tag has too must not pass for a probe.
        tags = [f"probe:{self._number}:{which}" for which in "ab"]
        made = [
            _Pending(node, 0, [table.capture([tag_name(tag)]) for tag in tags], table.capture([]))
            for node, table in self._tables.items()
        ]
        published = time.monotonic_ns()
        try:
            invalidate_tags(*tags)
        except Error:
            connection.close()
            return
        for pending in made:
            pending.published = published
        self._pending += made

    def _look(self) -> None:
        left = []
        for pending in self._pending:
            table = self._tables[pending.node]
            stale = not any(map(table.is_current, pending.snapshots))
            seen = time.monotonic_ns()
            if not table.is_current(pending.control):
                continue  # a gap: looked at last, since it comes before what follows it
            if stale:
                self.seen[pending.node].append(Probe(pending.published, seen))
            elif seen - pending.published < GIVE_UP * 1e9:
                left.append(pending)
        self._pending = left
