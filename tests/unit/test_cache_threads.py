"""Threads that meet in what caches share: nothing is lost, and nobody gets an exception."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from django_pgnotify.caching import cached
from django_pgnotify.caching.cached import cached_functions
from django_pgnotify.caching.leases import Load
from django_pgnotify.publishing.announcer import Announcer


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(*functions: Callable[[], object]) -> None:
    """Run each in a thread of its own; what one raises is raised."""
    raised: list[BaseException] = []
    together = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        together.wait()
        try:
            function()
        except BaseException as exc:  # noqa: BLE001
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_the_oldest_part_of_a_value_counts_whichever_thread_loads_it() -> None:
    # A loader that is async has parts in its loop's thread and in that of sync code.
    load, done = Load(), threading.Event()
    lost: list[int] = []

    def older_ones() -> None:
        for at in range(3000, 0, -1):
            load.add(("old",), at)
            if load.at != at:
                lost.append(at)
        done.set()

    def newer_ones() -> None:
        while not done.is_set():
            load.add(("new",), 3000)

    at_once(older_ones, newer_ones, newer_ones)
    assert lost == []
    assert load.at == 1


def test_an_announcer_that_is_closed_takes_what_another_thread_puts_meanwhile() -> None:
    announcer = Announcer()
    closed = threading.Event()

    def put() -> None:
        while not closed.is_set():
            announcer.put(())

    def close() -> None:
        try:
            for _ in range(300):
                announcer.close()
        finally:
            closed.set()

    at_once(put, put, put, close)
    announcer.close()


def test_cached_functions_can_be_listed_while_another_thread_defines_some() -> None:
    kept: list[object] = []
    all_defined = threading.Event()

    def define() -> None:
        try:
            kept.extend(cached(key="k")(lambda: None) for _ in range(500))
        finally:
            all_defined.set()

    def look() -> None:
        while not all_defined.is_set():
            cached_functions()

    at_once(define, look)
    assert {*kept} <= {*cached_functions()}


def test_a_cached_partial_can_be_listed_with_the_others() -> None:
    of_partial = cached(key="k")(functools.partial(lambda one: one, 1))
    assert of_partial in cached_functions()
    assert "partial" in of_partial.__name__
