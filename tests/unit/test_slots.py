"""Slots: never more than there are, and handed on in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify.dispatching.slots import Slots

DEADLINE = 45.0
ROUNDS = 400


def noting(begun: list[int], number: int) -> Callable[[], None]:
    return lambda: begun.append(number)


def test_a_free_slot_is_had_at_once_and_no_more_than_there_are() -> None:
    slots, begun = Slots(3), list[int]()
    for number in range(5):
        slots.ask(noting(begun, number))
    assert begun == [0, 1, 2]
    assert slots.wanted()


def test_a_released_slot_goes_to_who_asked_first() -> None:
    slots, begun = Slots(1), list[int]()
    for number in range(4):
        slots.ask(noting(begun, number))
    for last in range(4):
        assert begun == list(range(last + 1))
        slots.release()
    assert begun == [0, 1, 2, 3]


def test_a_slot_that_nobody_waits_for_is_free_for_the_next_who_asks() -> None:
    slots, begun = Slots(1), list[int]()
    slots.ask(noting(begun, 0))
    slots.release()
    assert not slots.wanted()
    slots.ask(noting(begun, 1))
    slots.ask(noting(begun, 2))
    assert begun == [0, 1]


def test_somebody_waits_only_as_long_as_no_slot_is_free() -> None:
    slots = Slots(1)
    assert not slots.wanted()
    slots.ask(lambda: None)
    assert not slots.wanted()
    slots.ask(lambda: None)
    assert slots.wanted()
    slots.release()
    assert not slots.wanted()


def test_who_begins_may_ask_again_and_release_without_a_deadlock() -> None:
    """What begins is called without the lock."""
    slots, begun = Slots(1), list[str]()

    def second() -> None:
        begun.append("second")
        slots.ask(lambda: begun.append("third"))

    def first() -> None:
        begun.append("first")
        slots.ask(second)
        slots.release()

    thread = threading.Thread(target=slots.ask, args=(first,), daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert begun == ["first", "second"]
    slots.release()
    assert begun == ["first", "second", "third"]


@given(count=st.integers(1, 5), steps=st.lists(st.booleans(), max_size=60))
def test_whatever_is_asked_and_released_the_first_who_asked_have_begun(
    count: int, steps: list[bool]
) -> None:
    slots, begun = Slots(count), list[int]()
    asked = released = 0
    for ask in steps:
        if ask:
            slots.ask(noting(begun, asked))
            asked += 1
        elif released < len(begun):
            slots.release()
            released += 1
        running = min(count, asked - released)
        assert begun == list(range(released + running))
        assert slots.wanted() is (asked - released > count)


@pytest.mark.parametrize("count", [1, 3])
def test_never_more_than_there_are_run_at_once_whoever_asks_and_releases(count: int) -> None:
    slots = Slots(count)
    lock = threading.Lock()
    running = most = 0
    begun: SimpleQueue[bool] = SimpleQueue()

    def begin() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        begun.put(True)

    def ask() -> None:
        together.wait(DEADLINE)
        for _ in range(ROUNDS):
            slots.ask(begin)

    def finish() -> None:
        nonlocal running
        together.wait(DEADLINE)
        for _ in range(ROUNDS):
            begun.get(timeout=DEADLINE)
            with lock:
                running -= 1
            slots.release()

    together = threading.Barrier(10)
    threads = [threading.Thread(target=work) for work in [ask, finish] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert begun.empty()
    assert running == 0
    assert not slots.wanted()
    assert most == count


def test_every_slot_comes_back_after_a_crowd() -> None:
    slots = Slots(2)
    together = threading.Barrier(6)

    def asker() -> None:
        together.wait(DEADLINE)
        for _ in range(300):
            begun = threading.Event()
            slots.ask(begun.set)
            assert begun.wait(DEADLINE)
            slots.release()

    threads = [threading.Thread(target=asker, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    begun_at_last: list[int] = []
    for number in range(3):
        slots.ask(noting(begun_at_last, number))
    assert begun_at_last == [0, 1]
