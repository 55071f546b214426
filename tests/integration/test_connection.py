"""The listening connection itself: nothing is missed, and nothing waits without a deadline."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest

from django_pgnotify.exceptions import CannotConnect, ConnectionLost, StandbyServer
from django_pgnotify.listening.connection import ListenConnection
from django_pgnotify.listening.parameters import connection_params
from example_project.embedded import EmbeddedPostgres
from tests.integration.recording import DEADLINE, alias_at, anotify, aterminate, client
from tests.proxy import TCPProxy

pytestmark = pytest.mark.django_db(transaction=True)


class Open:
    """An open connection, and the wait for what arrives on it."""

    def __init__(self) -> None:
        self.input = asyncio.Event()
        self.heard: list[str] = []
        self.connection: ListenConnection

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(DEADLINE):
            while True:
                self.heard += [note.payload.decode() for note in self.connection.take()]
                if len(self.heard) >= count or self.connection.lost is not None:
                    return self.heard
                await self.input.wait()
                self.input.clear()


async def opened(alias: str = "default", timeout: float = DEADLINE) -> Open:
    it = Open()
    it.connection = await ListenConnection.open(
        connection_params(alias), timeout=timeout, on_input=it.input.set
    )
    return it


@pytest.fixture
async def it() -> AsyncIterator[Open]:
    it = await opened()
    yield it
    it.connection.close()


@pytest.fixture
async def other() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with client() as connection:
        yield connection


@pytest.fixture
def proxied(proxy: TCPProxy) -> Iterator[str]:
    with alias_at("proxied", HOST=proxy.host, PORT=str(proxy.port)) as alias:
        yield alias


async def test_it_hears_what_it_listens_to_with_the_pid_of_the_sender(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    await it.connection.listen(["a"], timeout=DEADLINE)
    await anotify(other, "a", "1")
    await it.input.wait()
    [notification] = it.connection.take()
    assert notification == ("a", b"1", other.info.backend_pid)
    assert it.connection.take() == []


async def test_what_arrives_while_a_statement_runs_is_delivered_without_another_statement(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    await it.connection.listen(["a"], timeout=DEADLINE)
    await other.execute("SELECT pg_advisory_lock(4711)")
    statement = asyncio.create_task(
        it.connection.execute(b"SELECT pg_advisory_lock(4711)", timeout=DEADLINE)
    )
    async with asyncio.timeout(DEADLINE):
        while not await (
            await other.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND objid = 4711")
        ).fetchone():
            pass
    await anotify(other, "a", "1", "2")
    assert not statement.done()
    await other.execute("SELECT pg_advisory_unlock(4711)")
    await statement
    assert await it.until(2) == ["1", "2"]


async def test_what_arrives_between_statements_is_delivered_in_order(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    await it.connection.listen(["a"], timeout=DEADLINE)
    for number in range(200):
        await asyncio.gather(
            anotify(other, "a", str(number)),
            it.connection.execute(b"SELECT 1", timeout=DEADLINE),
        )
    assert await it.until(200) == [str(number) for number in range(200)]


async def test_what_arrived_before_the_end_of_the_connection_is_delivered(
    proxy: TCPProxy, proxied: str, other: psycopg.AsyncConnection[Any]
) -> None:
    it = await opened(proxied)
    try:
        await it.connection.listen(["a"], timeout=DEADLINE)
        await asyncio.to_thread(proxy.blackhole)
        await anotify(other, "a", "last words")
        await aterminate(other, it.connection.backend_pid)
        # Both reach us in one piece.
        await asyncio.to_thread(proxy.resume)
        assert await it.until(1) == ["last words"]
    finally:
        it.connection.close()


async def test_several_channels_are_listened_to_in_one_transaction_or_none(it: Open) -> None:
    with pytest.raises(psycopg.Error):
        await it.connection._each("LISTEN {}; SELECT 1/0", ["a", "b"], DEADLINE)
    rows = await it.connection.execute(b"SELECT pg_listening_channels()", timeout=DEADLINE)
    assert rows == []


async def test_two_thousand_channels_are_listened_to(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    names = [f"{number:04d} " + "x" * 50 for number in range(2000)]
    await it.connection.listen(names, timeout=DEADLINE)
    await anotify(other, names[-1], "1")
    assert await it.until(1) == ["1"]


@pytest.mark.parametrize(
    "name", ["a b", 'quo"te', "semi;colon", "drop table--", "ünïcode", "UPPER"]
)
async def test_a_channel_of_any_name_is_heard(
    it: Open, other: psycopg.AsyncConnection[Any], name: str
) -> None:
    await it.connection.listen([name], timeout=DEADLINE)
    await anotify(other, name, "1")
    assert await it.until(1) == ["1"]
    await it.connection.unlisten([name], timeout=DEADLINE)
    rows = await it.connection.execute(b"SELECT pg_listening_channels()", timeout=DEADLINE)
    assert rows == []


async def test_an_error_of_the_server_is_raised_and_the_connection_stays(it: Open) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await it.connection.execute(b"SELECT 1/0", timeout=DEADLINE)
    assert await it.connection.execute(b"SELECT 1", timeout=DEADLINE) == [(b"1",)]
    assert it.connection.lost is None


async def test_an_answer_of_ten_megabytes_and_a_null_are_read(it: Open) -> None:
    [(text, null)] = await it.connection.execute(
        b"SELECT repeat('x', 10000000), NULL", timeout=DEADLINE
    )
    assert text is not None
    assert (len(text), null) == (10_000_000, None)


async def test_a_statement_of_ten_megabytes_is_sent(it: Open) -> None:
    rows = await it.connection.execute(b"SELECT length($1)", ["x" * 10_000_000], timeout=DEADLINE)
    assert rows == [(b"10000000",)]


async def test_two_statements_at_once_are_refused(it: Open) -> None:
    first = asyncio.create_task(it.connection.execute(b"SELECT 1", timeout=DEADLINE))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="in flight"):
        await it.connection.execute(b"SELECT 2", timeout=DEADLINE)
    assert await first == [(b"1",)]


async def test_a_statement_that_the_network_swallows_ends_at_its_deadline(
    proxy: TCPProxy, proxied: str
) -> None:
    it = await opened(proxied)
    try:
        await asyncio.to_thread(proxy.blackhole)
        started = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no answer within 0\.2 s"):
            await it.connection.execute(b"SELECT 1", timeout=0.2)
        assert time.monotonic() - started < 5
        assert it.connection.lost is not None
        with pytest.raises(ConnectionLost):
            await it.connection.execute(b"SELECT 1", timeout=0.2)
    finally:
        it.connection.close()


async def test_a_backend_that_ends_during_a_statement_is_a_lost_connection(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    statement = asyncio.create_task(it.connection.execute(b"SELECT pg_sleep(60)", timeout=DEADLINE))
    async with asyncio.timeout(DEADLINE):
        while not await (
            await other.execute(
                "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'",
                [it.connection.backend_pid],
            )
        ).fetchone():
            pass
    await aterminate(other, it.connection.backend_pid)
    with pytest.raises(ConnectionLost, match="terminating connection"):
        await statement
    assert it.connection.lost is not None


async def test_a_backend_that_ends_while_idle_is_noticed_without_a_statement(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    await aterminate(other, it.connection.backend_pid)
    async with asyncio.timeout(DEADLINE):
        await it.input.wait()
    assert it.connection.lost is not None


async def test_connecting_to_silence_ends_at_the_deadline(proxy: TCPProxy, proxied: str) -> None:
    await asyncio.to_thread(proxy.blackhole)
    started = time.monotonic()
    with pytest.raises(CannotConnect, match=r"no answer within 0\.3 s"):
        await opened(proxied, timeout=0.3)
    assert time.monotonic() - started < 5


async def test_connecting_to_nobody_names_the_cause_in_one_line(
    proxy: TCPProxy, proxied: str
) -> None:
    await asyncio.to_thread(proxy.close)
    with pytest.raises(CannotConnect, match="refused") as caught:
        await opened(proxied)
    assert "\n" not in str(caught.value)


async def test_a_direct_connection_is_not_taken_for_a_pooled_one(it: Open) -> None:
    assert it.connection.pooled is False


async def test_closing_twice_is_harmless_and_ends_the_backend(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    pid = it.connection.backend_pid
    it.connection.close()
    it.connection.close()
    async with asyncio.timeout(DEADLINE):
        while await (
            await other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid])
        ).fetchone():
            pass
    with pytest.raises(ConnectionLost):
        await it.connection.execute(b"SELECT 1", timeout=DEADLINE)


async def test_closing_during_a_statement_ends_it(
    it: Open, other: psycopg.AsyncConnection[Any]
) -> None:
    pid = it.connection.backend_pid
    statement = asyncio.create_task(it.connection.execute(b"SELECT pg_sleep(60)", timeout=DEADLINE))
    await asyncio.sleep(0)
    it.connection.close()
    with pytest.raises((ConnectionLost, psycopg.OperationalError)):
        await statement
    await aterminate(other, pid)  # the server would notice only at the end of the statement


async def test_a_connection_that_is_never_closed_warns() -> None:
    it = await opened()
    it.connection._detach()
    with pytest.warns(ResourceWarning, match="unclosed"):
        it.connection.__del__()
    it.connection.close()
    del it
    gc.collect()


class Standby(EmbeddedPostgres):
    """A server that stays in recovery."""

    def _ready(self) -> bool:
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[7].strip() in ("ready", "standby")


async def test_a_standby_is_refused_by_name(
    start_server: Callable[..., EmbeddedPostgres],
) -> None:
    def standby() -> EmbeddedPostgres:
        server = Standby()
        server.start()
        server.stop()
        (server.data_dir / "standby.signal").touch()
        return server.start()

    server = await asyncio.to_thread(standby)
    try:
        where = {"NAME": "postgres", "USER": "postgres", "PASSWORD": ""}
        where |= {"HOST": server.host, "PORT": str(server.port)}
        with (
            alias_at("standby", **where) as alias,
            pytest.raises(StandbyServer, match=r"standby.*primary"),
        ):
            await opened(alias)
    finally:
        await asyncio.to_thread(server.close)
