"""The quickstart, followed to the letter: a new project, outside the repository, on PostgreSQL.

Only two things are done instead of what the page says. ``pip install`` is a path to the package,
and the database is one of the session's server.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.plugin import Server
from tests.processes import Process
from tests.settings import database_settings, database_url
from tests.snippets import DOCS, ROOT, Snippet, snippets

PAGES = [ROOT / "README.md", DOCS / "quickstart.md"]
STEPS = frozenset({"write", "append", "shell", "psql", "output"})


class Project:
    """The project that a page has its reader build, and what the reader does with it."""

    def __init__(self, page: Path, directory: Path, url: str) -> None:
        self.url = url
        self.cwd = directory
        self.steps = [
            s for s in snippets(page) if s.instruction in STEPS or s.language == "console"
        ]
        self.environment: dict[str, str | None] = {
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": None,
            "DATABASE_URL": None,
            # With it, print() in two threads may mix within a line.
            "PYTHONUNBUFFERED": None,
        }

    def build(self) -> None:
        """Do what the page says, up to the command that listens."""
        while self.steps:
            step = self.steps[0]
            if step.language == "console":
                for command in step.commands:
                    if is_listen(command):
                        return
                    self.run(command)
            else:
                self.write(step)
            self.steps.pop(0)
        raise AssertionError("the page never says to run pglisten")

    def run(self, command: str) -> None:
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            assert words[2].startswith("django-pgnotify"), command
        elif words[0] == "cd":
            self.cwd /= words[1]
        else:
            with self.process(*words) as process:
                assert process.wait() == 0, process.report()

    def write(self, step: Snippet) -> None:
        path = self.cwd / step.argument
        if step.instruction == "write":
            path.write_text(step.text, encoding="utf-8")
            return
        assert step.instruction == "append", step.place
        text = path.read_text(encoding="utf-8") + "\n" + step.text
        if "DATABASES" in step.text:
            text += f'DATABASES["default"] = {database_settings(self.url)!r}\n'
        path.write_text(text, encoding="utf-8")

    def process(self, *words: str) -> Process:
        return Process(words, env=self.environment, cwd=self.cwd)

    def listen(self) -> Process:
        process = self.process("python", "manage.py", "pglisten")
        process.wait_for_line("^pglisten: ready")
        return process

    def shell(self, code: str) -> None:
        with self.process("python", "manage.py", "shell", "-c", code) as process:
            assert process.wait() == 0, process.report()

    def psql(self, statement: str) -> list[tuple[object, ...]]:
        """Run SQL as a program that knows nothing of Django."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


def is_listen(command: str) -> bool:
    return command.endswith("manage.py pglisten")


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.stem)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pg_server: Server
) -> Iterator[Project]:
    name = f"test_quickstart_{os.getpid()}_{request.param.stem.lower()}"
    database = sql.Identifier(name)
    with ExitStack() as stack:
        maintenance = psycopg.conninfo.make_conninfo(pg_server.url, dbname="postgres")
        server = stack.enter_context(psycopg.connect(maintenance, autocommit=True))
        server.execute(sql.SQL("CREATE DATABASE {}").format(database))
        stack.callback(server.execute, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))
        url = database_url({**database_settings(pg_server.url), "NAME": name})
        built = Project(request.param, tmp_path_factory.mktemp("home"), url)
        built.build()
        yield built


@pytest.fixture
def listener(project: Project) -> Iterator[Process]:
    """``pglisten`` in the project, which at the end of each test stops as it should."""
    with project.listen() as process:
        yield process
        assert process.terminate() == 0, process.report()
        assert process.stdout.splitlines()[-1] == "pglisten: stopped"


def statuses(process: Process) -> list[str]:
    return re.findall(r"^order \d+ created \{'status': '(\w+)'\}", process.stdout, re.MULTILINE)


def test_the_page_followed_to_the_letter_shows_what_it_says(project: Project) -> None:
    project.psql("TRUNCATE shop_order RESTART IDENTITY")
    with ExitStack() as stack:
        process: Process | None = None
        shown = 0
        for step in project.steps:
            if step.language == "console":
                if any(map(is_listen, step.commands)):
                    last = step.commands[-1]
                    assert is_listen(last), step.place
                    process = stack.enter_context(project.process(*shlex.split(last)))
            elif step.instruction == "shell":
                project.shell(step.text)
            elif step.instruction == "psql":
                project.psql(step.text)
            elif step.instruction == "output":
                assert process is not None
                for line in step.text.splitlines():
                    process.wait_for_line(f"^{re.escape(line)}$")
                    shown += 1
        assert process is not None
        assert shown > 5
        assert process.interrupt() == 0
        assert process.stderr == ""


def test_a_thousand_saves_in_one_transaction_arrive_once_each_and_in_order(
    project: Project, listener: Process
) -> None:
    project.shell(
        """
from django.db import transaction
from shop.models import Order

with transaction.atomic():
    for number in range(500):
        Order.objects.create(status=f"n{number}")
    for number in range(500, 1000):
        with transaction.atomic():
            Order.objects.create(status=f"n{number}")
Order.objects.create(status="last")
"""
    )
    listener.wait_for_line("'last'")
    assert statuses(listener) == [*(f"n{number}" for number in range(1000)), "last"]


def test_a_transaction_or_savepoint_that_rolls_back_sends_nothing(
    project: Project, listener: Process
) -> None:
    project.shell(
        """
from django.db import transaction
from django_pgnotify import publish
from shop.models import Order

def attempt(inside):
    try:
        with transaction.atomic():
            Order.objects.create(status="never")
            publish("jobs", "never")
            raise LookupError
    except LookupError:
        Order.objects.create(status=inside)
        publish("jobs", inside)

attempt("alone")
with transaction.atomic():
    Order.objects.create(status="before")
    attempt("savepoint")
publish("jobs", "last")
"""
    )
    listener.wait_for_line("^job: last$")
    listener.wait_for_line("'savepoint'")
    assert statuses(listener) == ["alone", "before", "savepoint"], listener.report()
    assert re.findall("^job: (.*)$", listener.stdout, re.MULTILINE) == [
        "alone",
        "savepoint",
        "last",
    ]


def test_a_notify_from_psql_arrives(project: Project, listener: Process) -> None:
    project.psql("NOTIFY jobs, 'do job 1001'")
    listener.wait_for_line("^job: do job 1001$")


def test_a_terminated_backend_is_survived(project: Project, listener: Process) -> None:
    backends = project.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'pglisten' AND datname = current_database()"
    )
    assert backends == [(True,)]
    listener.wait_for_line("^pglisten: ready", count=2)
    project.shell("from shop.models import Order; Order.objects.create(status='afterwards')")
    listener.wait_for_line("'afterwards'")
    assert statuses(listener) == ["afterwards"]


def test_the_project_passes_its_checks(project: Project) -> None:
    with project.process("python", "manage.py", "check", "--fail-level", "WARNING") as process:
        assert process.wait() == 0, process.report()
    with project.process("python", "manage.py", "pglisten", "--check") as process:
        assert process.wait() == 0, process.report()
    assert process.stdout == "pglisten: ok, a NOTIFY gets through on database 'default'\n"
