"""What tests of listening and dispatching wait on: each wait ends with what it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self

import psycopg
from django.db import connection, connections, transaction

from django_pgnotify import Event, signals
from django_pgnotify.listening.connection import Notification
from django_pgnotify.listening.listener import Listener
from django_pgnotify.testing import RunningListener
from tests.settings import database_url

#: Seconds a wait may take. Generous: it is spent only by a test that fails.
DEADLINE = 45.0


class Recorder:
    """A receiver that keeps the events it is called with, from any thread."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, count: int, timeout: float = DEADLINE) -> list[Event]:
        """The events once there are ``count``."""
        return self.wait_until(lambda events: len(events) >= count, timeout)

    def wait_until(
        self, met: Callable[[list[Event]], bool], timeout: float = DEADLINE
    ) -> list[Event]:
        with self._changed:
            done = self._changed.wait_for(lambda: met(self.events), timeout)
            events = list(self.events)
        assert done, f"not within {timeout:g} s; heard {events}"
        return events

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.events]


class Gate:
    """Receivers wait in it until the test opens it, and the test waits until they are in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self.inside = 0
        self.most = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def pass_through(self, event: Event | None = None) -> None:
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open, DEADLINE)
            self.inside -= 1

    async def apass_through(self, event: Event | None = None) -> None:
        await asyncio.to_thread(self.pass_through)

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside >= count, DEADLINE), self.inside


@contextlib.contextmanager
def failures() -> Iterator[list[dict[str, Any]]]:
    """What ``receiver_failed`` told."""
    told: list[dict[str, Any]] = []

    def keep(sender: Any, **kwargs: Any) -> None:
        told.append({"sender": sender, **kwargs})

    signals.receiver_failed.connect(keep)
    try:
        yield told
    finally:
        signals.receiver_failed.disconnect(keep)


def stats(listener: RunningListener) -> Any:
    assert listener.service is not None
    return listener.service.stats


class Entry(NamedTuple):
    """One thing that a listener told its sink."""

    kind: str
    value: Any = None


class Sink:
    """A listener's sink that keeps everything in order, for tests on the same loop."""

    def __init__(self) -> None:
        self.log: list[Entry] = []
        self._waiters: list[asyncio.Event] = []

    def established(self, channels: frozenset[str]) -> None:
        self._add("established", channels)

    def notified(self, notifications: Sequence[Notification]) -> None:
        for notification in notifications:
            self._add("heard", notification.payload.decode())

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        self._add("leader's gap" if for_leader else "gap", (since, until, cause))

    def led(self, leader: bool) -> None:
        self._add("led", leader)

    def lost(self, cause: str, retry_in: float) -> None:
        self._add("lost", (cause, retry_in))

    def status(self) -> dict[str, Any]:
        return {"topics": []}

    def _add(self, kind: str, value: Any) -> None:
        self.log.append(Entry(kind, value))
        for waiter in self._waiters:
            waiter.set()

    @property
    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.log]

    def of(self, kind: str) -> list[Any]:
        return [entry.value for entry in self.log if entry.kind == kind]

    async def until(self, kind: str, count: int = 1, timeout: float = DEADLINE) -> Any:
        """The value of the ``count``-th entry of this kind."""
        return (await self.all_of(kind, count, timeout))[count - 1]

    async def all_of(self, kind: str, count: int, timeout: float = DEADLINE) -> list[Any]:
        changed = asyncio.Event()
        self._waiters.append(changed)
        try:
            async with asyncio.timeout(timeout):
                while len(self.of(kind)) < count:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {count} of {kind!r}; the log is {self.log}") from None
        finally:
            self._waiters.remove(changed)
        return self.of(kind)


@contextlib.asynccontextmanager
async def running(listener: Listener) -> AsyncIterator[asyncio.Task[None]]:
    """Run a listener for the length of the block."""
    task = asyncio.create_task(listener.run(), name="listener under test")
    try:
        yield task
    finally:
        listener.stop()
        async with asyncio.timeout(DEADLINE):
            await task


def dsn(alias: str = "default") -> str:
    """URL of the test database behind an alias."""
    return database_url(connections[alias].settings_dict)


@contextlib.asynccontextmanager
async def client(url: str | None = None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of somebody else's, in autocommit."""
    async with await psycopg.AsyncConnection.connect(url or dsn(), autocommit=True) as other:
        yield other


async def anotify(other: psycopg.AsyncConnection[Any], channel: str, *payloads: str) -> None:
    """NOTIFY each payload in one transaction."""
    await other.execute(
        "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload",
        [channel, list(payloads)],
    )


async def aterminate(other: psycopg.AsyncConnection[Any], pid: int | None) -> None:
    """End a backend, and wait for its end."""
    assert pid is not None
    row = await (await other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])).fetchone()
    assert row == (True,)


def notify(channel: str, *payloads: str) -> None:
    """NOTIFY each payload on Django's connection, as a program that knows nothing of us."""
    query(
        "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload", channel, list(payloads)
    )


def terminate(pid: int | None) -> None:
    """End a backend, and wait for its end."""
    assert pid is not None
    assert query("SELECT pg_terminate_backend(%s, 5000)", pid) == [(True,)]


@contextlib.contextmanager
def stored_events_locked() -> Iterator[Callable[[], None]]:
    """Until the end of the block nobody can fetch a stored event; call it to wait for who tries."""
    with psycopg.connect(dsn()) as other:
        other.execute("LOCK TABLE pgnotify_stored_event IN ACCESS EXCLUSIVE MODE")

        def wait_for_a_fetch() -> None:
            deadline = time.monotonic() + DEADLINE
            while not other.execute(
                "SELECT FROM pg_locks WHERE NOT granted"
                " AND relation = 'pgnotify_stored_event'::regclass"
            ).fetchall():
                assert time.monotonic() < deadline

        yield wait_for_a_fetch
        other.rollback()


def query(statement: str, *params: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def other_backends() -> list[tuple[int, str]]:
    """Backends of Django's connections to this database other than the caller's: pid, query."""
    return query(
        "SELECT pid, query FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        " AND application_name <> 'pglisten' ORDER BY pid"
    )


def backends_of_listeners() -> list[int]:
    """Pids of the backends that serve a listening connection to this database."""
    rows = query(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'pglisten' ORDER BY pid"
    )
    return [pid for (pid,) in rows]


@contextlib.contextmanager
def rolled_back(using: str = "default") -> Iterator[None]:
    """A transaction, or a savepoint, that is rolled back at the end of the block."""
    with transaction.atomic(using):
        yield
        transaction.set_rollback(True, using)


@contextlib.contextmanager
def alias_at(alias: str, **changes: Any) -> Iterator[str]:
    """A further alias for the default test database, reached in another way."""
    databases: dict[str, Any] = connections.settings
    default = connections["default"].settings_dict
    databases[alias] = {**default, "OPTIONS": {**default["OPTIONS"]}, **changes}
    try:
        yield alias
    finally:
        if connections[alias].connection is not None:
            connections[alias].close()
        del connections[alias]
        del databases[alias]
