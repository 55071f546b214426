"""The near level of a NearCache: which entries count, and what storing and changing one means.

All of it is in memory and done at once. The cache around it, sync or async, asks the second level.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from django.core.cache.backends.base import memcache_key_warnings

from ..epochs.clock import NANOSECONDS
from ..epochs.names import derived_name, key_name, space_name
from ..epochs.node import node_table
from ..epochs.table import EpochTable, Lease, Snapshot
from . import leases
from .bypassing import is_bypassed
from .feeding import announce, current_table
from .frozen import Frozen
from .leases import MissLease, current_load
from .options import NearOptions
from .store import Entry, expiry, store_of
from .stored import key_there, keys_begin, unwrap

MISSING = object()
"""What a look-up returns that finds nothing; no cached value is it."""


class NearLevel:
    """See the module. ``space`` is what the names of its keys begin with."""

    def __init__(self, space: str, options: NearOptions) -> None:
        self.space = space
        self.options = options
        self.store = store_of(space)
        self._keys_begin = keys_begin(space)
        # Not looked at: a cache that is only made, as by a system check, needs no listener.
        self.table: EpochTable = node_table()
        staleness = options.max_staleness
        self.limit = float("inf") if staleness is None else staleness * NANOSECONDS

    def lease(self) -> Lease:
        """This moment, on the table as it is now."""
        self._look_at_table()
        return self.table.lease()

    @property
    def is_bypassed(self) -> bool:
        """Whether nothing can be known of what is cached: the heartbeat is too old."""
        self._look_at_table()
        return is_bypassed(self.table, self.limit)

    def _look_at_table(self) -> None:
        self.table = current_table()

    def second_key(self, full: str) -> str:
        """The key in the second level: other NearCaches over it have others."""
        return key_there(self._keys_begin, full)

    # -- reading --------------------------------------------------------------------------------

    def look(self, full: str, *, lease: bool = True) -> Any:
        """The value of a key if its entry counts; else MISSING, and the context gets a lease."""
        entry = self.entry(full)
        if entry is None:
            self.tell_of_miss(full)
        else:
            entry.hits += 1
            _tell_load(entry.snapshot)
            return entry.value
        if lease:
            self.leave_misses((full,))
        return MISSING

    def leave_misses(self, fulls: Iterable[str]) -> None:
        """This context gets a lease of keys that it has looked for, and that are loaded now."""
        leases.leave(self.space, fulls, self.table.lease())

    def entry(self, full: str) -> Entry | None:
        """The entry of a key if it counts. What else happened is counted, the hit is not."""
        bypassed = self.is_bypassed
        found = self.store.entries.get(full)
        if bypassed:
            self.store.count("bypassed", () if found is None else found.tags)
        elif found is None:
            self.store.count("misses")
        elif found.read(self.table.words) != found.epochs:
            self.store.drop(full, found)
            self.store.count("stale", found.tags)
        elif found.is_expired:
            self.store.drop(full, found)
            self.store.count("misses", found.tags)
        else:
            return found
        return None

    def tell_of_miss(self, full: str, extra: tuple[str, ...] = ()) -> None:
        """What is being loaded depends on a key that was missed, and on what it is filled with."""
        load = current_load()
        if load is not None:
            load.add(self.store.names(full, extra), self.table.lease().at)

    def promote(self, full: str, stored: Any, *, used_up: bool = True) -> Any:
        """Take what the second level had under a key; MISSING where that does not count.

        Args:
            used_up: whether the look before it has left a lease, which is no more needed then.
        """
        bypassed = self.is_bypassed  # before the epochs are read
        found = None if stored is None or bypassed else unwrap(stored, self.table)
        if found is None or found.snapshot.names[:1] != (key_name(self.space, full),):
            return MISSING
        if used_up:
            leases.take(self.space, full)
        tags = _tags(found.snapshot)
        rest = None if found.expires is None else found.expires - time.time()
        self._put(full, found.value, expiry(rest), found.snapshot)
        self.store.count("second_level_hits", tags)
        _tell_load(found.snapshot)
        return found.value.thaw()

    # -- storing --------------------------------------------------------------------------------

    def take_miss(self, full: str, seconds: float | None) -> MissLease | None:
        """The miss that a ``set`` of this key would fill in this context, used up by it."""
        miss = leases.take(self.space, full)
        return None if seconds is not None and seconds <= 0 else miss

    def take_misses(self, fulls: Iterable[str], seconds: float | None) -> dict[str, MissLease]:
        """As :meth:`take_miss`, by key."""
        misses = leases.take_many(self.space, fulls)
        return {} if seconds is not None and seconds <= 0 else misses

    def has_miss(self, full: str) -> bool:
        return leases.has(self.space, full)

    def set(
        self,
        full: str,
        value: Frozen,
        seconds: float | None,
        extra: tuple[str, ...],
        miss: MissLease | None,
    ) -> Snapshot | None:
        """Store a value, as the fill of the miss before it or as a change.

        Args:
            seconds: until it expires; None for never, 0 or less for a value that is gone at once.
            extra: names that it depends on beside its key.
            miss: what :meth:`take_miss` has returned.

        Returns:
            What it is stored under; None where it is not, being gone or stale already.
        """
        if seconds is not None and seconds <= 0:
            self.change([full])
            return None
        names = self.store.names(full, extra)
        if miss is None or not miss.is_recent:
            self._look_at_table()
            if miss is not None and self.table.settle(miss.lease, names) is None:
                self.store.count("refused", _tags_in(extra))
                return None
            return self._assert(full, value, seconds, names)
        return self.fill(full, value, seconds, extra, miss.lease)

    def fill(
        self,
        full: str,
        value: Frozen,
        seconds: float | None,
        extra: tuple[str, ...],
        lease: Lease,
        loaded_at: int | None = None,
    ) -> Snapshot | None:
        """Store a value that was loaded after ``lease``; None where it may be stale already."""
        snapshot = self.settle(full, extra, lease)
        if snapshot is None:
            return None
        if loaded_at is not None:
            snapshot = snapshot._replace(at=min(loaded_at, snapshot.at))
        self.keep(full, value, seconds, snapshot)
        return snapshot

    def settle(self, full: str, extra: tuple[str, ...], lease: Lease) -> Snapshot | None:
        """What a value that was loaded after ``lease`` is to be stored under; None: not at all."""
        self._look_at_table()
        snapshot = self.table.settle(lease, self.store.names(full, extra))
        if snapshot is None:
            self.store.count("refused", _tags_in(extra))
        return snapshot

    def keep(self, full: str, value: Frozen, seconds: float | None, snapshot: Snapshot) -> None:
        """Have a value near that nobody's copy of the key is to end for."""
        self._put(full, value, expiry(seconds), snapshot)
        self.store.count("fills", _tags(snapshot))

    def _assert(
        self, full: str, value: Frozen, seconds: float | None, names: tuple[str, ...]
    ) -> Snapshot | None:
        stamp = self._bump([key_name(self.space, full)])
        snapshot = self.table.capture(names)
        if snapshot.epochs[1] != stamp:
            self.store.drop(full)  # whoever came between has the last word
            return None
        self._put(full, value, expiry(seconds), snapshot)
        self.store.count("fills", _tags_in(names))
        return snapshot

    def derive(self, full: str, old: Entry, value: Frozen, expires: int) -> Snapshot:
        """Put a value in the place of the one it was made of; returns what it is stored under.

        Its key's epoch stays that of the old value: an invalidation of that ends this one too.
        """
        table, name = self.table, derived_name(self.space, full)
        stamp = self._bump([name])
        mine = table.slot_of(name)
        before = old.snapshot
        epochs = tuple(
            stamp if table.slot_of(one) == mine else epoch
            for one, epoch in zip(before.names, before.epochs[1:], strict=True)
        )
        snapshot = before._replace(epochs=(before.epochs[0], *epochs))
        self._put(full, value, expires, snapshot)
        return snapshot

    def change(self, fulls: Iterable[str]) -> bool:
        """End what any process of the node holds of these keys; whether we had one that counted."""
        fulls = list(fulls)
        leases.forget(self.space, fulls)
        self._look_at_table()
        had = False
        for full in fulls:
            entry = self.store.entries.get(full)
            if entry is not None and entry.read(self.table.words) == entry.epochs:
                had |= not entry.is_expired
            self.store.drop(full)
        self._bump([key_name(self.space, full) for full in fulls])
        return had

    def clear(self) -> None:
        leases.forget(self.space)
        self._look_at_table()
        self._bump([space_name(self.space)])
        self.store.clear()

    def _bump(self, names: list[str]) -> int:
        stamp = self.table.bump(names)
        if self.options.second_level:
            announce(names)
        return stamp

    def _put(self, full: str, value: Frozen, expires: int, snapshot: Snapshot) -> None:
        if not snapshot.table:
            return  # of a dead table: it would count for whoever looks when the next one dies
        odd = any(memcache_key_warnings(full))
        entry = Entry(value, expires, snapshot, _tags(snapshot), odd=odd)
        self.store.put(full, entry, self.options.max_entries, self.options.cull_frequency)


def _tags(snapshot: Snapshot) -> tuple[str, ...]:
    return _tags_in(snapshot.names)


def _tags_in(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name[2:] for name in names if name.startswith("t:"))


def _tell_load(snapshot: Snapshot) -> None:
    load = current_load()
    if load is not None:
        load.add(snapshot.names, snapshot.at)
