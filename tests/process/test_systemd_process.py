"""``pglisten`` under systemd, which is here a datagram socket that the test reads."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import connections

from django_pgnotify import publish
from tests.integration.recording import backends_of_listeners, terminate
from tests.processes import DEADLINE, manage
from tests.proxy import TCPProxy
from tests.settings import database_url

pytestmark = pytest.mark.django_db(transaction=True)

READY = r"^pglisten: ready "


class Systemd:
    """The notification socket, and what was said on it."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.environ: dict[str, str | None] = {
            "NOTIFY_SOCKET": str(path),
            "WATCHDOG_USEC": None,
            "WATCHDOG_PID": None,
        }

    def close(self) -> None:
        self._socket.close()

    def wait_for(self, start: str, count: int = 1) -> str:
        """The ``count``-th message with a line that starts so."""
        deadline = time.monotonic() + DEADLINE
        while len(found := self._messages(start)) < count:
            self._receive(deadline, f"no {count} of {start!r}")
        return found[count - 1]

    def all(self) -> list[str]:
        """Everything said so far."""
        self._socket.setblocking(False)
        try:
            while True:
                self.said.append(self._socket.recv(65536).decode())
        except BlockingIOError:
            return self.said

    def _messages(self, start: str) -> list[str]:
        return [
            message
            for message in self.said
            if any(line.startswith(start) for line in message.splitlines())
        ]

    def _receive(self, deadline: float, otherwise: str) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self.said.append(self._socket.recv(65536).decode())
        except TimeoutError:
            raise AssertionError(f"{otherwise}; it said {self.said}") from None


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    manager = Systemd(tmp_path / "notify")
    yield manager
    manager.close()


def through(proxy: TCPProxy) -> dict[str, str | None]:
    return {"DATABASE_URL": proxy.url(database_url(connections["default"].settings_dict))}


def test_ready_is_told_once_it_hears_and_stopping_when_it_is_told_to_stop(
    systemd: Systemd,
) -> None:
    with manage("pglisten", env=systemd.environ) as process:
        message = systemd.wait_for("READY=1")
        assert "STATUS=leader on database default" in message.splitlines()
        # Whoever starts after READY=1 (After=, in a unit) may publish at once.
        publish("jobs", "right after READY=1")
        process.wait_for_line('^received job .*"right after READY=1"')
        assert not any("STOPPING" in message for message in systemd.all())
        process.signal(signal.SIGTERM)
        systemd.wait_for("STOPPING=1")
        assert process.wait() == 0
    assert [message.split("\n")[0] for message in systemd.all()] == ["READY=1", "STOPPING=1"]


