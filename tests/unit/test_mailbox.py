"""One channel's mailbox: order, capacity, expiry, and no message lost whoever stops waiting."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from django_pgnotify.layers import mailbox as module
from django_pgnotify.layers.mailbox import Body, Mailbox

DEADLINE = 10.0


class Clock:
    """Stands in for ``time``, and moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def now() -> float:
    """The time of the module, which a test may have stopped."""
    clock: Clock = vars(module)["time"]
    return clock.monotonic()


def put(mailbox: Mailbox, message: bytes, expiry: float = 60) -> bool:
    """Add a message that is worth reading for so many seconds."""
    return mailbox.put((now() + expiry, message))


async def get(mailbox: Mailbox) -> Body:
    """Receive, as the owner of a mailbox does."""
    mailbox.readers += 1
    try:
        while (body := mailbox.pop()) is None:
            waiter = mailbox.waiter()
            try:
                await waiter
            except BaseException:
                mailbox.pass_on(waiter)
                raise
        return body
    finally:
        mailbox.readers -= 1


def box(*messages: bytes, capacity: int = 10, expiry: float = 60) -> Mailbox:
    mailbox = Mailbox(capacity)
    for message in messages:
        assert put(mailbox, message, expiry)
    return mailbox


async def reader(mailbox: Mailbox) -> asyncio.Task[Body]:
    """A task that waits for a message; returned once it does."""
    task = asyncio.create_task(get(mailbox), name="reader")
    await asyncio.sleep(0)  # its first step, up to where it waits
    assert not task.done()
    return task


async def soon(task: asyncio.Task[Body]) -> Body:
    async with asyncio.timeout(DEADLINE):
        return await task


async def test_messages_come_out_in_the_order_they_went_in() -> None:
    mailbox = box(b"1", b"2", b"3")
    assert [await get(mailbox) for _ in range(3)] == [b"1", b"2", b"3"]


async def test_a_full_mailbox_refuses_and_keeps_what_it_has() -> None:
    mailbox = box(b"1", b"2", capacity=2)
    assert not put(mailbox, b"3", 60)
    assert [await get(mailbox), await get(mailbox)] == [b"1", b"2"]
    assert put(mailbox, b"4", 60)
    assert await get(mailbox) == b"4"


async def test_a_reader_that_waits_gets_the_next_message() -> None:
    mailbox = box()
    task = await reader(mailbox)
    put(mailbox, b"1", 60)
    assert await soon(task) == b"1"


async def test_readers_that_wait_are_served_each_with_one_message() -> None:
    mailbox = box()
    tasks = [await reader(mailbox) for _ in range(3)]
    for message in (b"1", b"2", b"3"):
        put(mailbox, message)
    assert [await soon(task) for task in tasks] == [b"1", b"2", b"3"]


async def test_a_reader_that_is_cancelled_before_a_message_comes_takes_none() -> None:
    mailbox = box()
    impatient, patient = await reader(mailbox), await reader(mailbox)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    put(mailbox, b"1", 60)
    assert await soon(patient) == b"1"


async def test_a_reader_that_is_cancelled_as_it_is_woken_passes_its_turn_on() -> None:
    mailbox = box()
    first, second = await reader(mailbox), await reader(mailbox)
    put(mailbox, b"1", 60)  # wakes the first one, on the loop's next round
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await soon(second) == b"1"


async def test_a_message_whose_reader_is_cancelled_as_it_is_woken_stays_for_the_next() -> None:
    mailbox = box()
    task = await reader(mailbox)
    put(mailbox, b"1", 60)
    await asyncio.sleep(0)  # its future is resolved; the task has not run yet, or just did
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await get(mailbox) == b"1"
    else:
        assert task.result() == b"1"


async def test_a_message_that_was_taken_before_the_woken_reader_ran_leaves_it_waiting() -> None:
    mailbox = box()
    task = await reader(mailbox)
    put(mailbox, b"1", 60)
    assert await get(mailbox) == b"1"  # does not wait, so it is quicker
    put(mailbox, b"2", 60)
    assert await soon(task) == b"2"


async def test_an_expired_message_is_never_delivered(clock: Clock) -> None:
    mailbox = box(b"old", expiry=5)
    clock.now += 3
    assert put(mailbox, b"new", 5)
    clock.now += 2
    assert await get(mailbox) == b"new"


async def test_a_message_is_delivered_until_the_moment_it_expires(clock: Clock) -> None:
    mailbox = box(b"old", expiry=5)
    clock.now += 4.999
    assert await get(mailbox) == b"old"


async def test_a_reader_waits_on_when_all_that_waits_has_expired(clock: Clock) -> None:
    mailbox = box(b"1", b"2", expiry=5)
    clock.now += 5
    task = await reader(mailbox)
    put(mailbox, b"3", 5)
    assert await soon(task) == b"3"


def test_expire_makes_room_and_tells_how_much(clock: Clock) -> None:
    mailbox = box(b"1", b"2", capacity=2, expiry=5)
    assert mailbox.expire(clock.now) == 0
    assert not put(mailbox, b"3", 5)
    clock.now += 5
    assert mailbox.expire(clock.now) == 2
    assert put(mailbox, b"3", 5)
    assert mailbox.expire(clock.now) == 0


async def test_what_expired_before_its_reader_came_is_counted_as_missed(clock: Clock) -> None:
    mailbox = box(b"1", b"2", expiry=5)
    clock.now += 5
    put(mailbox, b"3", 5)
    assert await get(mailbox) == b"3"
    assert mailbox.missed == 2


async def test_a_message_that_is_forced_in_needs_no_room() -> None:
    mailbox = box(b"1", capacity=1)
    mailbox.force((now() + 60, b"2"))
    assert not put(mailbox, b"3")
    assert [await get(mailbox), await get(mailbox)] == [b"1", b"2"]
    task = await reader(mailbox)
    mailbox.force((now() + 60, b"4"))
    assert await soon(task) == b"4"


async def test_a_message_that_is_put_back_is_the_next_one_again() -> None:
    mailbox = box(b"1", b"2", capacity=2)
    first = await get(mailbox)
    put(mailbox, b"3")
    mailbox.put_back((now() + 60, first))
    assert [await get(mailbox) for _ in range(3)] == [b"1", b"2", b"3"]


async def test_messages_that_are_taken_away_leave_readers_waiting() -> None:
    mailbox = box(b"1", b"2")
    mailbox.messages.clear()
    task = await reader(mailbox)
    mailbox.messages.clear()
    put(mailbox, b"3", 60)
    assert await soon(task) == b"3"


async def test_a_mailbox_is_abandoned_when_neither_messages_nor_readers_wait() -> None:
    mailbox = box()
    assert mailbox.abandoned
    put(mailbox, b"1", 60)
    assert not mailbox.abandoned
    await get(mailbox)
    assert mailbox.abandoned
    task = await reader(mailbox)
    assert not mailbox.abandoned
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert mailbox.abandoned
    mailbox.groups += 1
    assert not mailbox.abandoned
