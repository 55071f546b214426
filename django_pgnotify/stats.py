"""Counters of what happened in this process."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter


class Stats:
    """Named counters that any thread may raise.

    Names in use: ``published``, ``frames``, ``stored``, ``publish_failed``, ``sender_waited`` on
    the publishing side; ``received``, ``foreign``, ``broken``, ``handled``, ``failed``,
    ``retried``, ``coalesced``, ``dropped``, ``gaps`` on the listening side; ``streams``,
    ``shown``, ``refused`` of streams to browsers; ``sent``, ``expired``, ``lapsed`` of
    the channel layer.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.renew_lock()
        _all.add(self)

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def __getitem__(self, name: str) -> int:
        """The count of ``name``, 0 if it never happened."""
        with self._lock:
            return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """A copy of all counters."""
        with self._lock:
            return dict(self._counts)


_all: weakref.WeakSet[Stats] = weakref.WeakSet()

publishing_stats = Stats()
"""What this process published, over all databases."""


def _renew_locks() -> None:
    for stats in _all:
        stats.renew_lock()


if hasattr(os, "register_at_fork"):
    # Another thread may have held a lock at the moment of the fork, and is not in the child.
    os.register_at_fork(after_in_child=_renew_locks)