def test_stopping_is_told_before_receivers_have_finished(systemd: Systemd, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with manage("pglisten", env=systemd.environ) as process:
        systemd.wait_for("READY=1")
        publish("slow", {"gate": str(gate)})
        process.wait_for_line("^received slow-started")
        process.signal(signal.SIGTERM)
        systemd.wait_for("STOPPING=1")
        assert process.returncode is None
        os.close(os.open(gate, os.O_WRONLY))
        assert process.wait() == 0


def test_without_a_server_it_is_not_ready_but_says_what_it_waits_for(
    systemd: Systemd, proxy: TCPProxy
) -> None:
    proxy.close()
    with manage("pglisten", env=systemd.environ | through(proxy)) as process:
        message = systemd.wait_for("STATUS=")
        assert message.startswith("STATUS=waiting for database default: ")
        assert "refused" in message
        process.wait_for_line("WARNING django_pgnotify.listening: .*next attempt in", count=3)
        assert not any("READY=1" in message for message in systemd.all())
        proxy.open()
        systemd.wait_for("READY=1")
        process.wait_for_line(READY)
        assert process.terminate() == 0
    order = [message.split("=")[0] for message in systemd.all()]
    assert order == ["STATUS", "READY", "STOPPING"]


def test_an_outage_is_told_once_and_so_is_its_end(systemd: Systemd) -> None:
    with manage("pglisten", env=systemd.environ) as process:
        systemd.wait_for("READY=1")
        [backend] = backends_of_listeners()
        terminate(backend)
        systemd.wait_for("READY=1", count=2)
        process.wait_for_line(READY, count=2)
        assert process.terminate() == 0
    first_lines = [message.split("\n")[0].split(":")[0] for message in systemd.all()]
    assert first_lines == [
        "READY=1",
        "STATUS=waiting for database default",
        "READY=1",
        "STOPPING=1",
    ]


def test_a_sign_of_life_comes_twice_in_the_time_of_the_watchdog_and_ends_with_the_process(
    systemd: Systemd,
) -> None:
    env = systemd.environ | {"WATCHDOG_USEC": "1000000"}
    with manage("pglisten", env=env) as process:
        systemd.wait_for("READY=1")
        before = len(systemd._messages("WATCHDOG=1"))
        started = time.monotonic()
        systemd.wait_for("WATCHDOG=1", count=before + 4)
        took = time.monotonic() - started
        assert 1.0 < took < 5.0  # 0.5 s apart
        assert process.terminate() == 0


def test_a_database_that_is_away_is_no_reason_for_the_watchdog_to_bite(
    systemd: Systemd, proxy: TCPProxy
) -> None:
    proxy.blackhole()  # an attempt to connect hangs in it
    env = systemd.environ | through(proxy) | {"WATCHDOG_USEC": "200000"}
    with manage("pglisten", env=env) as process:
        proxy.wait_for_accepted(1, timeout=DEADLINE)
        seen = len(systemd._messages("WATCHDOG=1"))
        systemd.wait_for("WATCHDOG=1", count=seen + 5)
        assert process.terminate() == 0


def test_a_receiver_that_blocks_its_thread_is_no_reason_either(
    systemd: Systemd, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with manage("pglisten", env=systemd.environ | {"WATCHDOG_USEC": "200000"}) as process:
        systemd.wait_for("READY=1")
        publish("slow", {"gate": str(gate)})
        process.wait_for_line("^received slow-started")
        systemd.all()
        seen = len(systemd._messages("WATCHDOG=1"))
        systemd.wait_for("WATCHDOG=1", count=seen + 5)
        process.signal(signal.SIGTERM)
        systemd.wait_for("STOPPING=1")
        # What runs may take its time to finish, and the watchdog is still on.
        seen = len(systemd._messages("WATCHDOG=1"))
        systemd.wait_for("WATCHDOG=1", count=seen + 5)
        os.close(os.open(gate, os.O_WRONLY))
        assert process.wait() == 0


def test_a_watchdog_of_another_process_is_not_fed(systemd: Systemd) -> None:
    env = systemd.environ | {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"}
    with manage("pglisten", env=env) as process:
        systemd.wait_for("READY=1")
        publish("jobs", 1)
        process.wait_for_line("^received job ")
        assert process.terminate() == 0
    assert systemd._messages("WATCHDOG=1") == []
    assert not any("WATCHDOG" in message for message in systemd.all())


def test_a_socket_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    env: dict[str, str | None] = {
        "NOTIFY_SOCKET": str(tmp_path / "gone"),
        "WATCHDOG_USEC": "100000",
    }
    with manage("pglisten", env=env) as process:
        process.wait_for_line(READY)
        publish("jobs", 1)
        process.wait_for_line("^received job ")
        assert process.terminate() == 0
    assert "Traceback" not in process.stderr


def test_a_manager_that_does_not_read_does_not_stop_the_listener(systemd: Systemd) -> None:
    with manage("pglisten", env=systemd.environ | {"WATCHDOG_USEC": "2000"}) as process:
        process.wait_for_line(READY)  # and nobody reads, until the socket is full
        for number in range(50):
            publish("jobs", number)
            process.wait_for_line("^received job ", count=number + 1)
        filled = len(systemd.all())
        assert filled > 1
        assert process.terminate() == 0
