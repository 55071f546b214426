"""NearCache in real processes: forked and spawned ones, and tables that each process has alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from django_pgnotify.caching import get_or_set, invalidate_tags, lookup
from django_pgnotify.caching.level import MISSING
from django_pgnotify.epochs.node import node_table
from tests.integration.caching import DEADLINE, NEAR, near_caches, until
from tests.processes import Process, database_environ, python
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

SETTINGS = """
import json, os, sys
from django.conf import settings
for name, value in json.loads(sys.argv[1]).items():
    setattr(settings, name, value)
settings.DATABASE_ROUTERS = []
import django
django.setup()
"""

# Loads a value, forks workers, and each of them answers on a socket of its own.
WORKERS = (
    SETTINGS
    + """
from multiprocessing.connection import Listener
from django.core.cache import caches
from django.db import connections
from django_pgnotify.caching import cached
from tests.testapp.models import Order

near = caches["near"]
loads = 0

@cached(key="orders", depends_on=[Order], cache="near", timeout=None)
def orders():
    global loads
    loads += 1
    return Order.objects.count()

def answer(what, *arguments):
    if what == "orders":
        return orders()
    if what == "create":
        return Order.objects.create().pk
    if what == "loads":
        return loads
    if what == "set":
        return near.set(*arguments)
    if what == "get":
        return near.get(*arguments)
    if what == "stats":
        return near.stats()

if "warm" in sys.argv:
    orders()
connections.close_all()

for path in sys.argv[2].split():
    if os.fork() == 0:
        with Listener(path, "AF_UNIX") as listener:
            os.write(1, f"ready {path}\\n".encode())  # at once, beside the others
            with listener.accept() as connection:
                while (asked := connection.recv()) is not None:
                    connection.send(answer(*asked))
        os._exit(0)
try:
    for _ in sys.argv[2].split():
        os.wait()
except ChildProcessError:
    pass
"""
)

PGLISTEN = (
    SETTINGS
    + """
from django.core.management import call_command
call_command("pglisten")
"""
)


class Worker:
    """A process that answers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self, *asked: Any) -> Any:
        self._connection.send(asked)
        assert self._connection.poll(DEADLINE), f"no answer to {asked}"
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._connection.close()


