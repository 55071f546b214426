"""The leases of misses that a context keeps: none is lost that somebody may still fill."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from django_pgnotify.caching import leases
from django_pgnotify.caching.leases import MissLease
from django_pgnotify.epochs.table import Lease


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading a nanosecond after the one before."""
    monkeypatch.setattr(leases, "node_clock", count().__next__)


@pytest.fixture(autouse=True)
def _context() -> Iterator[None]:
    token = leases._missed.set(())
    yield
    leases._missed.reset(token)


def moment(number: int) -> Lease:
    return Lease(1, 1, number, number)


def miss(*keys: str, at: int = 0, space: str = "s") -> None:
    leases.leave(space, keys, moment(at))


def taken(key: str, space: str = "s") -> int | None:
    """The moment of the lease of a key."""
    found = leases.take(space, key)
    return None if found is None else found.lease.latest


def kept() -> tuple[MissLease, ...]:
    return leases._missed.get()


def test_the_lease_of_a_key_is_used_up_by_its_fill() -> None:
    miss("a", "b", at=1)
    assert leases.has("s", "a")
    assert taken("a", "other space") is None
    assert taken("a") == 1
    assert taken("a") is None
    assert not leases.has("s", "a")
    assert taken("b") == 1
    assert kept() == ()


def test_the_latest_miss_is_filled_first() -> None:
    miss("a", "b", at=1)
    miss("a", at=2)
    assert [taken("a"), taken("a"), taken("a")] == [2, 1, None]
    assert taken("b") == 1


def test_several_keys_are_taken_at_once() -> None:
    miss("a", "b", at=1)
    miss("a", "c", at=2)
    found = leases.take_many("s", ["a", "b", "never"])
    assert {key: one.lease.latest for key, one in found.items()} == {"a": 2, "b": 1}
    assert [taken("a"), taken("b"), taken("c")] == [1, None, 2]


@pytest.mark.parametrize("keys", [5_000, 50_000])
def test_all_misses_of_one_look_up_have_its_lease(keys: int) -> None:
    miss(*map(str, range(keys)), at=1)
    assert taken("0") == taken(str(keys - 1)) == 1
    assert len(leases.take_many("s", map(str, range(keys)))) == keys - 2


def test_a_miss_has_a_lease_however_many_come_behind_it_and_never_a_later_one() -> None:
    many = 20_000
    for number in range(many):
        miss(str(number), at=number)
    assert len(kept()) < leases.MOST
    found = {number: taken(str(number)) for number in range(many)}
    assert all(lease is not None and lease <= number for number, lease in found.items())
    latest = range(many - leases.APART, many)
    assert [found[number] for number in latest] == list(latest)


def test_a_context_does_not_keep_more_than_it_may() -> None:
    for number in range(2 * leases.MOST):
        miss(*(f"{number}:{key}" for key in range(leases.TOGETHER)), at=number)
    assert len(kept()) < leases.MOST + leases.APART
    assert taken("0:0") is None
    assert taken(f"{2 * leases.MOST - 1}:0") is not None


def test_misses_of_several_caches_do_not_share_a_lease_and_each_has_room() -> None:
    many = 10 * leases.MOST
    for number in range(many):
        miss(str(number), at=number, space=f"s{number % 2}")
    assert taken("0", "s1") is None
    found = [taken(str(number), f"s{number % 2}") for number in range(many)]
    assert found[:4] == [0, 1, 0, 1]
    assert None not in found


def test_a_miss_that_nobody_fills_is_forgotten_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    miss("a", at=1)
    clock = count(leases.FORGET_AFTER + leases.FILL_WITHIN)
    monkeypatch.setattr(leases, "node_clock", clock.__next__)
    for number in range(leases.APART - 1):
        miss(str(number), at=2)
    assert leases.has("s", "a"), "the latest ones stay"
    for number in range(leases.APART):
        miss(str(number), at=3)
    assert not leases.has("s", "a")


def test_misses_that_share_a_lease_are_no_more_than_a_minute_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one that is young would be forgotten with an old one."""
    readings = count(0, leases.FILL_WITHIN // 10)
    monkeypatch.setattr(leases, "node_clock", readings.__next__)
    for number in range(3 * leases.APART):
        miss(str(number), at=number)
    for number in range(2 * leases.APART, 3 * leases.APART):
        assert taken(str(number)) == number
    assert all(len(one.keys) <= 12 for one in kept())


@pytest.mark.parametrize(
    ("forget", "left"),
    [
        (lambda: leases.forget("s", ["a", "c"]), ["b", "d"]),
        (lambda: leases.forget("s"), ["d"]),
        (lambda: leases.forget("t", ["a"]), ["a", "b", "c", "d"]),
    ],
)
def test_what_the_context_has_changed_itself_is_forgotten(
    forget: Callable[[], Any], left: list[str]
) -> None:
    miss("a", "b")
    miss("c")
    miss("d", space="t")
    forget()
    assert [
        key
        for key, space in (("a", "s"), ("b", "s"), ("c", "s"), ("d", "t"))
        if leases.has(space, key)
    ] == left


def test_what_a_task_uses_up_its_siblings_still_have() -> None:
    miss("a", "b", at=1)
    sibling = contextvars.copy_context()
    assert taken("a") == 1
    assert sibling.run(taken, "a") == 1
    assert sibling.run(taken, "a") is None
    assert taken("b") == 1
