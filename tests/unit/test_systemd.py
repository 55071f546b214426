"""What systemd is told, over a real datagram socket; and silence where there is no systemd."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from django_pgnotify.systemd import tell, watchdog_interval

DEADLINE = 30.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(DEADLINE)
        yield bound


def test_a_state_is_sent_as_one_datagram(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname()}
    assert tell("READY=1\nSTATUS=leader on database default", environ) is True
    assert tell("STOPPING=1", environ) is True
    assert manager.recv(4096) == b"READY=1\nSTATUS=leader on database default"
    assert manager.recv(4096) == b"STOPPING=1"


def test_a_status_of_any_language_is_sent_as_utf_8(manager: socket.socket) -> None:
    assert tell("STATUS=größer", {"NOTIFY_SOCKET": manager.getsockname()})
    assert manager.recv(4096) == "STATUS=größer".encode()


def test_an_abstract_socket_is_reached() -> None:
    name = f"pgnotify-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0{name}")
        bound.settimeout(DEADLINE)
        assert tell("READY=1", {"NOTIFY_SOCKET": f"@{name}"}) is True
        assert bound.recv(4096) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "relative/path", "vsock:2:1234", "@", "tcp://x"])
def test_without_a_socket_of_systemd_nothing_is_sent(address: str | None) -> None:
    assert tell("READY=1", {} if address is None else {"NOTIFY_SOCKET": address}) is False


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    assert tell("READY=1", {"NOTIFY_SOCKET": str(path)}) is False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
    assert tell("READY=1", {"NOTIFY_SOCKET": str(path)}) is False


def test_a_path_that_is_too_long_for_a_socket_is_no_error() -> None:
    assert tell("READY=1", {"NOTIFY_SOCKET": "/" + "x" * 500}) is False


def test_a_socket_of_another_kind_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(path))
        bound.listen()
        assert tell("READY=1", {"NOTIFY_SOCKET": str(path)}) is False


def test_a_manager_that_does_not_read_does_not_hang_the_service(manager: socket.socket) -> None:
    """It is told on the event loop: whoever waits here is deaf."""
    environ = {"NOTIFY_SOCKET": manager.getsockname()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.connect(manager.getsockname())
        filler.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                filler.send(b"full")
    told: list[bool] = []
    teller = threading.Thread(target=lambda: told.append(tell("WATCHDOG=1", environ)), daemon=True)
    teller.start()
    teller.join(2)
    hung = teller.is_alive()
    while hung and teller.is_alive():
        manager.recv(4096)  # let it go, whatever comes of the test
        teller.join(0.01)
    assert not hung
    assert told == [False]


def test_the_environment_of_the_process_is_used_unless_told_otherwise(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert tell("READY=1") is True
    assert manager.recv(4096) == b"READY=1"
    assert watchdog_interval() == 1.5


def test_no_socket_is_left_open(manager: socket.socket, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        tell("READY=1", {"NOTIFY_SOCKET": manager.getsockname()})
        tell("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


# -- the watchdog -----------------------------------------------------------------------------


@pytest.mark.parametrize(("microseconds", "seconds"), [("30000000", 15.0), ("1", 5e-07)])
def test_a_sign_of_life_is_due_twice_in_what_systemd_waits(
    microseconds: str, seconds: float
) -> None:
    assert watchdog_interval({"WATCHDOG_USEC": microseconds}) == seconds
    own = {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": str(os.getpid())}
    assert watchdog_interval(own) == seconds


@pytest.mark.parametrize("value", [None, "", "0", "-5", "soon", "1.5", "²", " 30 s", "1e6"])
def test_without_a_watchdog_there_is_no_interval(value: str | None) -> None:
    assert watchdog_interval({} if value is None else {"WATCHDOG_USEC": value}) is None


@pytest.mark.parametrize("pid", ["1", "", "nobody"])
def test_the_watchdog_of_another_process_is_not_ours(pid: str) -> None:
    assert watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": pid}) is None
