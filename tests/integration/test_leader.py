"""One listener leads, the others stand by, and somebody always takes over."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import connections, transaction
from pytest_django import Settings

from django_pgnotify import publish, receiver
from django_pgnotify.listening.connection import ListenConnection
from django_pgnotify.listening.leadership import LeaderLock
from django_pgnotify.listening.listener import Listener
from django_pgnotify.listening.parameters import connection_params
from django_pgnotify.registry import registry
from django_pgnotify.testing import RunningListener, running_listener
from tests.integration.recording import (
    DEADLINE,
    Recorder,
    Sink,
    alias_at,
    anotify,
    aterminate,
    client,
    running,
    terminate,
)
from tests.proxy import TCPProxy

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 0.1
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2


async def test_of_two_listeners_one_leads_and_leads_before_it_says_that_it_is_established() -> None:
    first, second = Sink(), Sink()
    async with running(Listener("default", ["a"], first, leadership="all")):
        await first.until("established")
        async with running(Listener("default", ["a"], second, leadership="all")):
            await second.until("established")
    assert first.kinds[:2] == ["led", "established"]
    assert first.of("led")[0] is True
    assert second.of("led") == []


async def test_a_leader_that_stops_hands_over_at_once(settings: Settings) -> None:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 3600  # only the leader's word can be the reason
    first, second = Sink(), Sink()
    leader = Listener("default", ["a"], first, leadership="all")
    async with running(leader) as task:
        await first.until("established")
        async with running(Listener("default", ["a"], second, leadership="all")):
            await second.until("established")
            assert second.of("led") == []
            leader.stop()
            await second.until("led")
            assert second.of("led") == [True]
            await task


@pytest.mark.parametrize("how", ["terminated", "closed"])
async def test_a_standby_takes_over_with_a_gap_when_the_leader_is_gone(
    how: str, proxy: TCPProxy
) -> None:
    first, second = Sink(), Sink()
    with alias_at("proxied", HOST=proxy.host, PORT=str(proxy.port)) as alias:
        leader = Listener(alias, ["a"], first, leadership="all")
        standby = Listener("default", ["a"], second, leadership="all")
        async with client() as other, running(leader):
            await first.until("led")
            async with running(standby):
                await second.until("established")
                if how == "terminated":
                    connections.settings[alias]["PORT"] = "1"  # it must not be first to return
                    await aterminate(other, leader.backend_pid)
                else:
                    await asyncio.to_thread(proxy.close)
                await second.until("leader's gap")
                await first.until("led", 2)
                await anotify(other, "a", "later")
                await second.until("heard")
                # It comes back as a standby, and hears again what every listener hears.
                connections.settings[alias]["PORT"] = str(proxy.port)
                await asyncio.to_thread(proxy.open)
                await first.until("established", 2)
                assert first.of("led") == [True, False]
                assert "gap" in first.kinds
                assert second.kinds == ["established", "led", "leader's gap", "heard"]
    [(since, until, cause)] = second.of("leader's gap")
    assert since < until
    assert cause


async def test_a_leader_that_reconnects_without_a_rival_leads_again_with_both_gaps() -> None:
    sink = Sink()
    listener = Listener("default", ["a"], sink, leadership="all")
    async with client() as other, running(listener):
        await sink.until("established")
        await aterminate(other, listener.backend_pid)
        await sink.until("established", 2)
        await anotify(other, "a", "later")
        await sink.until("heard")
    # The last one is said at the end.
    assert sink.kinds == [
        "led", "established", "led", "lost", "gap", "led", "leader's gap", "established", "heard",
        "led",
    ]  # fmt: skip
    assert sink.of("led") == [True, False, True, False]
    assert sink.of("gap") == sink.of("leader's gap") or (
        sink.of("gap")[0][2] == sink.of("leader's gap")[0][2]
    )


async def test_listeners_of_different_names_and_prefixes_all_lead(settings: Settings) -> None:
    sinks = [Sink(), Sink(), Sink()]
    listeners = [
        Listener("default", ["a"], sinks[0], leadership="a"),
        Listener("default", ["b"], sinks[1], leadership="b"),
    ]
    settings.PGNOTIFY_CHANNEL_PREFIX = "green."
    listeners.append(Listener("default", ["a"], sinks[2], leadership="a"))
    async with running(listeners[0]), running(listeners[1]), running(listeners[2]):
        for sink in sinks:
            await sink.until("led")
    assert all(sink.of("led")[0] for sink in sinks)


async def test_a_listener_without_leadership_never_leads() -> None:
    sink, other_sink = Sink(), Sink()
    async with running(Listener("default", ["a"], sink)):
        await sink.until("established")
        async with running(Listener("default", ["a"], other_sink, leadership="all")):
            await other_sink.until("led")
    assert "led" not in sink.kinds


# -- of different roles --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def role(name: str, *member_of: str) -> AsyncIterator[str]:
    """An alias for the default test database that a new role of PostgreSQL's logs in through."""
    password = secrets.token_hex(16)
    async with client() as other:
        row = await (
            await other.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        ).fetchone()
        if row != (True,):
            pytest.skip("the user of the test database may not give out PostgreSQL's own roles")
        await other.execute(f"DROP ROLE IF EXISTS {name}".encode())
        await other.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'".encode())
        try:
            for group in member_of:
                await other.execute(f"GRANT {group} TO {name}".encode())
            with alias_at(name, USER=name, PASSWORD=password) as alias:
                yield alias
        finally:
            await other.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Awaitable[None]]:
    """Wait until standbys have looked so many times more how long a leader has been silent."""
    look, looked = LeaderLock.silence_of_holder, asyncio.Semaphore(0)

    async def counted(self: LeaderLock, *args: Any) -> float | None:
        silence = await look(self, *args)
        looked.release()
        return silence

    async def wait(count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            for _ in range(count):
                await looked.acquire()

    monkeypatch.setattr(LeaderLock, "silence_of_holder", counted)
    return wait


@pytest.mark.parametrize(
    "member_of", [(), ("pg_signal_backend",), ("pg_read_all_stats",)], ids=repr
)
async def test_a_standby_of_another_role_stands_by_and_leaves_a_healthy_leader_alone(
    member_of: tuple[str, ...], looks: Callable[[int], Awaitable[None]]
) -> None:
    first, second = Sink(), Sink()
    async with role("pgnotify_one") as one, role("pgnotify_two", *member_of) as two:
        leader = Listener(one, ["a"], first, leadership="all")
        async with running(leader) as task:
            await first.until("established")
            async with running(Listener(two, ["a"], second, leadership="all")):
                await second.until("established")
                await looks(3)
                assert first.kinds == ["led", "established"]
                assert second.kinds == ["established"]
                leader.stop()
                await second.until("led")
                await task


@pytest.mark.parametrize(
    ("member_of", "ends"),
    [
        ((), False),
        (("pg_signal_backend",), False),
        (("pg_read_all_stats",), False),
        (("pg_read_all_stats", "pg_signal_backend"), True),
        (("pgnotify_one",), True),
    ],
    ids=repr,
)
async def test_a_silent_leader_is_ended_by_whoever_may_see_and_end_it_and_nobody_fails_to_look(
    member_of: tuple[str, ...], ends: bool
) -> None:
    lock = LeaderLock("all", "")
    async with role("pgnotify_one") as one, role("pgnotify_two", *member_of) as two:
        holder = await ListenConnection.open(
            connection_params(one), timeout=DEADLINE, on_input=lambda: None
        )
        standby = await ListenConnection.open(
            connection_params(two), timeout=DEADLINE, on_input=lambda: None
        )
        try:
            assert await lock.try_take(holder, DEADLINE)
            # Whatever it has done, it was longer ago than that.
            await lock.silence_of_holder(standby, -1.0, DEADLINE)
            if ends:
                async with asyncio.timeout(DEADLINE):
                    while not await lock.try_take(standby, DEADLINE):
                        pass
            else:
                assert not await lock.try_take(standby, DEADLINE)
                assert await holder.execute(b"SELECT 1", timeout=DEADLINE) == [(b"1",)]
        finally:
            holder.close()
            standby.close()


# -- with receivers ------------------------------------------------------------------------------


def is_leader(listener: RunningListener) -> bool:
    assert listener.service is not None
    return listener.service.dispatcher.leader


def test_one_of_two_listeners_runs_a_receiver_and_both_run_one_for_every_node() -> None:
    one, every = Recorder(), Recorder()
    with registry.isolated(), ExitStack() as stack:
        receiver("jobs", dispatch_uid="one")(one)
        receiver("jobs", every_node=True, dispatch_uid="every")(every)
        listeners = [stack.enter_context(running_listener()) for _ in range(3)]
        assert [is_leader(listener) for listener in listeners] == [True, False, False]
        with transaction.atomic():
            for number in range(100):
                publish("jobs", number)
        for listener in listeners:
            listener.wait_for(100)
    assert one.data == list(range(100))
    assert sorted(every.data) == sorted(list(range(100)) * 3)


def test_the_roles_are_named() -> None:
    with registry.isolated(), ExitStack() as stack:
        receiver("jobs", dispatch_uid="one")(Recorder())
        receiver("news", every_node=True, dispatch_uid="every")(Recorder())
        leader = stack.enter_context(running_listener())
        standby = stack.enter_context(running_listener())
        every = stack.enter_context(running_listener(["news"]))
        roles = [each.service.role for each in (leader, standby, every) if each.service]
    assert roles == ["leader", "standby", "every node"]


def test_a_listener_of_durable_consumers_alone_has_the_role_shared() -> None:
    with registry.isolated(), ExitStack() as stack:
        receiver("ledger", durable=True)(Recorder())
        receiver("news", every_node=True)(Recorder())
        both = stack.enter_context(running_listener())
        alone = stack.enter_context(running_listener(["ledger"]))
        idle = stack.enter_context(running_listener(["jobs"]))
        roles = [each.service.role for each in (both, alone, idle) if each.service]
    assert roles == ["every node", "shared", "every node"]


def test_a_hand_over_in_order_runs_every_event_once_and_tells_of_a_gap_all_the_same() -> None:
    """That the old leader said goodbye does not prove that it could read up to that point."""
    one, every = Recorder(), Recorder()
    with registry.isolated(), ExitStack() as stack:
        receiver("jobs", on_gap=True, dispatch_uid="one")(one)
        receiver("jobs", on_gap=True, every_node=True, dispatch_uid="every")(every)
        leader_stack = stack.enter_context(ExitStack())
        leader = leader_stack.enter_context(running_listener())
        standby = stack.enter_context(running_listener())
        assert (is_leader(leader), is_leader(standby)) == (True, False)
        publish("jobs", 0)
        one.wait_for(1)
        leaving = threading.Thread(target=leader_stack.close)
        leaving.start()
        number = 0
        # Without a pause, until well after the change.
        while leaving.is_alive() or not is_leader(standby) or number < 200:
            number += 1
            publish("jobs", number)
            assert number < 50_000
        leaving.join()
        one.wait_for(number + 2)
        standby.settle()
    published = [event.data for event in one.events if event.action == "published"]
    assert sorted(published) == list(range(number + 1))
    assert [event.action for event in one.events].count("gap") == 1
    assert "gap" not in {event.action for event in every.events}


def test_receivers_of_the_leader_hear_of_the_gap_when_it_was_cut_off(settings: Settings) -> None:
    one, every = Recorder(), Recorder()
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 3.0
    with registry.isolated(), ExitStack() as stack:
        receiver("jobs", on_gap=True, dispatch_uid="one")(one)
        receiver("jobs", on_gap=True, every_node=True, dispatch_uid="every")(every)
        leader = stack.enter_context(running_listener())
        stack.enter_context(running_listener())
        terminate(leader.backend_pid)
        one.wait_until(lambda events: any(event.action == "gap" for event in events))
        leader.wait_until_ready(2)
        publish("jobs", "later")
        one.wait_for(2)
        every.wait_for(3)
        by_the_leader = [event.action for event in one.events]  # before the last hand-over
    # Whoever heard everything all the time has missed nothing: one gap, of the one cut off.
    assert by_the_leader == ["gap", "published"]
    assert sorted(event.action for event in every.events) == ["gap", "published", "published"]


def test_listeners_of_different_topics_do_not_keep_each_other_from_leading() -> None:
    a, b = Recorder(), Recorder()
    with registry.isolated(), ExitStack() as stack:
        receiver("a")(a)
        receiver("b")(b)
        of_a = stack.enter_context(running_listener(["a"]))
        of_b = stack.enter_context(running_listener(["b"]))
        assert is_leader(of_a)
        assert is_leader(of_b)
        publish("a", 1)
        publish("b", 2)
        a.wait_for(1)
        b.wait_for(1)
    assert (a.data, b.data) == ([1], [2])


def test_the_order_of_the_topics_makes_no_other_leadership() -> None:
    heard = Recorder()
    with registry.isolated(), ExitStack() as stack:
        receiver("a")(heard)
        pair = (["a", "b"], ["b", "a"])
        listeners = [stack.enter_context(running_listener(topics)) for topics in pair]
        assert [is_leader(listener) for listener in listeners] == [True, False]
        publish("a", 1)
        for listener in listeners:
            listener.wait_for(1)
    assert heard.data == [1]


def test_nothing_is_run_twice_or_lost_without_a_gap_while_leaders_come_and_go() -> None:
    """Each event is handled once, or lies before a gap that was told."""
    heard = Recorder()
    with registry.isolated(), ExitStack() as stack:
        receiver("jobs", on_gap=True)(heard)
        listeners = [stack.enter_context(running_listener()) for _ in range(2)]
        number = 0
        for _ in range(6):
            gaps = sum(event.action == "gap" for event in heard.events)
            leaders = [each for each in listeners if is_leader(each)]
            for _ in range(20):
                publish("jobs", number)
                number += 1
            for leader in leaders:
                terminate(leader.backend_pid)
            heard.wait_until(
                lambda events, gaps=gaps: sum(e.action == "gap" for e in events) > gaps  # type: ignore[misc]
            )
        publish("jobs", "end")
        # A machine that is too busy may make a leader give itself up: that is told, too.
        heard.wait_until(
            lambda events: (
                any(e.data == "end" for e in events)
                or sum(e.action == "gap" for e in events) > gaps + 1
            )
        )
    numbers = [event.data for event in heard.events if event.action != "gap"]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("when", ["as it connects", "as a standby"])
async def test_what_was_committed_before_the_lock_was_taken_is_not_the_new_leaders(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have reached the old leader, which held the lock until then."""
    sink, take = Sink(), LeaderLock.try_take
    async with client() as other:

        async def take_after_an_event(
            lock: LeaderLock, connection: ListenConnection, timeout: float
        ) -> bool:
            await anotify(other, "a", "before")
            return await take(lock, connection, timeout)

        monkeypatch.setattr(LeaderLock, "try_take", take_after_an_event)
        listener = Listener("default", ["a"], sink, leadership="all")
        if when == "as a standby":
            key = LeaderLock("all", "")._key
            await other.execute("SELECT pg_advisory_lock(%s::int, %s::int)", key)
        async with running(listener):
            await sink.until("established")
            if when == "as a standby":
                await other.execute("SELECT pg_advisory_unlock_all()")
            await sink.until("led")
            heard = sink.of("heard")
            await anotify(other, "a", "after")
            await sink.until("heard", len(heard) + 1)
            assert sink.of("heard") == [*heard, "after"]
    led = sink.kinds.index("led")
    assert sink.kinds[:led].count("heard") == len(heard) > 0
