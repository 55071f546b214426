"""Durable topics across processes: writers and listeners that are killed, a server that crashes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from django_pgnotify import Topic, publish, publish_many
from django_pgnotify.models import LoggedEvent
from tests.processes import DEADLINE, Process, database_environ, manage, python

if TYPE_CHECKING:
    from example_project.embedded import EmbeddedPostgres

pytestmark = pytest.mark.django_db(transaction=True)

LEDGER = Topic("ledger", delivery="durable")
READY = r"^pglisten: ready "
DURABLE: dict[str, str | None] = {"PGNOTIFY_TEST_DURABLE": "1", "PGNOTIFY_TEST_RECEIVERS": None}

WRITER_THAT_DIES = """
import os, signal
import django
django.setup()
from django.db import connection, transaction
from django_pgnotify import Topic, publish
from django_pgnotify.publishing.sender import NotifyTransport

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

NotifyTransport.send = die
# Where somebody watches the statements the NOTIFY does not ride with the COMMIT: it comes behind.
with connection.execute_wrapper(lambda execute, *args: execute(*args)), transaction.atomic():
    publish(Topic("ledger", delivery="durable"), "committed", key="k")
print("not reached")
"""


@contextlib.contextmanager
def pglisten(*args: str, env: dict[str, str | None] | None = None) -> Iterator[Process]:
    with manage("pglisten", *args, env=DURABLE | (env or {})) as process:
        process.wait_for_line(READY)
        yield process


def received(process: Process) -> list[object]:
    lines = re.findall(r"^received ledger (.*)$", process.stdout, re.MULTILINE)
    return [json.loads(line)["data"] for line in lines]


def which_holds(first: Process, second: Process, pattern: str) -> tuple[Process, Process]:
    """The one of two that prints a line, and the other; whichever is first."""
    deadline = time.monotonic() + DEADLINE
    while True:
        for process, other in ((first, second), (second, first)):
            try:
                process.wait_for_line(pattern, timeout=0.2)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            else:
                return process, other


def test_a_writer_killed_between_commit_and_notify_is_heard_by_the_next_sweep() -> None:
    with pglisten() as listener:
        environ = {"DJANGO_SETTINGS_MODULE": "tests.settings", **database_environ()}
        with python("-c", WRITER_THAT_DIES, env=environ) as writer:
            assert writer.wait() == -signal.SIGKILL
            assert "not reached" not in writer.stdout
        assert LoggedEvent.objects.count() == 1
        listener.wait_for_line('^received ledger .*"committed"')
        assert listener.terminate() == 0


def test_a_listener_killed_in_the_middle_is_taken_over_and_loses_nothing(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with pglisten() as first, pglisten() as second:
        publish_many(LEDGER, [1, 2, {"gate": str(gate)}, 4], key="k")
        process, other = which_holds(first, second, "^received ledger .*gate")
        assert received(process)[-1] == {"gate": str(gate)}
        process.kill()
        other.wait_for_line("^received ledger .*gate")
        gate.write_text("")
        other.wait_for_line('^received ledger .*"data": 4,')
        assert received(other)[-2:] == [{"gate": str(gate)}, 4]
        assert other.terminate() == 0


def test_sigterm_stores_the_cursor_behind_the_event_at_hand(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with pglisten() as first:
        publish_many(LEDGER, [1, {"gate": str(gate)}, 3])
        first.wait_for_line("^received ledger .*gate")
        first.signal(signal.SIGTERM)
        first.wait_for_line("SIGTERM")
        gate.write_text("")
        assert first.wait() == 0
        assert received(first) == [1, {"gate": str(gate)}]
    with pglisten() as second:
        second.wait_for_line('^received ledger .*"data": 3,')
        assert received(second) == [3]


def test_a_consumer_that_does_not_finish_in_time_is_given_up_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with pglisten("--shutdown-timeout", "0.2") as process:
        publish(LEDGER, {"gate": str(gate)})
        process.wait_for_line("^received ledger .*gate")
        process.signal(signal.SIGTERM)
        assert process.wait() == 1


def test_a_server_stopped_at_once_under_load_loses_nothing_that_was_committed(
    start_server: Callable[..., EmbeddedPostgres],
) -> None:
    server = start_server()
    url = server.create_database("ledger")
    env: dict[str, str | None] = {"DATABASE_URL": url, "OTHER_DATABASE_URL": url}
    with manage("migrate", "django_pgnotify", env=env) as migrate:
        assert migrate.wait(timeout=60) == 0, migrate.report()
    with pglisten(env=env) as listener:
        stopping, written = threading.Event(), threading.Semaphore(0)
        writers = [
            threading.Thread(target=_write, args=(url, number, stopping, written))
            for number in range(4)
        ]
        for writer in writers:
            writer.start()
        for _ in range(2):
            for _ in range(400):
                assert written.acquire(timeout=30)
            server.restart("immediate")
        for _ in range(400):
            assert written.acquire(timeout=30)
        stopping.set()
        for writer in writers:
            writer.join()
        with psycopg.connect(url, autocommit=True) as last:
            _insert(last, "the end")
            listener.wait_for_line('^received ledger .*"the end"', timeout=60)
            rows = last.execute("SELECT body::json ->> 'data' FROM pgnotify_event_log").fetchall()
        committed = {data for (data,) in rows}
        assert len(committed) >= 1200
        assert committed - {str(data) for data in received(listener)} == set()
        assert {str(data) for data in received(listener)} - committed == set()


def _write(url: str, number: int, stopping: threading.Event, written: threading.Semaphore) -> None:
    """Write numbered events until told to stop, connecting again whenever the server is back."""
    count = 0
    while not stopping.is_set():
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
                while not stopping.is_set():
                    count += 1
                    _insert(connection, f"{number}-{count}")
                    written.release()
        except psycopg.OperationalError:
            continue


def _insert(connection: psycopg.Connection, data: str) -> None:
    connection.execute(
        "INSERT INTO pgnotify_event_log (topic, source, body)"
        " VALUES ('ledger', 'test', json_build_object('data', %s::text)::text)",
        [data],
    )
