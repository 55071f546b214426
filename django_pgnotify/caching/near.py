"""``NearCache``: a Django cache in the memory of the process, checked at every hit.

Its sync half is ``near_sync``. The async half does the same beside it: what is near is in memory
and done at once, and only the second level is awaited.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from asgiref.sync import sync_to_async
from django.core.cache.backends.base import DEFAULT_TIMEOUT

from ..epochs.table import Lease, Snapshot
from .frozen import Frozen, afreeze
from .level import MISSING
from .loading import Place, aload
from .near_sync import SyncNear, names_of_tags
from .shelf import Shelf
from .stored import REPLACE_WITHIN, replacing, wrap


class NearCache(SyncNear):
    """A cache backend: ``"BACKEND": "django_pgnotify.caching.NearCache"``.

    ``LOCATION`` names the store, as with LocMemCache: aliases with the same one share entries.
    OPTIONS, beside ``MAX_ENTRIES`` (default 10,000) and ``CULL_FREQUENCY``:

    ``SECOND_LEVEL``
        alias of a cache that is asked on a miss. Default: none. Other nodes take from there what
        was filled (``get_or_set``, ``cached``, ``set`` after a miss) or added. What was set
        otherwise, or made by ``incr`` or ``touch``, is a miss to them once they have heard of it.
    ``MAX_STALENESS``
        seconds without a heartbeat of the listener after which nothing is taken from the cache;
        None for never. Default: ``PGNOTIFY_MAX_STALENESS``.
    ``JITTER``
        up to this fraction of a timeout is taken off it at random, so that what was stored
        together does not expire together. Default: 0.
    """

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        full = self.make_key(key, version)
        found = self._look(full)
        second = self.second_level if found is MISSING else None
        if second is not None and not self.level.is_bypassed:
            found = self.level.promote(full, await second.aget(self.level.second_key(full)))
        return default if found is MISSING else found

    async def aget_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        found, missed = self._look_for_many(keys, version)
        second = self.second_level if missed else None
        if second is not None and not self.level.is_bypassed:
            stored = await second.aget_many(list(map(self.level.second_key, missed)))
            found |= self._promote_many(missed, stored)
        return found

    async def ahas_key(self, key: Any, version: int | None = None) -> bool:
        return await self.aget(key, MISSING, version) is not MISSING

    async def aset(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> None:
        full, frozen = self.make_and_validate_key(key, version), await afreeze(value)
        seconds, extra = self._seconds(timeout), names_of_tags(tags)
        miss = self.level.take_miss(full, seconds)
        if not await self._afill_in_transaction(full, frozen, seconds, extra, miss):
            snapshot = self.level.set(full, frozen, seconds, extra, miss)
            await self._awrite(full, frozen, seconds, snapshot)

    async def _afill_in_transaction(self, *fill: Any) -> bool:
        # A transaction around async code is that of the thread which runs sync code.
        *_, miss = fill
        return miss is not None and await sync_to_async(self._fill_in_transaction)(*fill)

    async def _awrite(
        self, full: str, value: Frozen, seconds: float | None, snapshot: Snapshot | None
    ) -> None:
        second = self.second_level
        if second is not None and snapshot is not None:
            stored = wrap(value, snapshot, seconds)
            await second.aset(self.level.second_key(full), stored, seconds)

    async def aset_many(
        self,
        data: Mapping[Any, Any],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> list[Any]:
        frozen = {key: await afreeze(value) for key, value in data.items()}
        if any(self.level.has_miss(self.make_key(key, version)) for key in frozen):
            many = sync_to_async(self._set_many_near)  # as for aset()
            seconds, wrapped = await many(frozen, timeout, version, tags)
        else:
            seconds, wrapped = self._set_many_near(frozen, timeout, version, tags)
        second = self.second_level if wrapped else None
        if second is not None:
            await second.aset_many(wrapped, seconds)
        return []

    async def aadd(
        self,
        key: Any,
        value: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> bool:
        full, frozen = self.make_and_validate_key(key, version), await afreeze(value)
        seconds, second, extra = self._seconds(timeout), self.second_level, names_of_tags(tags)
        if second is None:
            if self.level.has_miss(full):
                return await sync_to_async(self._add_near)(full, frozen, seconds, extra)
            return self._add_near(full, frozen, seconds, extra)
        lease = self.level.lease()
        if self.level.entry(full) is not None:
            return False
        key_there = self.level.second_key(full)
        there = await second.aget(key_there)
        if self.level.promote(full, there, used_up=False) is not MISSING:
            return False
        miss = self.level.take_miss(full, seconds)
        if await self._afill_in_transaction(full, frozen, seconds, extra, miss):
            return True
        snapshot = self.level.settle(full, extra, lease if miss is None else miss.lease)
        if snapshot is None:
            return False
        stored = wrap(frozen, snapshot, seconds)
        if there is None:
            added = await second.aadd(key_there, stored, seconds)
        else:
            added = await second.aadd(replacing(key_there, there), 1, REPLACE_WITHIN)
            if added:
                await second.aset(key_there, stored, seconds)
        if added:
            self.level.keep(full, frozen, seconds, snapshot)
        return added

    async def atouch(
        self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        full = self.make_and_validate_key(key, version)
        if await self.aget(key, MISSING, version) is MISSING:
            return False
        frozen, seconds, snapshot = self._touch_near(full, self._seconds(timeout))
        await self._awrite(full, frozen, seconds, snapshot)
        return True

    async def aincr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        full = self.make_and_validate_key(key, version)
        if self.second_level is not None:
            await self.aget(key, MISSING, version)
        value, frozen, seconds, snapshot = self._incr_near(full, key, delta)
        await self._awrite(full, frozen, seconds, snapshot)
        return value

    async def adecr(self, key: Any, delta: int = 1, version: int | None = None) -> Any:
        return await self.aincr(key, -delta, version)

    async def adelete(self, key: Any, version: int | None = None) -> bool:
        full = self.make_and_validate_key(key, version)
        had, second = self.level.change([full]), self.second_level
        return (second is not None and await second.adelete(self.level.second_key(full))) or had

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        fulls = [self.make_and_validate_key(key, version) for key in keys]
        second = self.second_level
        if fulls:
            self.level.change(fulls)
            if second is not None:
                await second.adelete_many(list(map(self.level.second_key, fulls)))

    async def aclear(self) -> None:
        self.level.clear()

    async def aget_or_set(
        self,
        key: Any,
        default: Any,
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        *,
        tags: Iterable[str] = (),
    ) -> Any:
        """As :meth:`get_or_set`; ``default`` may be async."""

        async def loader() -> Any:
            value = default() if callable(default) else default
            return await value if inspect.isawaitable(value) else value

        place = Place(Shelf("", self), key, version, timeout, names_of_tags(tags))
        return await aload(place, loader)

    async def afill(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """As :meth:`fill`."""
        full, seconds = self.make_and_validate_key(key, version), self._seconds(timeout)
        frozen = await afreeze(value)
        snapshot = self.level.fill(full, frozen, seconds, tuple(names), lease, loaded_at)
        await self._awrite(full, frozen, seconds, snapshot)
        return snapshot is not None
