"""Two ``pglisten`` processes: one leads, the other stands by and takes over, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import transaction

from django_pgnotify import publish
from tests.integration.recording import query, terminate
from tests.processes import Process, manage
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

READY = r"^pglisten: ready "
LEADS = "This listener is the leader"


@contextlib.contextmanager
def pglisten(*args: str) -> Iterator[Process]:
    with manage("pglisten", *args) as process:
        process.wait_for_line(READY)
        yield process


@pytest.fixture
def two() -> Iterator[tuple[Process, Process]]:
    """The leader and the standby."""
    with pglisten() as leader:
        assert "leader" in leader.wait_for_line(READY).string
        with pglisten() as standby:
            assert "standby" in standby.wait_for_line(READY).string
            yield leader, standby


def leader_backend() -> int:
    [(pid,)] = query(
        "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()"
    )
    return int(pid)


def received(process: Process, name: str) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for line in re.findall(rf"^received {name} (.*)$", process.stdout, re.MULTILINE)
    ]


def test_one_runs_what_the_leader_runs_and_both_what_every_node_runs(
    two: tuple[Process, Process],
) -> None:
    leader, standby = two
    with transaction.atomic():
        pks = [Order.objects.create().pk for _ in range(50)]
    publish("jobs", "last")
    for process in two:
        process.wait_for_line("^received order-async", count=50)
    leader.wait_for_line('^received job .*"last"')
    assert [fact["pk"] for fact in received(leader, "order")] == pks
    assert received(standby, "order") == received(standby, "job") == []
    for process in two:
        assert [fact["pk"] for fact in received(process, "order-async")] == pks
        assert process.terminate() == 0


def test_sigterm_of_the_leader_hands_over_before_its_receivers_have_finished(
    two: tuple[Process, Process], tmp_path: Path
) -> None:
    leader, standby = two
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    publish("slow", {"gate": str(gate)})
    leader.wait_for_line("^received slow-started")
    leader.signal(signal.SIGTERM)
    standby.wait_for_line(LEADS)
    assert leader.returncode is None
    publish("jobs", "for the new leader")
    standby.wait_for_line('^received job .*"for the new leader"')
    os.close(os.open(gate, os.O_WRONLY))
    assert leader.wait() == 0
    assert "received slow-done" in leader.stdout
    # Told of a gap all the same: a goodbye does not prove that the leader could read up to it.
    assert [fact["action"] for fact in received(standby, "order")] == ["gap"]
    assert received(leader, "job") == []


def test_sigterm_of_the_leader_hands_over_at_once_not_at_the_next_look(
    two: tuple[Process, Process],
) -> None:
    leader, standby = two
    started = time.monotonic()
    leader.signal(signal.SIGTERM)
    standby.wait_for_line(LEADS)
    assert time.monotonic() - started < 0.8  # PGNOTIFY_LEADER_POLL_INTERVAL is 1 s
    assert leader.wait() == 0


def test_after_sigkill_of_the_leader_the_standby_takes_over_with_a_gap(
    two: tuple[Process, Process],
) -> None:
    leader, standby = two
    leader.signal(signal.SIGKILL)
    standby.wait_for_line(LEADS)
    standby.wait_for_line('^received order .*"gap"')
    Order.objects.create()
    standby.wait_for_line('^received order .*"created"')
    assert [fact["action"] for fact in received(standby, "order")] == ["gap", "created"]
    assert leader.wait() == -signal.SIGKILL


def test_after_its_backend_is_terminated_somebody_leads_again_and_each_event_is_run_once(
    two: tuple[Process, Process],
) -> None:
    leader, standby = two
    terminate(leader_backend())
    leader.wait_for_line(READY, count=2)
    deadline = time.monotonic() + 10
    locks = (
        "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    while not (led := query(locks)):
        assert time.monotonic() < deadline
    assert len(led) == 1
    new_leader = standby if LEADS in standby.stderr else leader
    new_leader.wait_for_line('^received order .*"gap"')
    for number in range(20):
        publish("jobs", number)
    new_leader.wait_for_line("^received job ", count=20)
    ran = [fact["data"] for process in two for fact in received(process, "job")]
    assert ran == list(range(20))


def test_a_frozen_leader_is_replaced_and_does_not_act_when_it_thaws(
    two: tuple[Process, Process],
) -> None:
    leader, standby = two
    backend = leader_backend()
    leader.signal(signal.SIGSTOP)
    try:
        terminate(backend)
        standby.wait_for_line(LEADS)
        publish("jobs", "while frozen")
        standby.wait_for_line('^received job .*"while frozen"')
    finally:
        leader.signal(signal.SIGCONT)
    leader.wait_for_line(READY, count=2)
    publish("jobs", "after the thaw")
    standby.wait_for_line('^received job .*"after the thaw"')
    assert received(leader, "job") == []


def test_processes_of_different_topics_both_lead() -> None:
    with pglisten("--topic", "jobs") as first, pglisten("--topic", "testapp.order") as second:
        assert "leader" in first.wait_for_line(READY).string
        assert "leader" in second.wait_for_line(READY).string
        Order.objects.create()
        publish("jobs", 1)
        first.wait_for_line("^received job ")
        second.wait_for_line("^received order ")
        assert received(first, "order") == received(second, "job") == []
