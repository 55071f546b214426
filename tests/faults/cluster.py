"""What is broken: a server, listeners of which each has its own way to it, and their records."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import psycopg

from example_project.embedded import EmbeddedPostgres
from tests.faults.checker import Ending, Established, Handled, Led, Life, parse
from tests.processes import Process
from tests.proxy import TCPProxy

DATABASE = "numbers"
SETTINGS = "tests.faults.project.settings"
_LEADER = """
    SELECT a.application_name FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid::bigint = x'70676E74'::bigint
"""
_WHO = """
    SELECT a.pid, a.application_name, a.state, a.wait_event, now() - a.state_change, a.query,
           l.locktype, l.classid, l.objid, l.granted
    FROM pg_stat_activity AS a
    FULL JOIN (SELECT * FROM pg_locks WHERE locktype = 'advisory') AS l USING (pid)
    WHERE a.backend_type = 'client backend' OR l.pid IS NOT NULL
"""


class Running:
    """A listener process, its way to the server, and the life it leads."""

    def __init__(self, slot: Slot, number: int, record: Path) -> None:
        self.slot = slot
        self.life = Life(f"{slot.name}.{number}")
        self.rss: list[tuple[float, int]] = []
        self.last: dict[str, int] = {}
        self.leads = False
        self._record = record
        self._offset = 0
        self._rest = b""
        url = slot.proxy.url(slot.cluster.url) + f"?application_name={slot.name}"
        self.process = Process(
            [sys.executable, "-m", "django", "pglisten"],
            env={
                "DJANGO_SETTINGS_MODULE": SETTINGS,
                "DATABASE_URL": url,
                "PGNOTIFY_FAULTS_RECORD": str(record),
            },
        )

    def look(self) -> None:
        """Read what it has recorded since the last look."""
        try:
            with self._record.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for text in whole:
            line = parse(json.loads(text))
            self.life.lines.append(line)
            if isinstance(line, Handled):
                self.last[line.receiver] = max(line.n, self.last.get(line.receiver, 0))
            elif isinstance(line, Led):
                self.leads = line.leader

    @property
    def established(self) -> bool:
        return any(isinstance(line, Established) for line in self.life.lines)

    def sample_memory(self) -> None:
        try:
            self.rss.append((time.time(), psutil.Process(self.process.pid).memory_info().rss))
        except psutil.NoSuchProcess:
            pass

    def end(self, ending: Ending, timeout: float = 20.0) -> None:
        """It was signalled, or is now (to be killed); see it off."""
        if self.life.ending != "still running":
            return
        if ending == "killed":
            self.life.ended_at = min(self.life.ended_at, time.time())
            self.process.kill()
        else:
            self.process.wait(timeout=timeout)
        self.life.ending = ending
        self.look()


class Slot:
    """A place for one listener at a time, behind a proxy of its own."""

    def __init__(self, cluster: Cluster, name: str, proxy: TCPProxy) -> None:
        self.cluster = cluster
        self.name = name
        self.proxy = proxy
        self.running: Running | None = None
        self._started = 0

    def start(self) -> Running:
        self._started += 1
        record = self.cluster.folder / f"{self.name}.{self._started}.jsonl"
        self.running = Running(self, self._started, record)
        self.cluster.everybody.append(self.running)
        return self.running


class Cluster:
    """The server and ``count`` listeners; a context manager."""

    def __init__(self, folder: Path, count: int, version: int = 18) -> None:
        self.folder = folder
        self.everybody: list[Running] = []
        self.slots: list[Slot] = []
        self.server = EmbeddedPostgres(version=version)
        self._count = count
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.server)
        self.url = self.server.create_database(DATABASE)
        for number in range(1, self._count + 1):
            proxy = self._stack.enter_context(TCPProxy(self.server.host, self.server.port))
            self.slots.append(Slot(self, f"listener-{number}", proxy))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for running in self.everybody:
            running.process.kill()
        self._stack.close()

    @property
    def running(self) -> list[Running]:
        return [slot.running for slot in self.slots if slot.running is not None]

    def look(self) -> None:
        for running in self.running:
            running.look()

    def leader(self) -> Slot | None:
        """Whose session holds the lock; the last known leader where the server cannot be asked."""
        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=2) as admin:
                holder = admin.execute(_LEADER).fetchone()
        except psycopg.OperationalError:
            self.look()
            return next((each.slot for each in self.running if each.leads), None)
        return next((slot for slot in self.slots if holder and slot.name == holder[0]), None)

    def terminate_backend(self, slot: Slot) -> None:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=2) as admin:
                admin.execute(query, (slot.name,))
        except psycopg.OperationalError:
            pass  # the server is down: it has no backend that could be terminated

    def who_is_there(self) -> str:
        """Sessions and advisory locks, for whoever has to find out why nobody leads."""
        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=2) as admin:
                rows = admin.execute(_WHO).fetchall()
        except psycopg.OperationalError as exc:
            return str(exc)
        return "\n".join(" | ".join(" ".join(str(value).split()) for value in r) for r in rows)

    def signal(self, running: Running, number: signal.Signals) -> None:
        if running.process.returncode is None:
            running.process.signal(number)
