"""The announcer: what is stale is told to all nodes, for as long as it takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import transaction

from django_pgnotify.epochs.names import EVERYTHING, INVALIDATIONS
from django_pgnotify.epochs.node import node_table
from django_pgnotify.publishing import announcer as announcer_module
from django_pgnotify.publishing.announcer import NAMES_PER_EVENT, Announcer
from django_pgnotify.publishing.sender import send_by_notify
from django_pgnotify.wire import decode_frame
from tests.integration.caching import DEADLINE, near_caches, until
from tests.integration.recording import dsn, query
from tests.integration.redirecting import new_connections
from tests.processes import database_environ, python
from tests.proxy import TCPProxy

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path) -> Iterator[None]:
    with near_caches(settings, tmp_path):
        yield


@pytest.fixture
def announcer() -> Iterator[Announcer]:
    one = Announcer()
    yield one
    one.close(DEADLINE)


class Ear:
    """A connection that hears announcements."""

    def __init__(self) -> None:
        self.connection = psycopg.connect(dsn(), autocommit=True)
        self.connection.execute(f'LISTEN "{INVALIDATIONS}"')
        self.names: list[str] = []
        self.events = 0

    def has_heard(self, *names: str) -> bool:
        for notify in self.connection.notifies(timeout=0.05):
            for event in decode_frame(notify.payload).events:
                self.events += 1
                self.names += event["data"]["names"]
                assert event["data"]["table"] == f"{node_table().id:x}"
        return set(names) <= set(self.names)


@pytest.fixture
def ear() -> Iterator[Ear]:
    one = Ear()
    yield one
    one.connection.close()


def test_names_are_announced_once_each_and_not_as_part_of_a_transaction(
    announcer: Announcer, ear: Ear
) -> None:
    with transaction.atomic():
        announcer.put(["a", "b"])
        announcer.put(["a"])
        until(lambda: ear.has_heard("a", "b"))
        transaction.set_rollback(True)
    assert announcer.flush(DEADLINE)
    many = [f"n{number}" for number in range(3 * NAMES_PER_EVENT)]
    announcer.put(many)
    until(lambda: ear.has_heard(*many))
    assert len(ear.names) == len(set(ear.names)) + ear.names.count("a") - 1


def test_while_the_server_cannot_be_reached_names_wait(
    announcer: Announcer, ear: Ear, proxy: TCPProxy
) -> None:
    with new_connections(HOST=proxy.host, PORT=str(proxy.port)):
        proxy.close()
        announcer.put(["a"])
        assert not announcer.flush(0.3)
        announcer.put(["b"])
        proxy.open()
        until(lambda: ear.has_heard("a", "b"))
        assert announcer.flush(DEADLINE)


def test_what_was_under_way_when_the_connection_broke_is_sent_again(
    announcer: Announcer, ear: Ear, proxy: TCPProxy
) -> None:
    with new_connections(HOST=proxy.host, PORT=str(proxy.port)):
        announcer.put(["a"])
        until(lambda: ear.has_heard("a"))
        proxy.swallow()
        announcer.put(["b"])
        until(lambda: ear.has_heard("b"))  # it has arrived, but who sent it cannot know
        heard = ear.names.count("b")
        proxy.end_swallowing()
        assert announcer.flush(DEADLINE)
        until(lambda: ear.has_heard("b") and ear.names.count("b") > heard)


def test_too_many_names_are_everything(
    announcer: Announcer, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer_module, "MOST_NAMES", 10)
    announcer.put([f"n{number}" for number in range(11)])
    until(lambda: ear.has_heard(EVERYTHING))


def test_a_commit_in_doubt_is_announced_when_its_server_process_is_gone(
    announcer: Announcer, ear: Ear
) -> None:
    """And bumped once more here: what was filled since the doubt may be what it has replaced."""
    with psycopg.connect(dsn(), autocommit=True) as other:
        pid = other.info.backend_pid
        announcer.put(["doubtful"], behind=pid)
        announcer.put(["certain"])
        until(lambda: ear.has_heard("certain"))
        assert not announcer.flush(0.3)
        assert "doubtful" not in ear.names
        filled = node_table().capture(["doubtful"])
    until(lambda: ear.has_heard("doubtful"))
    assert not node_table().is_current(filled)
    assert announcer.flush(DEADLINE)


def test_an_idle_announcer_keeps_no_connection(announcer: Announcer, ear: Ear) -> None:
    def connections() -> int:
        [(number,)] = query(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return int(number)

    before = connections()
    announcer.put(["a"])
    until(lambda: ear.has_heard("a"))
    until(lambda: connections() == before)
    announcer.put(["b"])
    until(lambda: ear.has_heard("b"))


# -- close ------------------------------------------------------------------------------------


class Held(Announcer):
    """An announcer without a database, whose thread stops where the test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self._registered = True
        self.sent: list[str] = []
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.hangs = self.hangs_at_end = False
        self.fails = False

    def _send(
        self, names: dict[str, None], doubtful: list[tuple[int, frozenset[str]]]
    ) -> list[tuple[int, frozenset[str]]]:
        if self.hangs:
            self.wait()
        if self.fails:
            raise RuntimeError("as asked")
        self.sent += names
        return []

    def wait(self) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE)

    def _disconnect(self) -> None:
        if self.hangs_at_end and self._ending:
            self.wait()


