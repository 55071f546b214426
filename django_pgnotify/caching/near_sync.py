"""The sync half of ``NearCache``, and what both halves have in common.

A hit is one look-up in a dictionary and a comparison of the epochs that the value was loaded under
with those of the node's table. With ``SECOND_LEVEL`` a miss asks another cache, which is judged in
the same way, and what is stored is stored there too.

``set`` after a miss of the same key is a *fill*: it tells what the source said, so copies that
other processes hold stay as good as they were. Every other ``set``, and ``delete``, ``touch``,
``incr`` and ``clear``, is a change, and what other processes of the node hold of that key ends with
it. A fill in a transaction that has written waits for its COMMIT.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pickle import loads
from typing import Any

from django.core.cache import caches
from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from ..epochs.clock import NANOSECONDS, node_clock
from ..epochs.mapped import HEARTBEAT
from ..epochs.names import check_tags, tag_name
from ..epochs.table import Lease, Snapshot
from . import leases
from .epoch_cache import EpochCache
from .frozen import FLAT, PLAIN, Frozen, freeze
from .leases import MissLease, current_load
from .level import MISSING, NearLevel
from .loading import Place, load
from .options import NearOptions
from .shelf import Shelf
from .store import NEVER, expiry
from .stored import REPLACE_WITHIN, replacing, wrap
from .transactions import in_transaction, publish


class SyncNear(EpochCache):
    """See ``NearCache``."""

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        options = NearOptions.of(params)
        super().__init__(options.params)
        self.level = NearLevel(
            location or "",
            options._replace(
                max_entries=self._max_entries,
                cull_frequency=self._cull_frequency,
            ),
        )
        self._entries = self.level.store.entries

    @property
    def second_level(self) -> BaseCache | None:
        """The cache that is asked on a miss, None where there is none."""
        alias = self.level.options.second_level
        return None if alias is None else caches[alias]

    def stats(self) -> dict[str, Any]:
        """Counts of this store in this process: hits, misses, stale, bypassed, …, and by tag."""
        return self.level.store.counts()

    # -- reading --------------------------------------------------------------------------------

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        full = self.make_key(key, version)
        entry = self._entries.get(full)
        if entry is not None:
            level = self.level
            table = level.table
            words = table.words
            # In this order: what the heartbeat proves was applied before the epochs are read.
            now = node_clock()
            if (
                now < entry.expires
                and now < table.checked_until
                and now - words[HEARTBEAT] <= level.limit
                and entry.read(words) == entry.epochs
            ):
                entry.hits += 1
                load = current_load()
                if load is not None:
                    load.add(entry.snapshot.names, entry.snapshot.at)
                kind, payload = entry.kind, entry.payload
                if kind is PLAIN:
                    return payload
                return payload.copy() if kind is FLAT else loads(payload)
        found = self._look(full)
        second = self.second_level if found is MISSING else None
        if second is not None and not self.level.is_bypassed:
            found = self.level.promote(full, second.get(self.level.second_key(full)))
        return default if found is MISSING else found

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        found, missed = self._look_for_many(keys, version)
        second = self.second_level if missed else None
        if second is not None and not self.level.is_bypassed:
            stored = second.get_many(list(map(self.level.second_key, missed)))
            found |= self._promote_many(missed, stored)
        return found

    def has_key(self, key: Any, version: int | None = None) -> bool:
        return self.get(key, MISSING, version) is not MISSING

    def _look(self, full: str) -> Any:
        self.validate_key(full)
        return self.level.look(full)

    def _look_for_many(
        self, keys: Iterable[Any], version: int | None
    ) -> tuple[dict[Any, Any], dict[str, Any]]:
        """What is near, and of what is not the full keys with the caller's."""
        found, missed = {}, {}
        for key in keys:
            full = self.make_key(key, version)
            self.validate_key(full)
            value = self.level.look(full, lease=False)
            if value is MISSING:
                missed[full] = key
            else:
                found[key] = value
        if missed:
            self.level.leave_misses(missed)
        return found, missed

    def _promote_many(self, missed: dict[str, Any], stored: Mapping[str, Any]) -> dict[Any, Any]:
        level = self.level
        values = {
            full: level.promote(full, stored.get(level.second_key(full)), used_up=False)
            for full in missed
        }
        found = {full: value for full, value in values.items() if value is not MISSING}
        level.take_misses(found, None)
        return {missed[full]: value for full, value in found.items()}

    # -- storing --------------------------------------------------------------------------------

    def set(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> None:
        """Store a value. ``tags`` name what else it depends on, see ``invalidate_tags``."""
        full, frozen = self.make_and_validate_key(key, version), freeze(value)
        seconds, extra = self._seconds(timeout), names_of_tags(tags)
        miss = self.level.take_miss(full, seconds)
        if not self._fill_in_transaction(full, frozen, seconds, extra, miss):
            self._write(full, frozen, seconds, self.level.set(full, frozen, seconds, extra, miss))

    def _fill_in_transaction(
        self,
        full: str,
        value: Frozen,
        seconds: float | None,
        extra: tuple[str, ...],
        miss: MissLease | None,
    ) -> bool:
        """Leave the fill of a miss to the open transaction; False where that is not to be."""
        if miss is None or not miss.is_recent:
            return False
        self.level.tell_of_miss(full, extra)
        if not in_transaction():
            return False

        def fill() -> None:
            snapshot = self.level.fill(full, value, seconds, extra, miss.lease)
            self._write(full, value, seconds, snapshot)

        publish(fill)
        return True

    def _write(
        self, full: str, value: Frozen, seconds: float | None, snapshot: Snapshot | None
    ) -> None:
        second = self.second_level
        if second is not None and snapshot is not None:
            second.set(self.level.second_key(full), wrap(value, snapshot, seconds), seconds)

    def set_many(
        self,
        data: Mapping[Any, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> list[Any]:
        frozen = {key: freeze(value) for key, value in data.items()}
        seconds, wrapped = self._set_many_near(frozen, timeout, version, tags)
        second = self.second_level if wrapped else None
        if second is not None:
            second.set_many(wrapped, seconds)
        return []

    def _set_many_near(
        self, data: Mapping[Any, Frozen], timeout: Any, version: int | None, tags: Iterable[str]
    ) -> tuple[float | None, dict[str, Any]]:
        """Store values near; returns their seconds, and what the second level is to have."""
        seconds, extra = self._seconds(timeout), names_of_tags(tags)
        values = {self.make_and_validate_key(key, version): value for key, value in data.items()}
        misses = self.level.take_misses(values, seconds)
        wrapped = {}
        for full, value in values.items():
            miss = misses.get(full)
            if self._fill_in_transaction(full, value, seconds, extra, miss):
                continue
            snapshot = self.level.set(full, value, seconds, extra, miss)
            if snapshot is not None and self.level.options.second_level:
                wrapped[self.level.second_key(full)] = wrap(value, snapshot, seconds)
        return seconds, wrapped

    def add(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        full, frozen = self.make_and_validate_key(key, version), freeze(value)
        seconds, second, extra = self._seconds(timeout), self.second_level, names_of_tags(tags)
        if second is None:
            return self._add_near(full, frozen, seconds, extra)
        # Nothing is bumped: who comes too late would end what another has added meanwhile.
        lease = self.level.lease()
        if self.level.entry(full) is not None:
            return False
        key_there = self.level.second_key(full)
        there = second.get(key_there)
        if self.level.promote(full, there, used_up=False) is not MISSING:
            return False
        miss = self.level.take_miss(full, seconds)
        if self._fill_in_transaction(full, frozen, seconds, extra, miss):
            return True
        snapshot = self.level.settle(full, extra, lease if miss is None else miss.lease)
        if snapshot is None:
            return False
        stored = wrap(frozen, snapshot, seconds)
        if there is None:
            added = second.add(key_there, stored, seconds)
        else:  # it does not count
            added = second.add(replacing(key_there, there), 1, REPLACE_WITHIN)
            if added:
                second.set(key_there, stored, seconds)
        if added:
            self.level.keep(full, frozen, seconds, snapshot)
        return added

    def _add_near(
        self, full: str, value: Frozen, seconds: float | None, extra: tuple[str, ...]
    ) -> bool:
        if self.level.entry(full) is not None:
            return False
        miss = self.level.take_miss(full, seconds)
        if self._fill_in_transaction(full, value, seconds, extra, miss):
            return True
        with self.level.store.changing:
            if self.level.entry(full) is not None:
                return False
            stored = self.level.set(full, value, seconds, extra, miss)
            return stored is not None or (seconds is not None and seconds <= 0)

    # -- changing -------------------------------------------------------------------------------

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        full = self.make_and_validate_key(key, version)
        if self.get(key, MISSING, version) is MISSING:
            return False
        frozen, seconds, snapshot = self._touch_near(full, self._seconds(timeout))
        self._write(full, frozen, seconds, snapshot)
        return True

    def _touch_near(
        self, full: str, seconds: float | None
    ) -> tuple[Frozen, float | None, Snapshot | None]:
        with self.level.store.changing:
            entry = self.level.entry(full)
            if entry is None or (seconds is not None and seconds <= 0):
                self.level.change([full])
                return freeze(None), seconds, None
            value = Frozen(entry.kind, entry.payload)
            return value, seconds, self.level.derive(full, entry, value, expiry(seconds))

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        full = self.make_and_validate_key(key, version)
        if self.second_level is not None:
            self.get(key, MISSING, version)  # near, if it is anywhere
        value, frozen, seconds, snapshot = self._incr_near(full, key, delta)
        self._write(full, frozen, seconds, snapshot)
        return value

    def _incr_near(
        self, full: str, key: Any, delta: int
    ) -> tuple[Any, Frozen, float | None, Snapshot | None]:
        with self.level.store.changing:
            entry = self.level.entry(full)
            if entry is None:
                raise ValueError(f"Key {key!r} not found")
            value = entry.value + delta
            frozen = freeze(value)
            rest = (entry.until - node_clock()) / NANOSECONDS
            seconds = None if entry.until == NEVER else rest
            return value, frozen, seconds, self.level.derive(full, entry, frozen, entry.until)

    def delete(self, key: Any, version: int | None = None) -> bool:
        full = self.make_and_validate_key(key, version)
        had, second = self.level.change([full]), self.second_level
        return (second is not None and second.delete(self.level.second_key(full))) or had

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        fulls = [self.make_and_validate_key(key, version) for key in keys]
        second = self.second_level
        if fulls:
            self.level.change(fulls)
            if second is not None:
                second.delete_many(list(map(self.level.second_key, fulls)))

    def clear(self) -> None:
        """End all that any process of the node holds here, and that the second level has of it.

        What else is in the second level's alias stays.
        """
        self.level.clear()

    def close(self, **kwargs: Any) -> None:
        """The end of a request: misses that nobody filled are forgotten."""
        leases.forget(self.level.space)

    def get_or_set(
        self,
        key: Any,
        default: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> Any:
        """The value of a key; where there is none, ``default``, called if it can be, is stored.

        As ``cached`` promises: one thread of a process calls it, and what it reads from caches is
        what the value depends on.
        """
        place = Place(Shelf("", self), key, version, timeout, names_of_tags(tags))
        return load(place, default if callable(default) else lambda: default)

    # -- for cached() and its kin -----------------------------------------------------------------

    def fill(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """Store a value that was loaded after ``lease``; False where it may be stale already."""
        full, seconds = self.make_and_validate_key(key, version), self._seconds(timeout)
        frozen = freeze(value)
        snapshot = self.level.fill(full, frozen, seconds, tuple(names), lease, loaded_at)
        self._write(full, frozen, seconds, snapshot)
        return snapshot is not None

    def forget_miss(self, key: str, version: int | None = None) -> None:
        """The miss of ``key`` was somebody's who has a lease of their own."""
        leases.take(self.level.space, self.make_key(key, version))

    # -- what the others have in common ---------------------------------------------------------

    def _seconds(self, timeout: Any) -> float | None:
        """Seconds that a value may stay, less the jitter; None for ever."""
        seconds = self.default_timeout if timeout == DEFAULT_TIMEOUT else timeout
        jitter = self.level.options.jitter
        if seconds is None or not jitter or seconds <= 0:
            return seconds
        return float(seconds * (1 - jitter * random.random()))


def names_of_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The names of ``tags``. Raises InvalidArgument if one of them is none."""
    return tuple(tag_name(tag) for tag in check_tags(tags)) if tags else ()
