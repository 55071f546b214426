"""The ways of reading a cached row: near caches, ``cached`` on stock caches, and naive ones.

Each gives the stamp of a row, from a cache or from the database. The loaders take their time now
and then, so that changes fall between what they read and what becomes of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache as memoized
from typing import Any

from django.conf import settings
from django.core.cache import caches

from django_pgnotify.caching import NearCache, cached, get_or_set, model_tag
from tests.faults.caches.models import (
    Item,
    Tight,
    astamp_of,
    model_of,
    pk_of,
    row_of,
    stamp_of,
)
from tests.faults.caches.records import LOADED, Read
from tests.faults.caches.settings import NAIVE

SLOW = 0.2
"""Share of the loads that dawdle."""
LONGEST_DAWDLE = 0.02

_loads: ContextVar[list[int] | None] = ContextVar("loads", default=None)


@dataclass(frozen=True)
class Way:
    name: str
    read: Callable[[int], int]
    aread: Callable[[int], Awaitable[int]] | None = None
    sees_own_changes: bool = True
    """Whether a transaction reads what it has written itself."""


def row_tag(row: int) -> str:
    """The one that each change of a row bumps."""
    return model_tag(model_of(row), pk_of(row))


def declared_tag(row: int) -> str:
    """The one that ``invalidates`` declares, below."""
    return f"{name_of(row)}:{pk_of(row)}"


def name_of(row: int) -> str:
    return str(model_of(row)._meta.model_name)


def load(row: int) -> int:
    _note_load()
    stamp = stamp_of(row)
    if random.random() < SLOW:
        time.sleep(random.uniform(0.0, LONGEST_DAWDLE))
    return stamp


async def aload(row: int) -> int:
    _note_load()
    stamp = await astamp_of(row)
    if random.random() < SLOW:
        await asyncio.sleep(random.uniform(0.0, LONGEST_DAWDLE))
    return stamp


def _note_load() -> None:
    loads = _loads.get()
    if loads is not None:
        loads.append(1)


def timed(way: Way, number: int, row: int) -> Read:
    """Read, and note when, and whether a cache had it."""
    loads: list[int] = []
    _loads.set(loads)
    begun = time.monotonic_ns()
    stamp = way.read(row)
    ended = time.monotonic_ns()
    return Read(begun, ended, stamp, row, number, LOADED if loads else 0)


async def atimed(way: Way, number: int, row: int) -> Read:
    assert way.aread is not None
    loads: list[int] = []
    _loads.set(loads)
    begun = time.monotonic_ns()
    stamp = await way.aread(row)
    ended = time.monotonic_ns()
    return Read(begun, ended, stamp, row, number, LOADED if loads else 0)


# -- near caches, and cached() on any --------------------------------------------------------------


def _functions(name: str, alias: str, **dependencies: Any) -> Way:
    """A function with ``cached``, and its async twin, which share their entries."""
    key = f"{name.replace(' ', '-')}:{{model}}:{{pk}}"

    @cached(key=key, timeout=None, cache=alias, **dependencies)
    def look_up(model: str, pk: int) -> int:
        return load(row_of(model, pk))

    @cached(key=key, timeout=None, cache=alias, **dependencies)
    async def alook_up(model: str, pk: int) -> int:
        return await aload(row_of(model, pk))

    return Way(
        name,
        lambda row: look_up(name_of(row), pk_of(row)),
        lambda row: alook_up(name_of(row), pk_of(row)),
    )


def _idiom(name: str, alias: str) -> Way:
    """get(), and where there is nothing, load and set()."""

    def look_up(row: int) -> int:
        cache, key = _near(alias), f"idiom:{row}"
        stamp = cache.get(key)
        if stamp is None:
            stamp = load(row)
            cache.set(key, stamp, tags=[row_tag(row)])
        return int(stamp)

    async def alook_up(row: int) -> int:
        cache, key = _near(alias), f"idiom:{row}"
        stamp = await cache.aget(key)
        if stamp is None:
            stamp = await aload(row)
            await cache.aset(key, stamp, tags=[row_tag(row)])
        return int(stamp)

    return Way(name, look_up, alook_up, sees_own_changes=False)


def _many(name: str, alias: str) -> Way:
    """The same by get_many() and set_many()."""

    def look_up(row: int) -> int:
        cache, key = _near(alias), f"many:{row}"
        found = cache.get_many([key, f"{key}:never"])
        if key not in found:
            found = {key: load(row)}
            cache.set_many(found, tags=[row_tag(row)])
        return int(found[key])

    return Way(name, look_up, sees_own_changes=False)


def _nested(name: str, alias: str) -> Way:
    """A cached function that says of nothing what it depends on, and calls one that does."""
    inner = _functions(f"{name}, inner", alias, tags=ROW)

    @cached(key="outer:{row}", timeout=None, cache=alias)
    def look_up(row: int) -> dict[str, int]:
        _note_load()
        return {"stamp": inner.read(row)}

    return Way(name, lambda row: look_up(row)["stamp"])


def _near(alias: str) -> NearCache:
    cache = caches[alias]
    assert isinstance(cache, NearCache)
    return cache


def _by_function(name: str, alias: str) -> Way:
    """The function get_or_set()."""

    def look_up(row: int) -> int:
        return int(get_or_set(f"given:{row}", lambda: load(row), tags=[row_tag(row)], cache=alias))

    return Way(name, look_up)


# -- naive -----------------------------------------------------------------------------------------


def _naive(name: str, alias: str) -> Way:
    """What one writes first: get, load, set, and keys that are deleted on a change."""

    def look_up(row: int) -> int:
        cache, key = caches[alias], f"naive:{declared_tag(row)}"
        stamp = cache.get(key)
        if stamp is None:
            stamp = load(row)
            cache.set(key, stamp)
        return int(stamp)

    return Way(name, look_up, sees_own_changes=False)


# -- which there are -------------------------------------------------------------------------------

ROW = ["model:caches.{model}:{pk}"]
DECLARED = ["{model}:{pk}"]


@memoized
def ways() -> list[Way]:
    """All of them, in an order that every process of a check has."""
    if NAIVE:
        return [_naive("naive LocMemCache", "naive"), _naive("naive file", "file")]
    found = [
        _functions("near, cached, tag of the row", "near", tags=ROW),
        _functions("near, cached, declared tag", "near", tags=DECLARED),
        _functions("near, cached, depends on models", "near", depends_on=[Item, Tight]),
        _idiom("near, get/load/set", "near"),
        _by_function("near, get_or_set()", "near"),
        _nested("near, cached in cached", "near"),
        _functions("near over database, cached", "near-database", tags=ROW),
        _idiom("near over database, get/load/set", "near-database"),
        _many("near over database, get_many", "near-database"),
        _functions("file, cached", "file", tags=DECLARED),
        _by_function("file, get_or_set()", "file"),
        _functions("database, cached", "database", tags=ROW),
        _functions("LocMemCache, cached", "local", tags=DECLARED),
    ]
    if "redis" in settings.CACHES:
        found += [
            _functions("near over Redis, cached", "near-redis", tags=DECLARED),
            _functions("Redis, cached", "redis", tags=ROW),
        ]
    return found