@pytest.fixture
def held() -> Iterator[Held]:
    one = Held()
    yield one
    one.go_on.set()
    one.close(DEADLINE)


def test_what_a_thread_has_in_hand_when_close_gives_up_is_told_and_not_put_back(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    held.hangs = held.fails = True
    held.put(["a", "b"])
    held.put(["doubtful"], behind=1)
    assert held.reached.wait(DEADLINE)
    thread = held._thread
    assert thread is not None
    held.close(0.05)
    assert "3 invalidation(s) could not be told" in caplog.text
    held.hangs = held.fails = False
    held.put(["c"])
    assert held.flush(DEADLINE)
    held.hangs = held.fails = True
    held.go_on.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert held.sent == ["c"]
    assert held.flush(0)


def test_what_is_put_while_the_thread_ends_is_told_to_others(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    held.put(["a"])
    assert held.flush(DEADLINE)
    held.hangs_at_end = True
    closing = threading.Thread(target=held.close, args=(DEADLINE,))
    closing.start()
    assert held.reached.wait(DEADLINE)  # it has looked for the last time
    held.hangs_at_end = False
    held.put(["b"])
    held.go_on.set()
    closing.join(DEADLINE)
    assert held.flush(DEADLINE)
    assert held.sent == ["a", "b"]
    assert "could not be told" not in caplog.text


def test_an_orphan_does_not_close_its_successors_connection(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hang(events: Any, using: str) -> None:
        if events[0] == "hangs":
            reached.set()
            assert go_on.wait(DEADLINE)
        else:
            send_by_notify(events, using)

    def events_of(names: list[str]) -> list[Any]:
        return ["hangs"] if names == ["a"] else real(names)

    real = announcer_module._events
    monkeypatch.setattr(announcer_module, "_events", events_of)
    monkeypatch.setattr(announcer_module, "send_by_notify", hang)
    one = Announcer()
    one.put(["a"])
    assert reached.wait(DEADLINE)
    orphan = one._thread
    assert orphan is not None
    one.close(0.05)
    one.put(["b"])
    until(lambda: ear.has_heard("b"))
    assert one.flush(DEADLINE)
    go_on.set()
    orphan.join(DEADLINE)
    one.put(["c"])
    until(lambda: ear.has_heard("c"))
    one.close(DEADLINE)
    assert ear.names == ["b", "c"]


# Puts names and ends, or forks and lets the child do so.
ENDS = """
import json, os, sys
from django.conf import settings
settings.DATABASE_ROUTERS = []
settings.PGNOTIFY_EPOCH_TABLE = sys.argv[1]
import django
django.setup()
from django_pgnotify.publishing.announcer import announcer
if "fork" in sys.argv:
    announcer.put(["of the parent"])
    announcer.flush(30)
    pid = os.fork()
    if pid == 0:
        announcer.put(["of the child"])
        sys.exit(0)
    os.waitpid(pid, 0)
if "multiprocessing" in sys.argv:
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(
        target=announcer.put, args=(["of the child"],)
    )
    child.start()
    child.join()
announcer.put(["at the end"])
"""


@pytest.mark.parametrize("way", ["plain", "fork", "multiprocessing"])
def test_a_process_that_ends_has_told_what_it_had_to(settings: Any, ear: Ear, way: str) -> None:
    expected = ["at the end"] + (["of the child"] if way != "plain" else [])
    with python(
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        ENDS,
        settings.PGNOTIFY_EPOCH_TABLE,
        way,
        env=database_environ(),
    ) as process:
        assert process.wait() == 0, process.report()
        assert process.stderr == ""
    until(lambda: ear.has_heard(*expected))
