"""What a layer has on one loop, without a wire: who is told of what, and what it costs."""

from __future__ import annotations

import asyncio
import fnmatch
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from django_pgnotify.layers import local as local_module
from django_pgnotify.layers import mailbox as mailbox_module
from django_pgnotify.layers.codec import Codec
from django_pgnotify.layers.local import Local
from django_pgnotify.layers.options import Options
from django_pgnotify.stats import Stats

DEADLINE = 10.0
CODEC = Codec()


class Clock:
    """Stands in for ``time``, and moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stand_in = SimpleNamespace(monotonic=clock.monotonic)
    for module in (mailbox_module, local_module):
        monkeypatch.setattr(module, "time", stand_in)
    return clock


def local(**options: Any) -> Local:
    return Local(
        Options(
            **{
                "prefix": "p",
                "channel_prefix": "",
                "expiry": 60,
                "group_expiry": 1000,
                "capacity_of": lambda name: 3,
                "shards": 8,
                "gap_messages": True,
                "crypt": None,
                "stats": Stats(),
                **options,
            }
        ),
        CODEC,
    )


def member(of: Local, *groups: str) -> str:
    channel = of.new_channel("x.")
    for group in groups:
        of.join(group, channel)
    return channel


def tell(of: Local, group: str, now: float, *numbers: int) -> None:
    """Hand these messages to a group."""
    for number in numbers:
        of.deliver(group, CODEC.message({"type": "x", "n": number}), now)


async def take(of: Local, channel: str) -> Any:
    """The number of the next message; the cause, where it is a gap."""
    async with asyncio.timeout(DEADLINE):
        message = await of.receive(channel)
    return message["cause"] if message["type"] == "pgnotify.gap" else message["n"]


def waits(of: Local, channel: str) -> int:
    """How many messages wait for a channel."""
    return len(of.boxes[channel].messages)


# -- gaps -------------------------------------------------------------------------------------


def test_a_group_is_matched_once_however_many_gaps_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each gap and member it would be the square of the members, while the loop stands."""
    matched: list[str] = []

    def match(name: str, pattern: str) -> bool:
        matched.append(name)
        return fnmatch.fnmatchcase(name, pattern)

    monkeypatch.setattr(local_module, "fnmatch", SimpleNamespace(fnmatchcase=match))
    ours = local(gap_messages=("board.*",))
    told = [member(ours, f"board.{number}", "chat") for number in range(50)]
    other = member(ours, "chat")
    for _ in range(10):
        ours.note_gap(None, datetime.now(UTC), "x")
    assert [waits(ours, channel) for channel in told] == [10] * 50
    assert waits(ours, other) == 0
    assert len(matched) == len(ours.groups)


def test_who_is_told_of_gaps_follows_joins_and_leaves() -> None:
    ours = local(gap_messages=("board.*",))
    channel = member(ours, "board.1", "board.1", "board.2", "chat")

    def told() -> bool:
        before = waits(ours, channel)
        ours.note_gap(None, datetime.now(UTC), "x")
        return waits(ours, channel) > before

    assert told()
    ours.leave("board.1", channel)
    ours.leave("board.1", channel)
    assert told()
    ours.leave("board.2", channel)
    assert not told()
    ours.join("board.1", channel)
    assert told()
    ours.forget()
    ours.join("chat", channel)
    assert not told()


async def test_what_expires_in_a_full_mailbox_is_a_gap_before_what_comes_next(clock: Clock) -> None:
    """The gap that waited there, of what had been refused, has expired as well."""
    ours = local()
    slow = member(ours, "room")
    tell(ours, "room", clock.now, 1, 2, 3, 4, 5)
    assert ours._stats["dropped"] == 2
    clock.now += 60
    tell(ours, "room", clock.now, 6, 7)
    assert [await take(ours, slow) for _ in range(3)] == ["expiry", 6, 7]
    assert waits(ours, slow) == 0


async def test_a_mailbox_that_takes_one_message_has_room_for_it_beside_a_gap(clock: Clock) -> None:
    ours = local(capacity_of=lambda name: 1)
    slow = member(ours, "room")
    tell(ours, "room", clock.now, 1)
    clock.now += 60
    tell(ours, "room", clock.now, 2)
    assert [await take(ours, slow) for _ in range(2)] == ["expiry", 2]
    assert (ours._stats["expired"], ours._stats["dropped"]) == (1, 0)


