"""``pgnotify_status`` beside real processes: who answers, who is deaf, and the exit status."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from django_pgnotify import publish
from tests.integration.recording import backends_of_listeners, terminate
from tests.processes import DEADLINE, Process, database_environ, manage, python, run

pytestmark = pytest.mark.django_db(transaction=True)

READY = r"^pglisten: ready "
UNREACHABLE = {"DATABASE_URL": "postgresql://postgres@127.0.0.1:1/nothing"}


@contextlib.contextmanager
def pglisten(*args: str) -> Iterator[Process]:
    with manage("pglisten", *args) as process:
        process.wait_for_line(READY)
        yield process


def status(*args: str) -> Process:
    process = run("pgnotify_status", *args)
    assert "Traceback" not in process.stderr, process.report()
    return process


def listeners(process: Process) -> dict[int, dict[str, Any]]:
    """The answers by process id."""
    found: list[dict[str, Any]] = json.loads(process.stdout)["listeners"]
    return {answer["pid"]: answer for answer in found}


def test_every_process_answers_for_itself_and_the_status_is_0() -> None:
    with pglisten() as leader, pglisten() as standby:
        publish("jobs", 1)
        leader.wait_for_line("^received job ")
        asked = status("--json")
        table = status()
    assert (asked.returncode, table.returncode) == (0, 0)
    answers = listeners(asked)
    assert {pid: answer["role"] for pid, answer in answers.items()} == {
        leader.pid: "leader",
        standby.pid: "standby",
    }
    assert answers[leader.pid]["counts"]["handled"] >= 1
    assert len({answer["backend"] for answer in answers.values()}) == 2
    for process in (leader, standby):
        assert str(process.pid) in table.stdout


def test_nobody_is_status_1_and_says_so_on_stdout() -> None:
    asked = status()
    assert asked.returncode == 1
    assert "No pglisten answers." in asked.stdout
    assert status("--json").returncode == 1


def test_a_stopped_process_is_not_there_and_a_deaf_leader_is_status_1() -> None:
    with pglisten() as leader, pglisten() as standby:
        leader.signal(signal.SIGSTOP)
        try:
            deaf = status("--json")
        finally:
            leader.signal(signal.SIGCONT)
        assert list(listeners(deaf)) == [standby.pid]
        assert deaf.returncode == 1
        assert "leader" in json.loads(deaf.stdout)["problem"]
        back = status("--json")
        assert set(listeners(back)) == {leader.pid, standby.pid}
        assert back.returncode == 0
        assert standby.terminate() == leader.terminate() == 0
    assert status("--json").returncode == 1


def test_a_gap_that_a_process_has_told_is_shown() -> None:
    with pglisten() as process:
        [backend] = backends_of_listeners()
        terminate(backend)
        process.wait_for_line(READY, count=2)
        answer = listeners(status("--json"))[process.pid]
    assert answer["backend"] != backend
    assert answer["last_gap"]["since"] < answer["last_gap"]["until"]
    assert answer["last_gap"]["cause"]


def test_a_web_process_that_subscribes_is_shown_as_in_process_but_is_no_pglisten() -> None:
    web = (
        "import django; django.setup()\n"
        "from django_pgnotify import subscribe\n"
        "with subscribe('visits') as events:\n"
        "    print('subscribed', flush=True)\n"
        "    print(events.get().data, flush=True)\n"
    )
    env: dict[str, str | None] = {"DJANGO_SETTINGS_MODULE": "tests.settings", **database_environ()}
    with python("-c", web, env=env) as process:
        process.wait_for_line("^subscribed")
        alone = status("--json")
        assert alone.returncode == 1
        assert listeners(alone)[process.pid]["role"] == "in process"
        assert listeners(alone)[process.pid]["topics"] == ["visits"]
        with pglisten() as listener:
            both = status("--json")
            assert both.returncode == 0
            assert set(listeners(both)) == {process.pid, listener.pid}
        publish("visits", "done")
        process.wait_for_line("^done$")
        assert process.wait() == 0


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_an_unreachable_server_is_status_2_with_the_cause(arguments: list[str]) -> None:
    started = time.monotonic()
    process = run("pgnotify_status", *arguments, env=UNREACHABLE)
    assert process.returncode == 2, process.report()
    assert "refused" in process.stderr
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    assert time.monotonic() - started < DEADLINE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--database", "nowhere"], "nowhere"),
        (["--database", "lite"], "sqlite"),
        (["--timeout", "-1"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "inf"], "--timeout"),
        (["--timeout", "soon"], "--timeout"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids="_".join,
)
def test_bad_flags_are_status_2_and_named(arguments: list[str], says: str) -> None:
    with manage("pgnotify_status", *arguments) as process:
        assert process.wait() == 2, process.report()
    assert says in process.stderr
    assert "Traceback" not in process.stderr
