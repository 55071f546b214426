"""``manage.py pglisten`` as a process: what it prints, what ends it, and with which status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from django.core.management import call_command
from django.db import connections

from django_pgnotify import publish
from django_pgnotify.publishing.store import store
from example_project.embedded import EmbeddedPostgres
from tests.integration.hearing import hearing
from tests.integration.recording import (
    backends_of_listeners,
    notify,
    stored_events_locked,
    terminate,
)
from tests.processes import DEADLINE, ROOT, Process, manage, run
from tests.proxy import TCPProxy
from tests.settings import database_url
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

READY = r"^pglisten: ready "


@contextlib.contextmanager
def pglisten(*args: str, env: dict[str, str | None] | None = None) -> Iterator[Process]:
    """A ``pglisten`` that is ready."""
    with manage("pglisten", *args, env=env) as process:
        process.wait_for_line(READY)
        yield process


class Fifo:
    """A receiver of ``slow`` reads from it: it runs until the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def open(self) -> None:
        # Not a blocking open(): that would hang this process if the reader has died.
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as exc:
                if exc.errno != errno.ENXIO or time.monotonic() > deadline:
                    raise
            else:
                return


@pytest.fixture
def gate(tmp_path: Path) -> Fifo:
    return Fifo(tmp_path / "gate")


def through(proxy: TCPProxy) -> dict[str, str | None]:
    return {"DATABASE_URL": proxy.url(database_url(connections["default"].settings_dict))}


def received(process: Process, name: str, count: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        process.wait_for_line(rf"^received {name} (.*)$", count=count)[1]
    )
    return found


# -- ready, and events ------------------------------------------------------------------------


def test_ready_is_one_line_and_events_arrive_from_then_on() -> None:
    with pglisten() as process:
        order = Order.objects.create(status="new")
        assert received(process, "order")["pk"] == order.pk
        assert received(process, "order-async")["status"] == "new"
        notify("jobs", "do job 1001")
        assert received(process, "job")["data"] == "do job 1001"
        ready = [line for line in process.stdout.splitlines() if "ready" in line]
        assert len(ready) == 1
        assert "database 'default'" in ready[0]
        assert "leader" in ready[0]
        assert process.terminate() == 0
    assert "Traceback" not in process.stderr


def test_one_process_holds_one_listening_connection() -> None:
    with pglisten():
        assert len(backends_of_listeners()) == 1


def test_a_failing_receiver_is_reported_without_payload_and_the_process_goes_on() -> None:
    with pglisten() as process:
        publish("jobs", {"break": True, "secret": "s3cr3t"})
        process.wait_for_line("ERROR django_pgnotify.dispatching: .*broken failed")
        publish("jobs", 2)
        assert received(process, "job", 2)["data"] == 2
        assert process.terminate() == 0
    assert "s3cr3t" not in process.stderr


def test_a_terminated_backend_is_survived_and_the_gap_is_told_first() -> None:
    with pglisten() as process:
        [pid] = backends_of_listeners()
        terminate(pid)
        process.wait_for_line(READY, count=2)
        Order.objects.create()
        assert received(process, "order", 1)["action"] == "gap"
        assert received(process, "order", 2)["action"] == "created"
        process.wait_for_line("waiting for database 'default'")


def test_hostile_frames_are_logged_without_payload_and_the_next_is_handled() -> None:
    with pglisten() as process:
        notify(
            "jobs",
            '{"pgnotify":1,"events":[{"data":"s3cr3t',
            '{"pgnotify":1,"events":' + "[" * 3000,
        )
        notify("jobs", "next")
        assert received(process, "job")["data"] == "next"
        process.wait_for_line("Skipped a frame", count=2)
    assert "s3cr3t" not in process.stderr + process.stdout


def test_topic_limits_what_is_heard() -> None:
    with pglisten("--topic", "jobs") as process:
        Order.objects.create()
        publish("jobs", 1)
        received(process, "job")
        assert "1 topic" in process.wait_for_line(READY).string
    assert "received order" not in process.stdout


# -- the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slow", "slow-async"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_receiver_finish_and_the_status_is_0(
    name: str, number: signal.Signals, gate: Fifo
) -> None:
    with pglisten() as process:
        publish(name, {"gate": str(gate.path)})
        received(process, f"{name}-started")
        process.signal(number)
        process.wait_for_line(f"{number.name}, finishing")
        assert process.returncode is None
        gate.open()
        assert process.wait() == 0
        received(process, f"{name}-done")
    assert process.stdout.splitlines()[-1] == "pglisten: stopped"


