"""The example project as one deploys it: a database of its own, ``pglisten``, web processes."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql

from example_project.embedded import free_port
from tests.processes import Process, python

HOST = "127.0.0.1"


class Web:
    """A daphne that serves the board; it can be stopped and started again on its port."""

    def __init__(self, shop: Shop, name: str) -> None:
        self.shop = shop
        self.name = name
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.process: Process | None = None

    def start(self) -> None:
        self.process = self.shop.python(
            *("-m", "daphne", "-b", HOST, "-p", str(self.port)),
            "example_project.asgi:application",
            WEB_NAME=self.name,
        )
        self.process.wait_for_line("Listening on TCP address")

    def terminate(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        return self.process.terminate()


class Shop:
    """A context manager; two web processes, ``pglisten`` and a seeded database inside.

    Args:
        server_url: of any database of a server on which databases may be created.
        folder: for the cache that the processes share.
    """

    def __init__(self, server_url: str, folder: Path) -> None:
        self._server_url = server_url
        self._name = f"test_shop_{secrets.token_hex(4)}"
        self._folder = folder
        self._stack = ExitStack()
        self.database_url = psycopg.conninfo.make_conninfo(server_url, dbname=self._name)
        self.webs = [Web(self, "web 1"), Web(self, "web 2")]
        self.listener: Process

    def __enter__(self) -> Self:
        with self._stack:
            self._maintain("create database {}")
            self._stack.callback(self._maintain, "drop database {} with (force)")
            for command in ("migrate", "seed"):
                self._finish(self.python("manage.py", command))
            self.listener = self.python("manage.py", "pglisten")
            for web in self.webs:
                web.start()
            self.listener.wait_for_line("^pglisten: ready")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def python(self, *args: str, **env: str) -> Process:
        """A process of this deployment; it ends with it."""
        environ = {
            "DATABASE_URL": self._django_url(),
            "DEMO_DIR": str(self._folder),
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        return self._stack.enter_context(python(*args, env=environ))

    def elsewhere(self, code: str) -> str:
        """Run code in a process that does nothing else; what it printed.

        ``orders`` and the models of the shop are there.
        """
        imports = (
            "from example_project.shop import orders; from example_project.shop.models import *"
        )
        return self._finish(
            self.python("manage.py", "shell", "--no-imports", "-c", f"{imports}\n{code}")
        ).stdout.strip()

    def _finish(self, process: Process) -> Process:
        assert process.wait() == 0, process.report()
        return process

    def _django_url(self) -> str:
        from tests.settings import database_settings, database_url

        return database_url({**database_settings(self._server_url), "NAME": self._name})

    def _maintain(self, statement: str) -> None:
        maintenance = psycopg.conninfo.make_conninfo(self._server_url, dbname="postgres")
        with psycopg.connect(maintenance, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(self._name)))
