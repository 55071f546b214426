"""What publishing tests listen with: a plain connection that needs no listener of the package.

Nothing here waits by sleeping. NOTIFY arrives in commit order, so :meth:`Ear.frames` sends a fence
of its own: once that is heard, everything that was committed before has been heard too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import psycopg
from django.db import connections
from django.test.utils import CaptureQueriesContext
from psycopg import sql

from django_pgnotify import Event, signing
from django_pgnotify.conf import conf
from django_pgnotify.decoding import event_from, foreign_event
from django_pgnotify.listening.intake import resolve_row
from django_pgnotify.listening.parameters import connection_params
from django_pgnotify.publishing.store import fetch
from django_pgnotify.wire import decode_frame, reference_in, stored_body, wire_channel

DEADLINE = 30.0
_FENCE = "tests.fence"


class Heard(NamedTuple):
    """One NOTIFY."""

    channel: str
    payload: str
    backend: int


class Ear:
    """Hears the NOTIFYs of some topics on one database. See :func:`hearing`."""

    def __init__(self, using: str, topics: tuple[str, ...]) -> None:
        self.using = using
        self.topics = {wire_channel(topic, conf.CHANNEL_PREFIX): topic for topic in topics}
        self._inbox: list[Heard] = []
        self._connection = psycopg.connect(**connection_params(using), autocommit=True)
        self._connection.add_notify_handler(
            lambda notify: self._inbox.append(Heard(notify.channel, notify.payload, notify.pid))
        )
        for channel in (*self.topics, _FENCE):
            self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def close(self) -> None:
        self._connection.close()

    def frames(self) -> list[Heard]:
        """What was committed up to now and not returned before, in order."""
        nonce = secrets.token_hex(8)
        self._connection.execute("SELECT pg_notify(%s, %s)", (_FENCE, nonce))
        deadline = time.monotonic() + DEADLINE
        while not any(heard[:2] == (_FENCE, nonce) for heard in self._inbox):
            assert time.monotonic() < deadline, "not even our own NOTIFY came back"
            self._connection.execute("SELECT 1")
        heard, self._inbox = self._inbox, []
        return [one for one in heard if one.channel != _FENCE]

    def events(self) -> list[Event]:
        """As :meth:`frames`, decoded; a frame that is broken fails the test."""
        return [event for heard in self.frames() for event in self.decode(heard)]

    def event(self) -> Event:
        """The one event there is."""
        events = self.events()
        assert len(events) == 1, f"{len(events)} events: {events}"
        return events[0]

    def data(self) -> list[Any]:
        return [event.data for event in self.events()]

    def decode(self, heard: Heard) -> list[Event]:
        frame = decode_frame(heard.payload, heard.channel, signing.verify if conf.SIGNING else None)
        about: dict[str, Any] = {
            "topic": self.topics[heard.channel],
            "source": frame.source or f"backend:{heard.backend}",
            "received_at": datetime.now(UTC),
            "using": self.using,
        }
        if frame.foreign:
            return [foreign_event(frame.events[0], **about)]
        events = []
        for raw in frame.events:
            reference = reference_in(raw)
            if reference is not None:
                body = fetch([reference.row], self.using)[reference.row]
                raw = stored_body(body, reference.digest)  # noqa: PLW2901
            events.append(event_from(raw, resolve=resolve_row, **about))
        return events

    def execute(self, statement: str, *params: Any) -> Any:
        """One value, asked for on this connection."""
        row = self._connection.execute(statement.encode(), params).fetchone()
        return None if row is None else row[0]


@contextmanager
def hearing(*topics: str, using: str = "default") -> Iterator[Ear]:
    """Listen from here on."""
    ear = Ear(using, topics)
    try:
        yield ear
    finally:
        ear.close()


class Statements:
    """The statements that a block ran on a connection."""

    def __init__(self, captured: CaptureQueriesContext) -> None:
        self._captured = captured

    @property
    def all(self) -> list[str]:
        return [query["sql"] for query in self._captured.captured_queries]

    @property
    def notify(self) -> list[str]:
        return [statement for statement in self.all if "pg_notify(" in statement]


@contextmanager
def statements(using: str = "default") -> Iterator[Statements]:
    with CaptureQueriesContext(connections[using]) as captured:
        yield Statements(captured)


def before_anything_else(hook: Callable[[], object], using: str = "default") -> None:
    """Have ``hook`` run right after the commit, ahead even of the hooks of the commit buffer."""
    connections[using].run_on_commit.insert(0, (set(), hook, True))  # type: ignore[arg-type]


def by_hook(using: str = "default") -> AbstractContextManager[None]:
    """Have events leave by the hook behind COMMIT: none rides while somebody wraps statements."""
    return connections[using].execute_wrapper(lambda execute, *args: execute(*args))


@contextmanager
def full_queue(at: Literal["the call", "the commit"], using: str = "default") -> Iterator[None]:
    """Have NOTIFY fail on the Django connection of this thread, as if the queue were full.

    PostgreSQL finds it full at the commit, when ``pg_notify`` has been answered.
    """
    notify = "RAISE 'too many notifications in the NOTIFY queue';"
    setup = "CREATE SCHEMA full_queue"
    if at == "the commit":
        setup += (
            " CREATE TABLE full_queue.notified ();"
            f"CREATE FUNCTION full_queue.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$BEGIN {notify} END$$;"
            "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON full_queue.notified DEFERRABLE"
            " INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION full_queue.refuse()"
        )
        notify = "INSERT INTO full_queue.notified DEFAULT VALUES;"
    connection = connections[using]
    with connection.cursor() as cursor:
        cursor.execute(
            f"{setup}; CREATE FUNCTION full_queue.pg_notify(text, text) RETURNS void"
            f" LANGUAGE plpgsql AS $$BEGIN {notify} END$$;"
            "SET search_path = full_queue, pg_catalog, public"
        )
    try:
        yield
    finally:
        connection.close()
        with connection.cursor() as cursor:
            cursor.execute("DROP SCHEMA full_queue CASCADE")


def terminate_own_backend(using: str = "default") -> None:
    """Really end the Django connection of this thread, from outside, and wait until it is gone."""
    raw = connections[using].connection
    with psycopg.connect(**connection_params(using), autocommit=True) as other:
        row = other.execute(
            "SELECT pg_terminate_backend(%s, 10000)", (raw.info.backend_pid,)
        ).fetchone()
        assert row == (True,)