def test_events_that_wait_are_handled_before_the_end(gate: Fifo, tmp_path: Path) -> None:
    second = Fifo(tmp_path / "second")
    with pglisten() as process:
        publish("slow", {"gate": str(gate.path)})
        received(process, "slow-started")
        publish("slow", {"gate": str(second.path)})
        publish("jobs", 1)
        received(process, "job")  # so the second slow one is in its lane
        process.signal(signal.SIGTERM)
        process.wait_for_line("SIGTERM, finishing")
        gate.open()
        received(process, "slow-started", 2)
        second.open()
        assert process.wait() == 0
        received(process, "slow-done", 2)


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130)],
)
@pytest.mark.parametrize("name", ["slow", "slow-async"])
def test_a_second_signal_forces_the_end(
    first: signal.Signals, second: signal.Signals, status: int, name: str, gate: Fifo
) -> None:
    with pglisten() as process:
        publish(name, {"gate": str(gate.path)})
        received(process, f"{name}-started")
        process.signal(first)
        process.wait_for_line(f"{first.name}, finishing")
        process.signal(second)
        assert process.wait() == status
    assert f"{name}-done" not in process.stdout


@pytest.mark.parametrize("name", ["slow", "slow-async"])
def test_receivers_that_exceed_the_shutdown_timeout_are_given_up_with_status_1(
    name: str, gate: Fifo
) -> None:
    with pglisten("--shutdown-timeout", "0.2") as process:
        publish(name, {"gate": str(gate.path)})
        received(process, f"{name}-started")
        assert process.terminate() == 1
        assert "did not finish in time" in process.stderr
    assert f"{name}-done" not in process.stdout


def test_a_stored_event_that_cannot_be_fetched_does_not_outlast_the_shutdown_timeout() -> None:
    [row] = store(['{"id":"x","action":"published","data":1}'], "default")
    with pglisten("--shutdown-timeout", "0.2") as process, stored_events_locked() as wait_for_fetch:
        notify("jobs", f'{{"pgnotify":1,"events":[{{"ref":{row}}}]}}', "behind it")
        wait_for_fetch()
        assert process.terminate() == 1
        assert "did not finish in time" in process.stderr
    assert "received job" not in process.stdout


