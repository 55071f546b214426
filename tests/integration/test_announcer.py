"""The announcer: what is stale is told to all nodes, for as long as it takes."""

from __future__ import annotations

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


# Puts names and ends, or forks and lets the child do so.
ENDS = """
import json, os, sys
from django.conf import settings
settings.DATABASE_ROUTERS = []
settings.PGNOTIFY_EPOCH_TABLE = sys.argv[1]
settings.PGNOTIFY_EPOCH_SLOTS = 4096
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
