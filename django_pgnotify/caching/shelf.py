"""Judged values in any cache of CACHES: a NearCache, or one that knows nothing of epochs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.core.cache import caches
from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from ..conf import conf
from ..epochs.clock import NANOSECONDS
from ..epochs.names import key_name
from ..epochs.table import EpochTable, Lease, Snapshot
from .bypassing import is_bypassed
from .epoch_cache import EpochCache
from .feeding import current_table
from .frozen import PLAIN, Frozen
from .leases import current_load
from .level import MISSING
from .reporting import count
from .stored import names_in, unwrap, wrap


class Shelf:
    """One cache alias, as ``cached`` and its kin use it."""

    def __init__(self, alias: str, backend: EpochCache | None = None) -> None:
        self.alias = alias
        self._backend = backend

    @property
    def backend(self) -> Any:
        """Django's cache for it, of this thread or task."""
        return caches[self.alias] if self._backend is None else self._backend

    def lease(self) -> Lease:
        """This moment; take it before what is to be cached is read."""
        return current_table().lease()

    def name_of(self, key: str, version: int | None = None) -> str:
        """The name whose bump makes what is under a key stale."""
        return _name_of(self.backend, self.alias, key, version)

    def look(self, key: str, version: int | None = None) -> Any:
        """The value under a key if it counts, else MISSING."""
        backend = self.backend
        if isinstance(backend, EpochCache):
            found = backend.get(key, MISSING, version)
            if found is MISSING:
                backend.forget_miss(key, version)
            return found
        table = current_table()
        if _is_bypassed(table):
            return self._bypassed()
        return self._judged(backend.get(key, version=version), table)

    async def alook(self, key: str, version: int | None = None) -> Any:
        """As :meth:`look`."""
        backend = self.backend
        if isinstance(backend, EpochCache):
            found = await backend.aget(key, MISSING, version)
            if found is MISSING:
                backend.forget_miss(key, version)
            return found
        table = current_table()
        if _is_bypassed(table):
            return self._bypassed()
        return self._judged(await backend.aget(key, version=version), table)

    def put(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """Store a value that was loaded after ``lease``; False where it may be stale already.

        Args:
            names: what it depends on beside its key.
            loaded_at: when the oldest part of it was loaded, where that was before the lease.
        """
        backend = self.backend
        if isinstance(backend, EpochCache):
            return backend.fill(key, value, lease, names, timeout, version, loaded_at)
        snapshot = self._settle(backend, key, lease, names, version, loaded_at)
        if snapshot is None:
            return False
        backend.set(key, wrap(Frozen(PLAIN, value), snapshot, None), timeout, version=version)
        return True

    async def aput(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """As :meth:`put`."""
        backend = self.backend
        if isinstance(backend, EpochCache):
            return await backend.afill(key, value, lease, names, timeout, version, loaded_at)
        snapshot = self._settle(backend, key, lease, names, version, loaded_at)
        if snapshot is None:
            return False
        await backend.aset(
            key, wrap(Frozen(PLAIN, value), snapshot, None), timeout, version=version
        )
        return True

    def _judged(self, stored: Any, table: EpochTable) -> Any:
        found = None if stored is None else unwrap(stored, table)
        if found is None:
            if stored is None:
                count(self.alias, "misses")
            else:
                count(self.alias, "stale", names_in(stored))
            return MISSING
        load = current_load()
        if load is not None:
            load.add(found.snapshot.names, found.snapshot.at)
        count(self.alias, "hits", found.snapshot.names)
        return found.value.thaw()

    def _bypassed(self) -> Any:
        count(self.alias, "bypassed")
        return MISSING

    def _settle(
        self,
        backend: BaseCache,
        key: str,
        lease: Lease,
        names: Iterable[str],
        version: int | None,
        loaded_at: int | None,
    ) -> Snapshot | None:
        own = key_name(self.alias, backend.make_key(key, version))
        names = (own, *dict.fromkeys(names))
        snapshot = current_table().settle(lease, names)
        count(self.alias, "refused" if snapshot is None else "fills", names)
        if snapshot is not None and loaded_at is not None:
            return snapshot._replace(at=min(loaded_at, snapshot.at))
        return snapshot


def name_of_key(alias: str, key: str, version: int | None = None) -> str:
    """The name of a key of a cache alias; raises InvalidCacheBackendError if there is none."""
    return _name_of(caches[alias], alias, key, version)


def _name_of(backend: Any, alias: str, key: str, version: int | None) -> str:
    space = backend.level.space if isinstance(backend, EpochCache) else alias
    return key_name(space, backend.make_key(key, version))


def _is_bypassed(table: EpochTable) -> bool:
    limit = conf.MAX_STALENESS
    return is_bypassed(table, float("inf") if limit is None else limit * NANOSECONDS)
