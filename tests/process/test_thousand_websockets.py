"""A thousand websockets on daphne and uvicorn, and messages from a management command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

import psycopg
import pytest
from websockets.asyncio.client import ClientConnection, connect

from example_project.embedded import free_port
from tests.integration.recording import client, dsn
from tests.processes import Process, database_environ, python
from tests.settings import database_settings, database_url

pytestmark = pytest.mark.django_db(transaction=True)

HOST = "127.0.0.1"
CROWD = 1000
DEADLINE = 120.0
#: Of this process, beside one for each socket.
SPARE_DESCRIPTORS = 200
AT_ONCE = 50
#: Times that all listeners are terminated while messages are being sent.
STORMS = 4

SERVERS = {
    "daphne": ("-m", "daphne", "-b", HOST, "-p", "{port}", "tests.process.crowd.asgi:application"),
    "uvicorn": (
        *("-m", "uvicorn", "--host", HOST, "--port", "{port}", "--lifespan", "off"),
        *("--log-level", "info", "--ws-ping-interval", "300"),
        "tests.process.crowd.asgi:application",
    ),
}
READY = {"daphne": "Listening on TCP address", "uvicorn": "Uvicorn running on"}


class Gap(NamedTuple):
    """Seconds since the epoch."""

    since: float
    until: float


class Sent(NamedTuple):
    n: int
    before: float
    after: float


def seconds(iso: str | None) -> float:
    """Of a time in a gap; one that is not known lies before everything."""
    return 0.0 if iso is None else datetime.fromisoformat(iso).timestamp()


class Visitor:
    """One websocket, and everything it was told in the order of telling."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.told: list[int | Gap | str] = []
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read(), name="visitor")
        self.task.add_done_callback(lambda _: self._changed.set())

    async def _read(self) -> None:
        async for text in self.socket:
            kind, value = json.loads(text)
            match kind:
                case "news":
                    self.told.append(value)
                case "gap":
                    self.told.append(Gap(*map(seconds, value)))
                case _:
                    self.told.append(kind)
            self._changed.set()

    async def until(self, met: Callable[[Visitor], bool]) -> None:
        while not met(self):
            if self.task.done():
                raise AssertionError("the socket is closed") from self.task.exception()
            self._changed.clear()
            await self._changed.wait()

    @property
    def news(self) -> list[int]:
        return [each for each in self.told if isinstance(each, int)]

    @property
    def gaps(self) -> list[Gap]:
        return [each for each in self.told if isinstance(each, Gap)]

    @property
    def last(self) -> object:
        return self.told[-1] if self.told else None


async def until(met: Callable[[Visitor], bool], visitors: Sequence[Visitor]) -> None:
    """Return once something holds of each visitor."""
    try:
        async with asyncio.timeout(DEADLINE):
            for visitor in visitors:
                await visitor.until(met)
    except TimeoutError:
        waiting = [each.told[-5:] for each in visitors if not met(each)]
        raise AssertionError(
            f"{len(waiting)} of {len(visitors)} still wait; the last of three: {waiting[:3]}"
        ) from None