@pytest.fixture
def chosen(settings: Any, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The settings that all processes of the test have."""
    with near_caches(settings, tmp_path):
        yield {name: getattr(settings, name) for name in ("CACHES", "PGNOTIFY_EPOCH_TABLE")}


@contextmanager
def workers(
    folder: Path, number: int, chosen: dict[str, Any], *options: str
) -> Iterator[list[Worker]]:
    """Forked workers of one process of its own."""
    paths = [str(folder / f"worker{place}") for place in range(number)]
    arguments = (json.dumps(chosen), " ".join(paths), *options)
    ignore = ("-W", "ignore::DeprecationWarning")  # to fork beside a thread
    with ExitStack() as stack:
        process = stack.enter_context(
            python(*ignore, "-c", WORKERS, *arguments, env=database_environ())
        )
        found = []
        for path in paths:
            process.wait_for_line(f"^ready {path}")
            worker = Worker(stack.enter_context(Client(path, "AF_UNIX")))
            stack.callback(worker.close)
            found.append(worker)
        yield found


@contextmanager
def pglisten(chosen: dict[str, Any]) -> Iterator[Process]:
    table = node_table()
    before = table.heartbeat
    with python("-c", PGLISTEN, json.dumps(chosen), env=database_environ()) as process:
        process.wait_for_line("^pglisten: ready")
        until(lambda: table.heartbeat > before)
        yield process


def test_forked_workers_use_what_their_parent_had_and_see_every_change_at_once(
    chosen: dict[str, Any], tmp_path: Path
) -> None:
    with pglisten(chosen) as process, workers(tmp_path, 3, chosen, "warm") as forked:
        assert [ask("orders") for ask in forked] == [0, 0, 0]
        assert [ask("loads") for ask in forked] == [1, 1, 1], "their parent's"
        Order.objects.create()  # by another process of the node: this one
        assert [ask("orders") for ask in forked] == [1, 1, 1]
        first, *others = forked
        first("create")
        assert [ask("orders") for ask in others] == [2, 2]
        assert get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near") == 2
        # Somebody who knows nothing of us: they hear of it by pglisten.
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM testapp_order")
        invalidate_tags("model:testapp.order")
        assert [ask("orders") for ask in forked] == [0, 0, 0]
        assert process.terminate() == 0


def test_what_one_worker_sets_another_does_not_keep(chosen: dict[str, Any], tmp_path: Path) -> None:
    with pglisten(chosen), workers(tmp_path, 2, chosen) as (one, other):
        one("set", "a", 1)
        assert other("get", "a") is None
        other("set", "a", 1)
        assert one("get", "a") == 1, "a fill: the same again"
        other("set", "a", 2)
        assert one("get", "a") is None
        assert other("get", "a") == 2


def test_while_pglisten_is_stopped_caches_are_bypassed_and_after_it_goes_on_they_are_not(
    settings: Any, chosen: dict[str, Any], tmp_path: Path
) -> None:
    caches = {**chosen["CACHES"], "near": {"BACKEND": NEAR, "OPTIONS": {"MAX_STALENESS": 0.6}}}
    settings.CACHES = caches
    chosen = {**chosen, "CACHES": caches}
    with pglisten(chosen) as process, workers(tmp_path, 1, chosen) as (ask,):
        ask("orders")
        until(lambda: ask("orders") == 0 and ask("stats")["hits"] > 0)
        process.signal(signal.SIGSTOP)
        try:
            until(lambda: node_table().age() > 0.6)
            before = ask("loads")
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO testapp_order SELECT 1, 'new', 0, '', now()")
            assert ask("orders") == 1, "nobody told it; it did not look into the cache"
            assert ask("loads") == before + 1
            assert ask("stats")["bypassed"] > 0
        finally:
            process.signal(signal.SIGCONT)
        hits = ask("stats")["hits"]
        until(lambda: ask("orders") == 1 and ask("stats")["hits"] > hits)


def test_a_pglisten_that_is_killed_and_started_again_makes_what_was_before_stale(
    chosen: dict[str, Any], tmp_path: Path
) -> None:
    with pglisten(chosen) as process, workers(tmp_path, 1, chosen) as (ask,):
        assert ask("orders") == 0
        process.kill()
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO testapp_order SELECT 1, 'new', 0, '', now()")
        assert ask("orders") == 0, "within MAX_STALENESS, as promised"
        with pglisten(chosen):
            assert ask("orders") == 1


def test_without_a_shared_file_each_process_listens_for_itself_forked_ones_too(
    settings: Any, chosen: dict[str, Any], tmp_path: Path
) -> None:
    chosen = {**chosen, "PGNOTIFY_EPOCH_TABLE": None, "PGNOTIFY_MAX_STALENESS": 10.0}
    with workers(tmp_path, 2, chosen, "warm") as forked:
        one, other = forked
        until(lambda: one("orders") == 0 and one("stats")["hits"] > 0)
        until(lambda: other("orders") == 0 and other("stats")["hits"] > 0)
        Order.objects.create()
        until(lambda: one("orders") == other("orders") == 1)
        one("create")
        assert one("orders") == 2, "its own write"
        until(lambda: other("orders") == 2)


def test_this_process_listens_for_itself_too(settings: Any, tmp_path: Path) -> None:
    from django_pgnotify.listening.background import stop_all

    with near_caches(settings, tmp_path):
        settings.PGNOTIFY_EPOCH_TABLE = None
        try:
            get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
            until(lambda: node_table().heartbeat)
            get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
            assert lookup("near", "orders") == 0
            Order.objects.create()
            assert lookup("near", "orders") is MISSING
        finally:
            stop_all()
