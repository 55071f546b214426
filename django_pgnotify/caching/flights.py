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
    if rank >= _flying.get() or in_transaction() or _has_loop():
        return load()
    key = ("sync", key)
    mine: Future[None] = Future()
    try:
        other = _board(key, mine)
        if other is None:
            with _flies(rank):
                return load()
    finally:
        _land(key, mine)
    try:
        other.result(TIMEOUT)
    except TimeoutError:
        _forget(key, other)
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
    if rank >= _flying.get():
        return await load()
    key = ("async", key)
    mine: Future[None] = Future()
    try:
        other = _board(key, mine)
        if other is None:
            with _flies(rank):
                return await load()
    finally:
        _land(key, mine)
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.shield(asyncio.wrap_future(other))
    except TimeoutError:
        _forget(key, other)
        return await load()
    found = await look()
    return await load() if found is MISSING else found


def _board(key: Hashable, mine: Future[None]) -> Future[None] | None:
    """Somebody else's flight with this key; where there is none, ours is noted."""
    with _guard:
        other = _flights.get(key)
        if other is None or other.done():
            _flights[key] = mine
            return None
        return other


def _land(key: Hashable, mine: Future[None]) -> None:
    # In this order: what a signal handler raises in between must not leave a flight in the air.
    mine.set_result(None)
    _forget(key, mine)


def _forget(key: Hashable, flight: Future[None]) -> None:
    """Let nobody wait for it any more."""
    with _guard:
        if _flights.get(key) is flight:
            del _flights[key]


@contextmanager
def _flies(rank: int) -> Iterator[None]:
    token = _flying.set(rank)
    try:
        yield
    finally:
        _flying.reset(token)


def _has_loop() -> bool:
    return asyncio._get_running_loop() is not None


def _forked() -> None:
    global _guard
    _guard = threading.Lock()
    _flights.clear()  # those who lead them are not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