def room() -> int:
    """How many sockets this machine lets one process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CROWD + SPARE_DESCRIPTORS
    if soft < wanted and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(CROWD, soft - SPARE_DESCRIPTORS)


@pytest.fixture
def environ(django_db_setup: None) -> dict[str, str]:
    return {
        "DJANGO_SETTINGS_MODULE": "tests.process.crowd.settings",
        "CROWD_PREFIX": f"crowd-{secrets.token_hex(4)}",
        "PYTHONUNBUFFERED": "1",
        **database_environ(),
    }


@pytest.fixture
def servers(environ: dict[str, str]) -> Iterator[list[int]]:
    """Ports of two daphnes and two uvicorns."""
    pytest.importorskip("daphne")
    pytest.importorskip("uvicorn")
    with contextlib.ExitStack() as stack:
        running: list[tuple[str, Process, int]] = []
        for name in ("daphne", "uvicorn", "daphne", "uvicorn"):
            port = free_port()
            arguments = [part.format(port=port) for part in SERVERS[name]]
            running.append((name, stack.enter_context(python(*arguments, env=environ)), port))
        for name, process, _ in running:
            process.wait_for_line(READY[name], timeout=DEADLINE)
        yield [port for _, _, port in running]
        for name, process, _ in running:
            assert process.returncode is None, f"{name} has ended: {process.report()}"
            assert "Traceback" not in process.stderr, process.report()


@contextlib.asynccontextmanager
async def crowd_of(count: int, ports: Sequence[int]) -> AsyncIterator[list[Visitor]]:
    """Visitors that have joined, as many on each port."""
    crowd: list[Visitor] = []
    gate = asyncio.Semaphore(AT_ONCE)

    async def visit(number: int) -> None:
        async with gate:
            socket = await connect(
                f"ws://{HOST}:{ports[number % len(ports)]}/",
                compression=None,
                ping_interval=None,
                open_timeout=DEADLINE,
            )
            visitor = Visitor(socket)
            crowd.append(visitor)
            await visitor.until(lambda each: each.last == "joined")

    try:
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as visits:
            for number in range(count):
                visits.create_task(visit(number))
        yield crowd
    finally:
        for visitor in crowd:
            visitor.socket.transport.abort()
        await asyncio.gather(*(each.task for each in crowd), return_exceptions=True)


class Announcer:
    """The management command, and the locks that hold it back."""

    def __init__(self, process: Process, locks: psycopg.AsyncConnection[Any], parts: int) -> None:
        self.process = process
        self._locks = locks
        self.parts = parts

    async def say(self, part: int) -> None:
        """Let it send a part, and return once it has."""
        await self.begin(part)
        line = "^done" if part == self.parts - 1 else f"^waiting for {part + 1}"
        await asyncio.to_thread(self.process.wait_for_line, line, timeout=DEADLINE)

    async def begin(self, part: int) -> None:
        await asyncio.to_thread(
            self.process.wait_for_line, f"^waiting for {part}", timeout=DEADLINE
        )
        await self._locks.execute("SELECT pg_advisory_unlock(%s)", [part])

    def sent(self) -> dict[int, Sent]:
        lines = [line[5:] for line in self.process.stdout.splitlines() if line.startswith("sent ")]
        return {each.n: each for each in (Sent(*json.loads(line)) for line in lines)}


@contextlib.asynccontextmanager
async def announcing(
    environ: dict[str, str], locks: psycopg.AsyncConnection[Any], *parts: int, first: int = 0
) -> AsyncIterator[Announcer]:
    """The command, which sends ``parts`` of so many messages, each when it is told to."""
    for part in range(len(parts)):
        await locks.execute("SELECT pg_advisory_lock(%s)", [part])
    arguments = ("-m", "django", "announce", f"--first={first}", *map(str, parts))
    with python(*arguments, env=environ) as process:
        yield Announcer(process, locks, len(parts))
        status = await asyncio.to_thread(process.wait, timeout=DEADLINE)
        assert status == 0, process.report()


async def terminate_listeners(other: psycopg.AsyncConnection[Any]) -> int:
    """End the backends of all layers that listen; they are gone when this returns."""
    cursor = await other.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = %s AND application_name = 'pglisten'",
        [database_settings(dsn())["NAME"]],
    )
    return len(await cursor.fetchall())


def unexplained(news: Sequence[int], gaps: Sequence[Gap], sent: dict[int, Sent]) -> list[int]:
    """Numbers that somebody missed though no gap that it was told of covers their sending."""
    return sorted(
        n
        for n in sent.keys() - set(news)
        if not any(gap.since <= sent[n].after and sent[n].before <= gap.until for gap in gaps)
    )


def test_a_miss_outside_every_gap_is_found() -> None:
    sent = {n: Sent(n, n + 0.1, n + 0.2) for n in range(6)}
    assert unexplained([0, 1, 2, 3, 4, 5], [], sent) == []
    assert unexplained([0, 1, 5], [Gap(2.0, 3.15), Gap(4.15, 9.0)], sent) == []
    assert unexplained([0, 5], [Gap(2.15, 3.05)], sent) == [1, 3, 4]
    assert unexplained([], [], sent) == [0, 1, 2, 3, 4, 5]


async def test_a_thousand_websockets_hear_everything_once_in_order_and_nothing_after_leaving(
    servers: list[int], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    count = room()
    if count < CROWD:
        with capsys.disabled():
            print(f"\nonly {count} websockets: the machine lends no more descriptors")
    async with crowd_of(count, servers) as crowd, client() as locks:
        leaving, staying = crowd[: count // 4], crowd[count // 4 :]
        async with announcing(environ, locks, 15, 5, 1) as announcer:
            await announcer.say(0)
            await until(lambda each: each.last == 14, crowd)
            await say_all(leaving, "leave")
            await until(lambda each: each.last == "left", leaving)
            await announcer.say(1)
            # Back for the last word, which takes the same way as what they must not have heard.
            await say_all(leaving, "join")
            await until(lambda each: each.last == "joined", leaving)
            await announcer.say(2)
        await until(lambda each: each.last == 20, crowd)
        for visitor in staying:
            assert visitor.told == ["joined", *range(21)]
        for visitor in leaving:
            assert visitor.told == ["joined", *range(15), "left", "joined", 20]


async def say_all(visitors: Sequence[Visitor], text: str) -> None:
    for visitor in visitors:
        await visitor.socket.send(text)


async def test_with_listeners_terminated_meanwhile_misses_lie_inside_signalled_gaps(
    servers: list[int], environ: dict[str, str]
) -> None:
    count = room()
    database = psycopg.sql.Identifier(database_settings(dsn())["NAME"])
    server = database_url({**database_settings(dsn()), "NAME": "postgres"})

    async def admit(anybody: bool) -> None:
        statement = psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        await other.execute(statement.format(database, psycopg.sql.SQL(str(anybody))))

    async with (
        client(server) as other,
        client() as locks,
        crowd_of(count, servers) as crowd,
        announcing(environ, locks, 5, 10, *[10] * STORMS, 5) as announcer,
    ):
        await announcer.say(0)
        await until(lambda each: each.last == 4, crowd)

        # Deaf for as long as it takes to send ten: nobody can connect again before that.
        await admit(False)
        try:
            assert await terminate_listeners(other) >= len(servers)
            await announcer.say(1)
        finally:
            await admit(True)
        await until(lambda each: len(each.gaps) >= 1, crowd)
        for visitor in crowd:
            assert visitor.news == [0, 1, 2, 3, 4], "nobody can have heard the ten"

        # And in the midst of sending.
        terminated = 0.0
        for part in range(2, 2 + STORMS):
            terminated = time.time()
            await asyncio.gather(announcer.say(part), terminate_listeners(other))
        await until(lambda each: each.gaps[-1].until >= terminated, crowd)
        await announcer.say(2 + STORMS)
        last = 5 + 10 + 10 * STORMS + 5 - 1
        await until(lambda each: each.last == last, crowd)
        sent = announcer.sent()
        assert sorted(sent) == list(range(last + 1))
        for visitor in crowd:
            assert all(one < two for one, two in pairwise(visitor.news)), "in order, and once"
            assert unexplained(visitor.news, visitor.gaps, sent) == []
            assert visitor.news[-5:] == list(range(last - 4, last + 1)), (
                "whoever is back misses nothing"
            )
            assert len(visitor.gaps) >= 2
