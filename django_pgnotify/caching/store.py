"""The near level: the entries of one NearCache in the memory of this process, and their counts."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..epochs.clock import NANOSECONDS, node_clock
from ..epochs.names import derived_name, key_name, space_name
from ..epochs.table import Snapshot
from .frozen import Frozen

NEVER = 1 << 63

MOST_TAGS = 200
"""Tags that are counted apart; those that come later are counted together, as ``OTHER_TAGS``."""

OTHER_TAGS = "(others)"


class Entry:
    """A value, and what it is judged by at each hit."""

    __slots__ = (
        "epochs", "expires", "hits", "kind", "payload", "read", "snapshot", "tags", "until"
    )  # fmt: skip

    def __init__(
        self, value: Frozen, expires: int, snapshot: Snapshot, tags: tuple[str, ...], *, odd: bool
    ) -> None:
        self.kind, self.payload = value
        self.until = expires
        """Reading of ``node_clock`` at which it expires."""
        # An odd key is warned of at each use, which the quick way does not.
        self.expires = 0 if odd else expires
        self.read = snapshot.read
        self.epochs = snapshot.epochs
        self.snapshot = snapshot
        self.tags = tags
        self.hits = 0

    @property
    def value(self) -> Any:
        return Frozen(self.kind, self.payload).thaw()

    @property
    def is_expired(self) -> bool:
        return node_clock() >= self.until


class Counts:
    """What happened to look-ups, altogether and by tag."""

    NAMES = ("hits", "misses", "stale", "bypassed", "second_level_hits", "fills", "refused")

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.by_tag: dict[str, Counter[str]] = {}

    def copy(self) -> Counts:
        same = Counts()
        same.total.update(self.total)
        same.by_tag = {tag: Counter(found) for tag, found in self.by_tag.items()}
        return same

    def as_dict(self) -> dict[str, Any]:
        tags = {tag: dict(found) for tag, found in self.by_tag.items()}
        return {**{name: self.total[name] for name in self.NAMES}, "tags": tags}

    def add(self, name: str, tags: Iterable[str] = (), amount: int = 1) -> None:
        self.total[name] += amount
        for tag in tags:
            known = tag in self.by_tag or len(self.by_tag) < MOST_TAGS
            self.by_tag.setdefault(tag if known else OTHER_TAGS, Counter())[name] += amount


class Store:
    """The entries of all NearCaches of one LOCATION in this process, whatever thread made them."""

    def __init__(self, space: str) -> None:
        self.space = space
        self.entries: dict[str, Entry] = {}
        self._counts = Counts()
        self.renew_lock()

    def renew_lock(self) -> None:
        self._lock = threading.Lock()
        self.changing = threading.RLock()
        """Held while a value is made of the one that is there."""

    def forked(self) -> None:
        self.renew_lock()
        self._counts = Counts()
        for entry in list(self.entries.values()):
            entry.hits = 0

    def names(self, key: str, tags: tuple[str, ...] = ()) -> tuple[str, ...]:
        """What a value under ``key`` depends on."""
        space = self.space
        return (key_name(space, key), derived_name(space, key), space_name(space), *tags)

    def put(self, key: str, entry: Entry, most: int, cull_frequency: int) -> None:
        with self._lock:
            entries = self.entries
            old = entries.pop(key, None)  # put behind the others: the first ones are culled first
            if old is not None:
                self._retire(old)
            elif len(entries) >= most:
                self._cull(cull_frequency)
            entries[key] = entry

    def drop(self, key: str, entry: Entry | None = None) -> bool:
        """Remove the entry of a key, or only this one; whether one was there and not expired."""
        with self._lock:
            found = self.entries.get(key)
            if found is None or (entry is not None and found is not entry):
                return False
            del self.entries[key]
            self._retire(found)
            return not found.is_expired

    def clear(self) -> None:
        with self._lock:
            for entry in self.entries.values():
                self._retire(entry)
            self.entries.clear()

    def count(self, name: str, tags: Iterable[str] = ()) -> None:
        with self._lock:
            self._counts.add(name, tags)

    def counts(self) -> dict[str, Any]:
        """Counts of this process since it began, and how many entries there are."""
        with self._lock:
            now = self._counts.copy()
            for entry in self.entries.values():
                if entry.hits:
                    now.add("hits", entry.tags, entry.hits)
            return now.as_dict() | {"entries": len(self.entries)}

    def _retire(self, entry: Entry) -> None:
        if entry.hits:
            self._counts.add("hits", entry.tags, entry.hits)

    def _cull(self, frequency: int) -> None:
        if frequency == 0:
            gone = list(self.entries)
        else:
            now = node_clock()
            gone = [key for key, entry in self.entries.items() if now >= entry.until]
            wanted = len(self.entries) // frequency
            if len(gone) < wanted:
                expired = set(gone)
                others = (key for key in self.entries if key not in expired)
                gone += [key for key, _ in zip(others, range(wanted - len(gone)), strict=False)]
        for key in gone:
            self._retire(self.entries.pop(key))


def expiry(timeout: float | None) -> int:
    """The reading of ``node_clock`` at which a value that may stay ``timeout`` seconds expires."""
    return NEVER if timeout is None else node_clock() + int(timeout * NANOSECONDS)


_stores: dict[str, Store] = {}


def store_of(space: str) -> Store:
    """The store of this name, the same for all threads."""
    return _stores.get(space) or _stores.setdefault(space, Store(space))


def all_stores() -> list[Store]:
    return list(_stores.values())


def _forked() -> None:
    for store in all_stores():
        store.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
