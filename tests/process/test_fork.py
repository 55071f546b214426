"""Processes that fork or end while they listen in the background."""

from __future__ import annotations

import textwrap

import pytest

from tests.integration.recording import query
from tests.processes import database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

PRELUDE = """
import os, sys, threading, django
django.setup()
from django.db import connections
from django_pgnotify import publish
from django_pgnotify.listening.background import background_listener

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def subscribe(channel, name):
    def heard(notifications):
        for notification in notifications:
            say(name, "heard", notification.payload.decode())
    def gap(since, until, cause):
        say(name, "gap", cause)
    background = background_listener("default")
    subscription = background.subscribe(channel, heard, gap)
    subscription.established.result(20)
    return background

def notify(channel, payload):
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, %s)", [channel, payload])

"""


def script(body: str) -> list[str]:
    return ["-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(body)]


def environment() -> dict[str, str | None]:
    return {"DJANGO_SETTINGS_MODULE": "tests.settings", **database_environ()}


def test_a_process_that_listens_ends_by_itself_at_the_end_of_its_program() -> None:
    body = """
        background = subscribe("a", "parent")
        say("backend", background.backend_pid)
    """
    with python(*script(body), env=environment()) as process:
        assert process.wait() == 0, process.report()
        backend = int(process.wait_for_line(r"^backend (\d+)")[1])
    assert process.stderr == ""
    assert query("SELECT 1 FROM pg_stat_activity WHERE pid = %s", backend) == []


def test_a_process_whose_server_is_gone_ends_too() -> None:
    body = """
        background = background_listener("default")
        background.subscribe("a", print)
        say("started")
    """
    env = environment() | {"DATABASE_URL": "postgresql://postgres@127.0.0.1:1/nothing"}
    with python(*script(body), env=env) as process:
        assert process.wait() == 0, process.report()


def test_sys_exit_and_an_unhandled_error_end_it_with_their_status() -> None:
    for statement, status in (("sys.exit(3)", 3), ("raise RuntimeError('as asked')", 1)):
        body = f"""
            subscribe("a", "parent")
            {statement}
        """
        with python(*script(body), env=environment()) as process:
            assert process.wait() == status, process.report()


def test_forked_workers_listen_and_publish_while_the_parent_goes_on() -> None:
    """A prefork server's life: the parent listens before it forks, each worker after it."""
    body = """
        background = subscribe("parent", "parent")
        backend = background.backend_pid
        connections.close_all()
        children = []
        for number in range(3):
            pid = os.fork()
            if pid == 0:
                own = subscribe(f"child{number}", f"child{number}")
                assert own is not background and own.backend_pid != backend
                for turn in range(50):
                    publish("parent", f"{number}.{turn}")
                notify(f"child{number}", "done")
                say(f"child{number} ended")
                sys.exit(0)
            children.append(pid)
        for turn in range(50):
            notify("parent", f"own {turn}")
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        say("statuses", statuses)
        notify("parent", "last")
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [backend])
            say("same backend", background.backend_pid == backend, cursor.fetchone()[0])
        done = threading.Event()
        background.subscribe("end", lambda notifications: done.set()).established.result(20)
        notify("end", "")
        done.wait(20)
    """
    with python(*script(body), env=environment()) as process:
        assert process.wait() == 0, process.report()
    assert "statuses [0, 0, 0]" in process.stdout
    assert "same backend True 1" in process.stdout
    assert "parent heard last" in process.stdout
    assert process.stdout.count("parent heard own ") == 50
    assert process.stdout.count('parent heard {"pgnotify"') == 150
    assert "gap" not in process.stdout
    assert "lost synchronization" not in process.stderr
    assert "Traceback" not in process.stderr


def test_a_child_that_ends_normally_says_no_goodbye_in_its_parents_name() -> None:
    body = """
        background = subscribe("a", "parent")
        backend = background.backend_pid
        connections.close_all()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                sys.exit(0)   # with all exit handlers and finalizers
            assert os.waitpid(pid, 0)[1] == 0
        notify("a", "still here")
        say("same backend", background.backend_pid == backend)
        done = threading.Event()
        background.subscribe("end", lambda notifications: done.set()).established.result(20)
        notify("end", "")
        done.wait(20)
    """
    with python(*script(body), env=environment()) as process:
        assert process.wait() == 0, process.report()
    assert "parent heard still here" in process.stdout
    assert "same backend True" in process.stdout
    assert "gap" not in process.stdout
    assert process.stderr == ""


def test_ids_of_events_of_forked_workers_never_collide() -> None:
    body = """
        publish("a")
        connections.close_all()
        for number in range(3):
            pid = os.fork()
            if pid == 0:
                say("id", publish("a"))
                sys.exit(0)
            os.waitpid(pid, 0)
        say("id", publish("a"))
    """
    with python(*script(body), env=environment()) as process:
        assert process.wait() == 0, process.report()
    ids = [line for line in process.stdout.splitlines() if line.startswith("id ")]
    assert len(ids) == len(set(ids)) == 4
