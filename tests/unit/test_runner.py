"""What a worker does of its own, without a listener."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from typing import Any

import pytest

from django_pgnotify import Event
from django_pgnotify.dispatching.dispatcher import Dispatcher, Route
from django_pgnotify.dispatching.lane import Lane
from django_pgnotify.dispatching.runner import Runner
from django_pgnotify.registry import Receiver, Subscription
from django_pgnotify.stats import Stats
from tests.unit.test_lane import PLENTY, event

DEADLINE = 45.0


async def test_a_failure_is_told_though_a_shutdown_has_just_cut_its_event_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``Lane.clear`` reads how many have been handled, and the worker goes on before it cuts."""

    def fail_when_cut(one: Event) -> None:
        if one.data == 2:
            [batch] = lane._in_hand
            del batch.events[1:]
            raise ValueError("as asked")

    lane = Lane(Receiver("uid", fail_when_cut, ("jobs",)), PLENTY, PLENTY)
    lane.put([event(0), event(1), event(2)])
    assert lane.hire() == 1
    stats = Stats()
    assert Runner(1, stats, lambda lane: None)._handle(lane, None) == "empty"
    assert (stats["handled"], stats["failed"]) == (2, 1)
    assert "failed on event 2 " in caplog.text
    assert lane.idle


async def test_what_was_dropped_is_told_as_a_gap_before_all_is_settled() -> None:
    """The last worker may have gone, and the loop not know yet."""
    heard: list[str] = []
    ended, release = threading.Event(), threading.Event()

    def slow(one: Event) -> None:
        release.wait(DEADLINE)
        heard.append(one.action)

    route = Route(
        Receiver("uid", slow, ("jobs",), every_node=True, on_gap=True), (Subscription("jobs"),)
    )
    dispatcher = Dispatcher([route], concurrency=1, max_waiting=1, max_bytes=PLENTY, stats=Stats())

    def tell(lane: Lane) -> None:
        dispatcher._worker_ended(lane)
        ended.set()

    dispatcher._runner._ended = tell
    for number in range(4):
        dispatcher.dispatch([event(number)])
    release.set()
    assert ended.wait(DEADLINE)  # the loop stands still meanwhile
    assert await dispatcher.drain(DEADLINE)
    assert heard[-1] == "gap"


@pytest.mark.parametrize("concurrency", [1, 2, 6])
async def test_whatever_the_threads_do_all_is_settled_and_every_event_accounted_for(
    concurrency: int,
) -> None:
    chance = random.Random(concurrency)
    heard: list[Event] = []
    dispatched = 0

    async def on_loop(one: Event) -> None:
        pass

    def picky(one: Event) -> None:
        if one.data % 3 == 0:
            raise ValueError("as asked")

    options: list[tuple[Any, int]] = [(heard.append, 1), (heard.append, 4), (picky, 2)]
    routes = [
        Route(
            Receiver(
                f"{number}",
                func,
                ("jobs",),
                every_node=True,
                concurrency=several,
                on_gap=number < 2,
            ),
            (Subscription("jobs"),),
        )
        for number, (func, several) in enumerate([*options, (on_loop, 3)])
    ]
    stats = Stats()
    dispatcher = Dispatcher(
        routes, concurrency=concurrency, max_waiting=5, max_bytes=PLENTY, stats=stats
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(500):
            for _ in range(chance.randint(1, 4)):
                keys = [chance.choice([None, "k", "l"]) for _ in range(chance.randint(1, 20))]
                dispatcher.dispatch([event(number, key) for number, key in enumerate(keys)])
                dispatched += len(keys)
            async with asyncio.timeout(DEADLINE):
                await dispatcher.settled()
            assert dispatcher.waiting == dispatcher.running == 0
            assert not dispatcher._overflowing
    finally:
        sys.setswitchinterval(interval)
    assert await dispatcher.drain(DEADLINE)
    gaps = sum(one.action == "gap" for one in heard)
    assert stats["handled"] + stats["failed"] + stats["dropped"] == 4 * dispatched + gaps