def test_what_receivers_have_published_is_sent_before_those_that_hang_are_given_up(
    gate: Fifo, tmp_path: Path
) -> None:
    (tmp_path / "relaying").mkdir()
    (tmp_path / "relaying" / "receivers.py").write_text(
        "from django_pgnotify import publish, receiver\n"
        "@receiver('jobs')\n"
        "def relay(event): publish('relayed', event.data * 10_000)\n"
    )
    (tmp_path / "relaying_settings.py").write_text(
        "from tests.settings import *\n"
        "INSTALLED_APPS = [*INSTALLED_APPS, 'relaying']\n"
        "PGNOTIFY_BACKGROUND_SENDER = True\n"
    )
    env: dict[str, str | None] = {
        "DJANGO_SETTINGS_MODULE": "relaying_settings",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    with hearing("relayed") as ear:
        with pglisten("--shutdown-timeout", "0.2", env=env) as process:
            publish("slow", {"gate": str(gate.path)})
            received(process, "slow-started")
            with stored_events_locked() as wait_until_somebody_tries:
                publish("jobs", "x")
                wait_until_somebody_tries()  # that is the sender, which has to store it first
                process.signal(signal.SIGTERM)
                process.wait_for_line("did not finish in time")
            assert process.wait() == 1
        assert ear.data() == ["x" * 10_000]


def test_once_handles_the_first_events_and_exits() -> None:
    with pglisten("--once") as process:
        publish("jobs", 1)
        assert process.wait() == 0
        assert received(process, "job")["data"] == 1


def test_a_signal_while_it_waits_for_the_server_ends_it_with_status_0(proxy: TCPProxy) -> None:
    proxy.close()
    with manage("pglisten", env=through(proxy)) as process:
        process.wait_for_line("waiting for database 'default'")
        assert process.terminate() == 0


def test_a_signal_while_the_server_is_silent_ends_it_soon(proxy: TCPProxy) -> None:
    proxy.blackhole()
    with manage("pglisten", env=through(proxy)) as process:
        proxy.wait_for_accepted(1, timeout=60)
        assert process.terminate(timeout=9) == 0


# -- no server --------------------------------------------------------------------------------


def test_an_unreachable_server_is_waited_for_and_said_and_found_when_it_appears(
    proxy: TCPProxy,
) -> None:
    proxy.close()
    with manage("pglisten", env=through(proxy)) as process:
        line = process.wait_for_line("waiting for database 'default'.*").string
        assert "refused" in line
        process.wait_for_line("WARNING django_pgnotify.listening: .*next attempt in")
        assert "ready" not in process.stdout
        proxy.open()
        process.wait_for_line(READY)
        publish("jobs", 1)
        received(process, "job")


def test_a_server_that_is_stopped_and_started_is_found_again(
    start_server: Callable[..., EmbeddedPostgres],
) -> None:
    server = start_server()
    with pglisten(env={"DATABASE_URL": server.url()}) as process:
        server.stop()
        process.wait_for_line("waiting for database 'default'")
        server.start()
        process.wait_for_line(READY, count=2)
        server.notify("jobs", "after the restart")
        assert received(process, "job")["data"] == "after the restart"
        assert process.terminate() == 0


# -- --check ----------------------------------------------------------------------------------


def test_check_says_ok_and_exits_0() -> None:
    process = run("pglisten", "--check")
    assert process.returncode == 0, process.report()
    assert "pglisten: ok" in process.stdout


def test_check_names_the_cause_of_an_unreachable_server_and_exits_1(proxy: TCPProxy) -> None:
    proxy.close()
    process = run("pglisten", "--check", env=through(proxy))
    assert process.returncode == 1, process.report()
    assert "cannot connect to database 'default'" in process.stderr
    assert "refused" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_an_alias_that_is_not_postgresql_is_refused(arguments: list[str]) -> None:
    process = run("pglisten", "--database", "lite", *arguments)
    assert process.returncode == 1, process.report()
    assert "sqlite" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--database", "nowhere"], 1, "nowhere"),
        (["--topic", ""], 1, "non-empty"),
        (["--concurrency", "0"], 2, "--concurrency"),
        (["--concurrency", "many"], 2, "--concurrency"),
        (["--shutdown-timeout", "-1"], 2, "--shutdown-timeout"),
        (["--shutdown-timeout", "nan"], 2, "--shutdown-timeout"),
        (["--no-such-flag"], 2, "--no-such-flag"),
        (["--health-file", "/no/such/folder/health.json"], 1, "/no/such/folder"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_refused_by_name(arguments: list[str], status: int, says: str) -> None:
    with manage("pglisten", *arguments) as process:
        assert process.wait() == status, process.report()
    assert says in process.stderr
    assert "Traceback" not in process.stderr


# -- the health file, and --reload ------------------------------------------------------------


def test_the_health_file_tells_the_state_and_is_removed_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "health.json"
    with pglisten("--health-file", str(file)) as process:
        [backend] = backends_of_listeners()
        health = json.loads(file.read_text())
        assert health["pid"] == process.pid
        assert health["backend"] == backend
        assert health["database"] == "default"
        assert health["role"] == "leader"
        assert health["established"] is True
        assert health["established_since"]
        assert {"jobs", "testapp.order", "slow"} <= set(health["topics"])
        assert health["waiting"] == health["running"] == 0
        assert os.listdir(tmp_path) == ["health.json"]  # nothing half-written beside it
        assert process.terminate() == 0
    assert not file.exists()


def test_the_health_file_can_be_read_by_another_user(tmp_path: Path) -> None:
    file = tmp_path / "health.json"
    with pglisten("--health-file", str(file)):
        umask = os.umask(0)
        os.umask(umask)
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_health_file_says_when_the_listener_is_not_established(
    tmp_path: Path, proxy: TCPProxy
) -> None:
    file = tmp_path / "health.json"
    with pglisten("--health-file", str(file), env=through(proxy)) as process:
        proxy.close()
        process.wait_for_line("waiting for database")
        health = json.loads(file.read_text())
        assert health["established"] is False
        assert health["backend"] is None


def test_reload_starts_and_restarts_when_code_changes(tmp_path: Path) -> None:
    module = tmp_path / "reloaded_receivers.py"
    module.write_text("marker = 1\n")
    settings = tmp_path / "reloaded_settings.py"
    settings.write_text("from tests.settings import *\nimport reloaded_receivers\n")
    env: dict[str, str | None] = {
        "DJANGO_SETTINGS_MODULE": "reloaded_settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    with pglisten("--reload", env=env) as process:
        publish("jobs", 1)
        received(process, "job")
        later = module.stat().st_mtime + 10
        touched = threading.Event()

        def touch() -> None:
            # Again until it is seen: the reloader takes its first look at its own pace.
            moment = later
            while not touched.wait(0.5):
                moment += 10
                os.utime(module, (moment, moment))

        toucher = threading.Thread(target=touch)
        toucher.start()
        try:
            process.wait_for_line(READY, count=2)
        finally:
            touched.set()
            toucher.join()
        publish("jobs", 2)
        assert received(process, "job", 2)["data"] == 2
        family = psutil.Process(process.pid).children(recursive=True)
        process.interrupt()
        assert psutil.wait_procs(family, timeout=60)[1] == []


def test_without_a_health_file_no_folder_needs_to_be_writable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service runs in a folder that is not its own."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    call_command("pglisten", "--check")
    assert "pglisten: ok" in capsys.readouterr().out
