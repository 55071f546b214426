"""What the caches of a node's processes count, as ``pgnotify_status`` shows it."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from django.db import connection

from django_pgnotify.epochs.clock import NANOSECONDS, node_clock
from django_pgnotify.epochs.counts import node_counts
from django_pgnotify.epochs.table import EpochTable
from tests.processes import DEADLINE, Process, database_environ, manage, python, run

pytestmark = pytest.mark.django_db(transaction=True)

# A web process: has so many hits, and then a stale value, because it changes a row.
WEB = """
import sys, time
import django
django.setup()
from django.core.cache import caches
from django_pgnotify.caching import cached
from tests.testapp.models import Order

@cached(depends_on=[Order], cache="near", tags=["orders"])
def orders():
    return Order.objects.count()

def ask_until(met):
    deadline = time.monotonic() + 60
    while not met(caches["near"].stats()):
        assert time.monotonic() < deadline, caches["near"].stats()
        orders()

ask_until(lambda stats: stats["hits"] >= int(sys.argv[1]))
Order.objects.create()
ask_until(lambda stats: stats["stale"])
print("counted", caches["near"].stats()["hits"], flush=True)
"""


# A process that has used its caches, as one that preloads, and then forks.
FORKING = """
import os, sys
import django
django.setup()
from django_pgnotify.caching import cached

@cached(key="a", cache="near", tags=["t"])
def near():
    return 1

@cached(key="b", cache="local", tags=["t"])
def local():
    return 1

def use(times):
    for _ in range(times):
        near(), local()

use(11)  # one miss, ten hits
if os.fork() == 0:
    use(5)
    sys.exit()
os.wait()
use(2)
"""


# A child of multiprocessing, as those of ProcessPoolExecutor: it runs no exit handlers.
POOLED = """
import multiprocessing
import django
django.setup()
from django_pgnotify.caching import cached

@cached(key="a", cache="near")
def near():
    return 1

def use():
    for _ in range(11):
        near()

child = multiprocessing.get_context("fork").Process(target=use)
child.start()
child.join()
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str | None]:
    return {
        **database_environ(),
        "DJANGO_SETTINGS_MODULE": "tests.process.near_settings",
        "EPOCH_TABLE": str(tmp_path / "epochs"),
    }


def status(environ: dict[str, str | None], *args: str) -> Process:
    return run("pgnotify_status", *args, env=environ)


def test_the_counts_of_all_processes_of_the_node_are_shown_and_outlive_them(
    environ: dict[str, str | None], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(manage("pglisten", env=environ))
        listener.wait_for_line(r"^pglisten: ready .* topic\(s\), \d+ more for caches, ")
        hits = 0
        webs = [stack.enter_context(python("-c", WEB, str(n), env=environ)) for n in (20, 30)]
        for web in webs:
            hits += int(web.wait_for_line(r"^counted (\d+)")[1])
            assert web.wait() == 0, web.report()
        answer = json.loads(status(environ, "--json").stdout)
        table = status(environ).stdout
    [node] = answer["caches"]
    assert node["path"] == str(tmp_path / "epochs")
    assert node["problem"] is None
    assert node["age"] < DEADLINE
    near = node["caches"]["near"]
    assert near["hits"] == hits >= 50
    assert near["stale"] >= 2
    assert near["tags"]["orders"]["hits"] == near["tags"]["model:testapp.order"]["hits"] == hits
    assert "processes" not in near, "they have ended"
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["near"][4] == str(hits)
    assert rows["orders"][:4] == ["orders", "near", node["node"], str(hits)]
    assert f"epoch table of {node['node']}: {tmp_path / 'epochs'}, up to date" in table


def test_the_caches_of_this_node_are_shown_when_no_pglisten_answers(
    environ: dict[str, str | None], tmp_path: Path
) -> None:
    with python("-c", FORKING, env={**environ, "NEVER_BYPASSED": "1"}) as process:
        assert process.wait() == 0, process.report()
    asked, table = status(environ, "--json"), status(environ)
    assert asked.returncode == table.returncode == 1
    [node] = json.loads(asked.stdout)["caches"]
    assert (node["path"], node["age"], node["problem"]) == (str(tmp_path / "epochs"), None, None)
    assert node["caches"]["near"]["hits"] == 17
    assert f"epoch table of {node['node']}: {node['path']}, bypassed: no heartbeat yet" in (
        table.stdout
    )
    owner = f"{connection.settings_dict['NAME']}\0"
    EpochTable.open(node["path"], owner=owner).beat(node_clock() - 41 * NANOSECONDS)
    said = r"bypassed: heartbeat is \d\d+\.\d s old, MAX_STALENESS is 30 s"
    assert re.search(said, status(environ).stdout)


def test_whoever_asks_is_not_among_the_listeners_where_each_process_listens(
    environ: dict[str, str | None],
) -> None:
    asked = status({**environ, "EPOCH_TABLE": ""}, "--json")
    assert json.loads(asked.stdout)["listeners"] == []


def test_a_child_of_multiprocessing_writes_its_counts_when_it_ends(
    environ: dict[str, str | None], tmp_path: Path
) -> None:
    with python("-c", POOLED, env={**environ, "NEVER_BYPASSED": "1"}) as process:
        assert process.wait() == 0, process.report()
    assert node_counts(str(tmp_path / "epochs"))["near"]["hits"] == 10


def test_a_forked_child_counts_for_itself_and_no_hit_is_counted_twice(
    environ: dict[str, str | None], tmp_path: Path
) -> None:
    with python("-c", FORKING, env={**environ, "NEVER_BYPASSED": "1"}) as process:
        assert process.wait() == 0, process.report()
    counts = node_counts(str(tmp_path / "epochs"))
    for alias in ("near", "local"):
        assert counts[alias]["hits"] == 10 + 5 + 2
        assert counts[alias]["misses"] == 1
        assert counts[alias]["tags"]["t"]["hits"] == 17
