"""Single flight: what a signal handler raises, at whatever moment, leaves nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import pytest

from django_pgnotify.caching import flights
from django_pgnotify.caching.level import MISSING


@pytest.fixture(autouse=True)
def _no_flights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flights, "in_transaction", lambda: False)
    yield
    flights._flights.clear()


def fly(load: Callable[[], Any]) -> Any:
    return flights.fly("k", lambda: MISSING, load)


def afly(load: Callable[[], Any]) -> Any:
    async def missing() -> Any:
        return MISSING

    async def aload() -> Any:
        return load()

    return asyncio.run(flights.afly("k", missing, aload))


both = pytest.mark.parametrize(("way", "of"), [("sync", fly), ("async", afly)])


class Interrupted(Exception):
    """As SoftTimeLimitExceeded."""


@both
def test_a_flight_that_is_interrupted_before_it_has_begun_is_forgotten(
    way: str, of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(rank: int) -> AbstractContextManager[None]:
        raise Interrupted

    monkeypatch.setattr(flights, "_flies", interrupt)
    with pytest.raises(Interrupted):
        of(lambda: 1)
    assert flights._flights == {}


@both
def test_a_flight_that_nobody_ends_is_waited_for_once(
    way: str, of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flights._flights[way, "k"] = Future()
    monkeypatch.setattr(flights, "TIMEOUT", 0.05)
    assert of(lambda: 1) == 1
    assert flights._flights == {}


@both
def test_whoever_waited_too_long_forgets_no_flight_but_that_one(
    way: str, of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Future[None](), Future[None]()

    def waits(timeout: float | None = None) -> None:
        flights._flights[way, "k"] = second
        raise TimeoutError

    flights._flights[way, "k"] = first
    if way == "sync":
        monkeypatch.setattr(first, "result", waits)
    else:
        monkeypatch.setattr(asyncio, "wrap_future", lambda future: waits())
    assert of(lambda: 1) == 1
    assert flights._flights == {(way, "k"): second}


@both
def test_a_flight_that_has_ended_and_is_still_noted_is_none(
    way: str, of: Callable[..., Any]
) -> None:
    ended = flights._flights[way, "k"] = Future()
    ended.set_result(None)
    seen: list[Any] = []
    of(lambda: seen.append(flights._flights[way, "k"]))
    assert seen != [ended]
    assert flights._flights == {}