async def test_a_mailbox_that_stays_full_keeps_its_newest_messages_and_is_told_once(
    clock: Clock,
) -> None:
    ours = local()
    slow = member(ours, "room")
    for number in range(20):
        tell(ours, "room", clock.now, number)
        if number == 10:
            ours.sweep(clock.now)
        clock.now += 20
    assert ours._stats["dropped"] == 0
    assert [await take(ours, slow) for _ in range(3)] == ["expiry", 18, 19]
    assert waits(ours, slow) == 0


async def test_what_finds_no_room_though_some_expired_is_refused_and_told(clock: Clock) -> None:
    """Gaps need no room, so there may be more in it than it takes."""
    ours = local(capacity_of=lambda name: 1)
    slow = member(ours, "room")
    tell(ours, "room", clock.now, 1)
    clock.now += 30
    ours.note_gap(None, datetime.now(UTC), "connection")
    clock.now += 30
    tell(ours, "room", clock.now, 2)
    assert ours._stats["dropped"] == 1
    assert [await take(ours, slow) for _ in range(3)] == ["expiry", "connection", "capacity"]


async def test_a_consumer_whose_messages_have_all_expired_is_told_when_it_comes(
    clock: Clock,
) -> None:
    """And not only with the next message, which may be long in coming."""
    ours = local()
    slow = member(ours, "room")
    tell(ours, "room", clock.now, 1)
    clock.now += 60
    assert await take(ours, slow) == "expiry"
    assert ours._stats["expired"] == 1


async def test_what_expires_is_no_gap_where_none_are_wanted(clock: Clock) -> None:
    ours = local(gap_messages=("board.*",))
    slow = member(ours, "room")
    tell(ours, "room", clock.now, 1, 2, 3)
    clock.now += 60
    tell(ours, "room", clock.now, 4)
    assert await take(ours, slow) == 4
    assert ours._stats["expired"] == 3


# -- memberships ------------------------------------------------------------------------------


async def waiting(of: Local, channel: str) -> asyncio.Task[Any]:
    """A task that receives, returned once it waits."""
    task = asyncio.create_task(of.receive(channel), name="receive")
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def soon(task: asyncio.Task[Any]) -> Any:
    async with asyncio.timeout(DEADLINE):
        return await task


async def ended(task: asyncio.Task[Any]) -> None:
    """Have a task end, and return once it has."""
    task.cancel()
    await asyncio.wait([task])


async def test_whoever_reads_stays_in_its_groups_for_as_long_as_it_does(clock: Clock) -> None:
    """A websocket may be open for days."""
    ours = local(group_expiry=1000)
    channel, of_any = member(ours, "room"), member(ours, "room")
    task = await waiting(ours, channel)
    any_of_it = await waiting(ours, of_any.partition("!")[0] + "!")
    for step in (1001, 999, 5000):
        clock.now += step
        ours.sweep(clock.now)
    tell(ours, "room", clock.now, 1)
    assert (await soon(task))["n"] == 1
    assert (await soon(any_of_it))["n"] == 1
    assert ours._stats["lapsed"] == 0


async def test_a_consumer_that_handles_a_message_at_the_moment_stays_in_its_groups(
    clock: Clock,
) -> None:
    ours = local(group_expiry=1000)
    channel = member(ours, "room")
    task = await waiting(ours, channel)
    clock.now += 900
    tell(ours, "room", clock.now, 1)
    await soon(task)
    clock.now += 200
    tell(ours, "room", clock.now, 2)
    assert await take(ours, channel) == 2


@pytest.mark.parametrize("swept", [True, False])
async def test_a_channel_that_nobody_reads_any_more_leaves_its_groups_and_is_told(
    clock: Clock, swept: bool
) -> None:
    ours = local(group_expiry=1000)
    channel = member(ours, "room", "lobby")
    await ended(await waiting(ours, channel))
    clock.now += 1001
    if swept:
        ours.sweep(clock.now)
    else:
        tell(ours, "room", clock.now, 1)
        tell(ours, "lobby", clock.now, 1)
    assert not ours.groups
    assert ours._stats["lapsed"] == 2
    assert waits(ours, channel) == 1
    assert await take(ours, channel) == "group_expiry"
    assert not ours.boxes


async def test_what_a_channel_is_told_that_nobody_reads_any_more_does_not_stay_for_ever(
    clock: Clock,
) -> None:
    ours = local(group_expiry=1000)
    member(ours, "room")
    clock.now += 1001
    ours.sweep(clock.now)
    clock.now += 60
    ours.sweep(clock.now)
    assert not ours.boxes
