"""Processes with a background sender: they end, exit and fork, and lose and repeat nothing."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from tests.integration.hearing import Ear, hearing
from tests.processes import ROOT, Process, database_environ, python
from tests.proxy import TCPProxy
from tests.settings import database_url

pytestmark = pytest.mark.django_db(transaction=True)

PRELUDE = """
import atexit, multiprocessing, os, signal, sys, threading, django
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # which await_test() waits for
django.setup()
from concurrent.futures import ProcessPoolExecutor
from django.db import connections, transaction
from django_pgnotify import publish
from django_pgnotify.publishing.background import sender
from django_pgnotify.stats import publishing_stats

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def await_test(word):
    say(word)
    signal.sigwait({signal.SIGUSR1})

def flush():
    assert sender.flush(20), "not flushed"

def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except Exception as exc:
        say("child failed", repr(exc))
        os._exit(1)
    sys.exit(0)   # with all exit handlers and finalizers

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""

#: Seconds in which a process ends that has nothing to wait for; the sender itself gives up after 5.
SOON = 4.0


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "child") as one:
        yield one


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str | None]:
    """Settings with the background sender on, for a process and for its spawned children."""
    (tmp_path / "settings_in_background.py").write_text(
        "from tests.settings import *\nPGNOTIFY_BACKGROUND_SENDER = True\n"
    )
    return {
        "DJANGO_SETTINGS_MODULE": "settings_in_background",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        **database_environ(),
    }


def program(body: str, environment: dict[str, str | None]) -> Process:
    script = PRELUDE + textwrap.dedent(body)
    return python("-W", "ignore::DeprecationWarning", "-c", script, env=environment)


def ran(body: str, environment: dict[str, str | None], status: int = 0) -> Process:
    """A program that has ended by itself."""
    with program(body, environment) as process:
        assert process.wait() == status, process.report()
    return process


def through(proxy: TCPProxy) -> dict[str, str | None]:
    return {"DATABASE_URL": proxy.url(database_url(connections["default"].settings_dict))}


def go_on(process: Process, word: str) -> None:
    process.wait_for_line(f"^{word}$")
    process.signal(signal.SIGUSR1)


# -- a process that ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("raise RuntimeError('as asked')", 1)],
)
def test_a_process_that_publishes_and_ends_at_once_loses_nothing(
    ear: Ear, environment: dict[str, str | None], end: str, status: int
) -> None:
    body = f"""
        for number in range(300):
            publish("jobs", number)
        {end}
    """
    ran(body, environment, status)
    assert ear.data() == list(range(300))


