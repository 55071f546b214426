"""Leases of misses, and what a value that is being loaded depends on, by context.

A context is that of a thread or an asyncio task: a task inherits what was there when it began, and
what it adds stays its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ..epochs.clock import node_clock
from ..epochs.table import Lease

MOST = 32
"""Leases that a context keeps. Older ones are of misses that nobody filled."""

FILL_WITHIN = 60_000_000_000
"""Nanoseconds after a miss within which ``set`` of its key is taken for the fill."""


class MissLease(NamedTuple):
    """That a key was looked for and not found."""

    space: str
    key: str
    lease: Lease
    missed_at: int
    """Reading of ``node_clock``."""

    @property
    def is_recent(self) -> bool:
        return node_clock() - self.missed_at <= FILL_WITHIN


# Never changed in place: a task would change it for all that have begun where it did.
_missed: ContextVar[tuple[MissLease, ...]] = ContextVar("pgnotify_missed", default=())


def leave(space: str, key: str, lease: Lease) -> None:
    """Remember a miss for the ``set`` that may follow in this context."""
    _missed.set((*_missed.get()[1 - MOST :], MissLease(space, key, lease, node_clock())))


def take(space: str, key: str) -> MissLease | None:
    """The lease of the latest miss of a key that was not filled yet, which is used up by it."""
    missed = _missed.get()
    for place in range(len(missed) - 1, -1, -1):
        one = missed[place]
        if one.key == key and one.space == space:
            _missed.set(missed[:place] + missed[place + 1 :])
            return one
    return None


def has(space: str, key: str) -> bool:
    """Whether this context has a lease of a key."""
    return any(one.key == key and one.space == space for one in _missed.get())


def forget(space: str, keys: Iterable[str] | None = None) -> None:
    """This context has changed these keys itself, or all: what it sets next is no fill."""
    missed = _missed.get()
    if missed:
        gone = None if keys is None else frozenset(keys)
        _missed.set(
            tuple(
                one
                for one in missed
                if one.space != space or (gone is not None and one.key not in gone)
            )
        )


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
