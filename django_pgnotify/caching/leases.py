"""Leases of misses, and what a value that is being loaded depends on, by context.

A context is that of a thread or an asyncio task: a task inherits what was there when it began, and
what it adds stays its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ..epochs.clock import node_clock
from ..epochs.table import Lease

APART = 32
"""Misses, the latest ones, whose moments a context keeps apart."""

TOGETHER = 1000
"""Keys that may share a lease. Older misses do: of their moments the first one holds for all."""

MOST = 128
"""Leases that a context keeps. Older ones are of misses that nobody filled."""

FILL_WITHIN = 60_000_000_000
"""Nanoseconds after a miss within which ``set`` of its key is taken for the fill."""

FORGET_AFTER = 10 * FILL_WITHIN
"""Nanoseconds after which a miss that is none of the latest is one that nobody filled."""


class MissLease(NamedTuple):
    """That keys were looked for and not found."""

    space: str
    keys: frozenset[str]
    lease: Lease
    missed_at: int
    """Reading of ``node_clock``."""

    @property
    def is_recent(self) -> bool:
        return node_clock() - self.missed_at <= FILL_WITHIN


# Never changed in place: a task would change it for all that have begun where it did.
_missed: ContextVar[tuple[MissLease, ...]] = ContextVar("pgnotify_missed", default=())


def leave(space: str, keys: Iterable[str], lease: Lease) -> None:
    """Remember misses for the ``set`` of each that may follow in this context."""
    keys, now = tuple(keys), node_clock()
    before = _missed.get()
    missed = before + tuple(
        MissLease(space, frozenset(keys[start : start + TOGETHER]), lease, now)
        for start in range(0, len(keys), TOGETHER)
    )
    if len(missed) // APART > len(before) // APART:
        missed = _packed(missed)
    _missed.set(missed)


def _packed(missed: tuple[MissLease, ...]) -> tuple[MissLease, ...]:
    """The same with fewer leases: older ones of a cache share the first one's.

    An older lease refuses more than the own one would have, and never less.
    """
    packed: list[MissLease] = []
    places: dict[str, int] = {}
    now = node_clock()
    for one in missed[:-APART]:
        if now - one.missed_at > FORGET_AFTER:
            continue
        place = places.get(one.space)
        if place is not None and _may_share(packed[place], one):
            packed[place] = packed[place]._replace(keys=packed[place].keys | one.keys)
        else:
            places[one.space] = len(packed)
            packed.append(one)
    return (*packed, *missed[-APART:])[-MOST:]


def _may_share(older: MissLease, one: MissLease) -> bool:
    return (
        len(older.keys) + len(one.keys) <= TOGETHER
        and one.missed_at - older.missed_at <= FILL_WITHIN
    )


def take(space: str, key: str) -> MissLease | None:
    """The lease of the latest miss of a key that was not filled yet, which is used up by it."""
    return take_many(space, (key,)).get(key)


def take_many(space: str, keys: Iterable[str]) -> dict[str, MissLease]:
    """As :func:`take`, by key, for those that there are."""
    wanted, taken = set(keys), {}
    missed = list(_missed.get())
    left: list[MissLease] = []
    while missed and wanted:
        one = missed.pop()
        found = one.keys & wanted if one.space == space else ()
        if found:
            taken.update(dict.fromkeys(found, one))
            wanted.difference_update(found)
        _keep(left, one, found)
    if taken:
        _missed.set((*missed, *reversed(left)))
    return taken


def has(space: str, key: str) -> bool:
    """Whether this context has a lease of a key."""
    return any(key in one.keys and one.space == space for one in _missed.get())


def forget(space: str, keys: Iterable[str] | None = None) -> None:
    """This context has changed these keys itself, or all: what it sets next is no fill."""
    missed = _missed.get()
    if missed:
        gone = None if keys is None else frozenset(keys)
        left: list[MissLease] = []
        for one in missed:
            if one.space != space:
                left.append(one)
            elif gone is not None:
                _keep(left, one, one.keys & gone)
        _missed.set(tuple(left))


def _keep(left: list[MissLease], one: MissLease, used_up: Collection[str]) -> None:
    """Add to ``left`` what is left of a lease."""
    if not used_up:
        left.append(one)
    elif len(used_up) < len(one.keys):
        left.append(one._replace(keys=one.keys.difference(used_up)))


class Load:
    """What a value that is being loaded turns out to depend on."""

    __slots__ = ("_moments", "names")

    def __init__(self) -> None:
        self.names: set[str] = set()
        # All of them: of two threads that compare and store, one would cover up the older moment.
        self._moments: set[int] = set()

    @property
    def at(self) -> int | None:
        """When the oldest value in it was loaded, in microseconds since 1970."""
        return min(self._moments, default=None)

    def add(self, names: Iterable[str], at: int) -> None:
        """A value that depends on ``names`` and was loaded at ``at`` has gone into it."""
        self.names.update(names)
        self._moments.add(at)


_loading: ContextVar[Load | None] = ContextVar("pgnotify_loading", default=None)

current_load = _loading.get
"""The load that this context is part of, None where it is part of none."""


@contextmanager
def loading(load: Load | None = None) -> Iterator[Load]:
    """Gather what is read from caches inside, for the value that is made of it."""
    load = Load() if load is None else load
    token = _loading.set(load)
    try:
        yield load
    finally:
        _loading.reset(token)