def test_a_process_whose_last_act_is_a_large_transaction_loses_nothing(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    body = """
        with transaction.atomic():
            for number in range(5000):
                publish("jobs", number)
    """
    process = ran(body, environment)
    assert process.stderr == ""
    assert ear.data() == list(range(5000))


def test_what_a_thread_publishes_while_the_program_ends_is_sent(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    """Python waits for such a thread before it runs exit handlers."""
    body = """
        main = threading.main_thread()
        def work():
            main.join()
            publish("jobs", "last")
        publish("jobs", "first")
        threading.Thread(target=work).start()
    """
    ran(body, environment)
    assert ear.data() == ["first", "last"]


def test_what_an_exit_handler_publishes_is_sent(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    """Handlers run last in, first out: this one behind the sender's own."""
    body = """
        atexit.register(lambda: publish("jobs", "last"))
        publish("jobs", "first")
    """
    ran(body, environment)
    assert ear.data() == ["first", "last"]


def test_a_process_that_published_nothing_ends_without_having_connected(
    ear: Ear, environment: dict[str, str | None], proxy: TCPProxy
) -> None:
    ran("sender.flush(1)", environment | through(proxy))
    assert proxy.accepted == 0


def test_a_process_whose_server_is_gone_ends_and_says_what_was_lost(
    environment: dict[str, str | None], proxy: TCPProxy
) -> None:
    proxy.close()
    body = """
        for number in range(7):
            publish("jobs", f"s3cret {number}")
    """
    with program(body, environment | through(proxy)) as process:
        assert process.wait(timeout=SOON + 6) == 0, process.report()
    lost = [line for line in process.stderr.splitlines() if "could not be sent" in line]
    assert sum(int(line.split("publishing: ")[1].split(" ")[0]) for line in lost) == 7
    assert "s3cret" not in process.stderr


def test_a_process_whose_server_says_nothing_ends_and_says_what_was_lost(
    environment: dict[str, str | None], proxy: TCPProxy
) -> None:
    proxy.blackhole()
    body = """
        for number in range(7):
            publish("jobs", f"s3cret {number}")
    """
    with program(body, environment | through(proxy)) as process:
        assert process.wait(timeout=SOON + 10) == 0, process.report()
    lost = [line for line in process.stderr.splitlines() if "could not be sent" in line]
    assert sum(int(line.split("publishing: ")[1].split(" ")[0]) for line in lost) == 7
    assert "s3cret" not in process.stderr


# -- multiprocessing -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_child_that_publishes_and_ends_at_once_loses_nothing(
    ear: Ear, environment: dict[str, str | None], method: str
) -> None:
    """Such a child ends without running exit handlers."""
    body = f"""
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            for number in range(4):
                child = context.Process(target=publish, args=("jobs", number))
                child.start()
                child.join()
                assert child.exitcode == 0, child.exitcode
    """
    ran(body, environment)
    assert ear.data() == list(range(4))


def test_a_multiprocessing_child_of_a_parent_that_publishes_loses_nothing_of_either(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    body = """
        def work(number):
            for turn in range(20):
                publish("child", [number, turn])

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=work, args=(number,)) for number in range(3)]
        for number, child in enumerate(children):
            publish("jobs", number)
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0, child.exitcode
        publish("jobs", 3)
    """
    ran(body, environment)
    heard = ear.events()
    assert [event.data for event in heard if event.topic == "jobs"] == [0, 1, 2, 3]
    of_children = [event.data for event in heard if event.topic == "child"]
    for number in range(3):
        assert [turn for one, turn in of_children if one == number] == list(range(20))


def test_workers_of_a_pool_lose_nothing(ear: Ear, environment: dict[str, str | None]) -> None:
    body = """
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            ids = list(pool.map(publish, ["jobs"] * 50, range(50)))
        assert len(set(ids)) == 50
    """
    ran(body, environment)
    assert sorted(ear.data()) == list(range(50))


# -- fork ------------------------------------------------------------------------------------


def test_a_forked_child_leaves_alone_what_its_parent_has_queued_and_how_it_is_connected(
    ear: Ear, environment: dict[str, str | None], proxy: TCPProxy
) -> None:
    direct = connections["default"].settings_dict
    body = f"""
        publish("jobs", "warm")
        flush()
        await_test("connected")
        publish("jobs", "in flight")       # which the proxy holds back
        while sender._queue:
            pass
        publish("jobs", "queued")

        def work():
            assert sender.flush(0), "inherited what waits"
            connections["default"].settings_dict.update(
                HOST={direct["HOST"]!r}, PORT={direct["PORT"]!r}
            )
            publish("child", 1)
            flush()
            publish("child", 2)            # left to the end of the child

        say("status", status(fork(work)))
        assert not sender.flush(0)
        await_test("forked")
        flush()
        publish("jobs", "after")
    """
    with program(body, environment | through(proxy)) as process:
        process.wait_for_line("^connected$")
        proxy.blackhole()
        go_on(process, "connected")
        process.wait_for_line("^status 0$")
        process.wait_for_line("^forked$")
        # Of all that was published only the child's has left.
        heard = ear.frames()
        assert [ear.decode(one)[0].data for one in heard] == ["warm", 1, 2]
        parent, child = heard[0].backend, heard[1].backend
        assert parent != child == heard[2].backend
        proxy.resume()
        go_on(process, "forked")
        assert process.wait() == 0, process.report()
    rest = ear.frames()
    assert [event.data for one in rest for event in ear.decode(one)] == [
        "in flight", "queued", "after",
    ]  # fmt: skip
    assert {one.backend for one in rest} == {parent}
    assert "lost synchronization" not in process.stderr
    assert "Traceback" not in process.stderr
    assert proxy.accepted == 1


@pytest.mark.parametrize("end", ["pass", "os._exit(0)"])
def test_children_that_publish_nothing_do_not_end_their_parent_s_connection(
    ear: Ear, environment: dict[str, str | None], end: str
) -> None:
    body = f"""
        import gc

        def work():
            gc.collect()
            {end}

        publish("jobs", 0)
        flush()
        for number in range(1, 4):
            assert status(fork(work)) == 0
            publish("jobs", number)
            flush()
    """
    process = ran(body, environment)
    frames = ear.frames()
    assert [event.data for one in frames for event in ear.decode(one)] == [0, 1, 2, 3]
    assert len({one.backend for one in frames}) == 1
    assert process.stderr == ""


def test_forked_workers_publish_while_their_parent_goes_on(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    body = """
        publish("jobs", 0)
        children = []
        for number in range(3):
            def work():
                for turn in range(100):
                    publish("child", [number, turn])
            children.append(fork(work))
            publish("jobs", number + 1)
        assert [status(pid) for pid in children] == [0, 0, 0]
        publish("jobs", "last")
    """
    process = ran(body, environment)
    assert "Traceback" not in process.stderr
    heard = ear.events()
    assert [event.data for event in heard if event.topic == "jobs"] == [0, 1, 2, 3, "last"]
    of_children: list[Any] = [event.data for event in heard if event.topic == "child"]
    assert len(of_children) == 300
    for number in range(3):
        assert [turn for one, turn in of_children if one == number] == list(range(100))
    assert len({event.id for event in heard}) == 305


def test_a_child_of_a_child_publishes_too(ear: Ear, environment: dict[str, str | None]) -> None:
    body = """
        def grandchild():
            publish("jobs", 2)

        def child():
            publish("jobs", 1)
            flush()
            assert status(fork(grandchild)) == 0
            publish("jobs", 3)

        publish("jobs", 0)
        flush()
        assert status(fork(child)) == 0
        publish("jobs", 4)
    """
    ran(body, environment)
    assert ear.data() == [0, 1, 2, 3, 4]


def test_a_child_forked_while_another_thread_counts_is_not_stuck(
    ear: Ear, environment: dict[str, str | None]
) -> None:
    """The sender's thread counts what it sends, and a lock that is held stays so in the child."""
    body = """
        held, forked = threading.Event(), threading.Event()

        def count():
            with publishing_stats._lock:
                held.set()
                forked.wait()

        threading.Thread(target=count, daemon=True).start()
        held.wait()

        def work():
            publish("child", 1)
            flush()
            publish("child", 2)

        pid = fork(work)
        forked.set()
        assert status(pid) == 0
    """
    ran(body, environment)
    assert ear.data() == [1, 2]
