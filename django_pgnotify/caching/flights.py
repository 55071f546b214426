"""Single flight: of those in a process who miss a key at once, one loads and the others wait.

Whoever waited looks again and does not take the loader's result: that may have been read before a
change which the one who waited has seen. And nobody waits for ever, or in a circle: who makes a
page waits for values only, who loads a value loads all in it too, and so does who is in a
transaction, whose locks the other may wait for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .level import MISSING
from .transactions import in_transaction

TIMEOUT = 60.0
"""Seconds to wait for somebody else's load."""

_flights: dict[Hashable, Future[None]] = {}
_guard = threading.Lock()

VALUE, PAGE, NOTHING = range(3)
_flying: ContextVar[int] = ContextVar("pgnotify_flying", default=NOTHING)
"""What this context makes for others; only for what ranks below it does it wait."""


def fly(
    key: Hashable, look: Callable[[], Any], load: Callable[[], Any], *, rank: int = VALUE
) -> Any:
    """What ``load`` returns, or what ``look`` finds once somebody else has loaded."""
    # A loop's thread must not be held up, least of all by a task of that loop.
    may_wait = rank < _flying.get() and not in_transaction() and not _has_loop()
    other = None
    if may_wait:
        with _guard:
            other = _flights.get(("sync", key))
            if other is None:
                mine = _flights["sync", key] = Future()
    if not may_wait:
        return load()
    if other is None:
        with _lead(("sync", key), mine, rank):
            return load()
    try:
        other.result(TIMEOUT)
    except TimeoutError:
        return load()
    found = look()
    return load() if found is MISSING else found


async def afly(
    key: Hashable,
    look: Callable[[], Awaitable[Any]],
    load: Callable[[], Awaitable[Any]],
    *,
    rank: int = VALUE,
) -> Any:
    """As :func:`fly`. Tasks wait for tasks only: a thread might wait for their loop."""
    other = None
    if rank >= _flying.get():
        return await load()
    with _guard:
        other = _flights.get(("async", key))
        if other is None:
            mine = _flights["async", key] = Future()
    if other is None:
        with _lead(("async", key), mine, rank):
            return await load()
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.shield(asyncio.wrap_future(other))
    except TimeoutError:
        return await load()
    found = await look()
    return await load() if found is MISSING else found


@contextmanager
def _lead(key: Hashable, flight: Future[None], rank: int) -> Iterator[None]:
    token = _flying.set(rank)
    try:
        yield
    finally:
        _flying.reset(token)
        with _guard:
            _flights.pop(key, None)
        flight.set_result(None)


def _has_loop() -> bool:
    return asyncio._get_running_loop() is not None


def _forked() -> None:
    global _guard
    _guard = threading.Lock()
    _flights.clear()  # those who lead them are not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
