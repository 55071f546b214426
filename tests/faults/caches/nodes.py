"""What a check runs: the server, and nodes with their tables, listeners and processes."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from example_project.embedded import EmbeddedPostgres
from tests.faults.caches.models import NUMBERS, ROWS
from tests.processes import Process
from tests.proxy import TCPProxy

SETTINGS = "tests.faults.caches.settings"
DATABASE = "caches"
WRITERS = {
    "steady": range(len(NUMBERS)),
    # Only rows whose NOTIFY is part of the transaction survive that their writer is killed.
    "mortal": range(ROWS, len(NUMBERS)),
}
"""By name, the rows that a writer writes."""


class Node:
    """One machine, so to say: a table, a way to the server for its listener and for its writers.

    A node that is ``lone`` has no file to share and no ``pglisten``: each of its processes keeps a
    table in its own memory, and listens for itself.
    """

    def __init__(self, deployment: Deployment, number: int, *, lone: bool = False) -> None:
        self.deployment = deployment
        self.number = number
        self.lone = lone
        self.folder = deployment.folder / f"node-{number}"
        self.folder.mkdir()
        self.listening = deployment.proxy()
        self.writing = deployment.proxy()
        self.listener: Process | None = None
        self.writers: dict[str, Process] = {}
        self.readers: list[Process] = []

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def table(self) -> Path:
        return self.folder / "epochs"

    def start_listener(self) -> Process:
        self.listener = self._run("-m", "django", "pglisten")
        return self.listener

    def start_writers(self, *names: str) -> None:
        for name in names:
            self.start_writer(name)

    def start_writer(self, name: str) -> None:
        rows = WRITERS[name]
        number = self.deployment.next_writer()
        self.writers[name] = self._run(
            *("-m", "tests.faults.caches", "writer", str(number), str(self.number)),
            *(f"{self.deployment.seed} writer {number}", str(self.folder)),
            *(str(rows.start), str(rows.stop)),
            url=self.writing.url(self.deployment.url),
        )

    def start_readers(self, *, alone: bool, forked: int) -> None:
        """One that is started, or ``forked`` of one that has filled its caches, or both."""
        seed = f"{self.deployment.seed} readers of {self.number}"
        programs: list[tuple[str, ...]] = []
        if alone:
            programs.append(("reader", "alone", seed, str(self.folder)))
        if forked:
            programs.append(("forking", "forked", seed, str(self.folder), str(forked)))
        self.readers = [self._run("-m", "tests.faults.caches", *each) for each in programs]

    def finish(self) -> None:
        """End the readers, the writers and the listener, in order.

        Raises:
            AssertionError: one of them failed.
        """
        for process in self.writers.values():
            process.wait_for_line("^writing")  # one that was just started knows no signals yet
        for process in [*self.writers.values(), *self.readers]:
            process.signal(signal.SIGTERM)
        for process in [*self.writers.values(), *self.readers]:
            if (status := process.wait(timeout=60)) != 0:
                raise AssertionError(f"{process!r} ended with {status}\n{process.report()}")
        if self.listener is not None:
            self.listener.terminate()

    def _run(self, *arguments: str, url: str | None = None) -> Process:
        deployment = self.deployment
        listen = f"{self.listening.url(deployment.url)}?application_name={self.name}"
        environ = {
            "DJANGO_SETTINGS_MODULE": SETTINGS,
            "DATABASE_URL": url or deployment.url,
            "LISTEN_URL": listen,
            "CHECK_FOLDER": str(self.folder),
            "CHECK_LONE": "1" if self.lone else None,
        }
        process = Process([sys.executable, *arguments], env=environ)
        deployment.processes.append(process)
        return process


class Deployment:
    """The server and the nodes; a context manager that ends them all.

    Its processes inherit this one's environment.
    """

    def __init__(self, folder: Path, seed: str, *, version: int) -> None:
        self.folder = folder
        self.seed = seed
        self.processes: list[Process] = []
        self.nodes: list[Node] = []
        self.server = EmbeddedPostgres(version=version, options={"max_connections": 200})
        self._writers = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.server)
        self.url = self.server.create_database(DATABASE)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
        self._stack.close()

    def add_node(self, *, lone: bool = False) -> None:
        self.nodes.append(Node(self, len(self.nodes), lone=lone))

    def proxy(self) -> TCPProxy:
        return self._stack.enter_context(TCPProxy(self.server.host, self.server.port))

    def next_writer(self) -> int:
        self._writers += 1
        return self._writers

    def terminate_backends(self, application: str) -> None:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=2) as admin:
                admin.execute(query, (application,))
        except psycopg.OperationalError:
            pass  # the server is down: it has no backend that could be terminated
