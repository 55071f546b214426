"""Programs that fork: prefork servers, multiprocessing and process pools, listening throughout.

The listening connection is this package's to protect: no child may use its parent's, whatever it
does. Django's own connections are the program's: it closes them before it forks, as it always had
to, unless a test says otherwise.
"""

from __future__ import annotations

import os
import re
import textwrap

import psycopg
import pytest

from tests.integration.recording import dsn, query
from tests.processes import Process, database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

PRELUDE = """
import concurrent.futures, multiprocessing, os, signal, sys, threading
import django
django.setup()
from django.db import connections
from django_pgnotify import publish, subscribe
from django_pgnotify.listening.background import background_listener, stop_all

fork = multiprocessing.get_context("fork")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def backend():
    return background_listener("default").backend_pid

def until(events, met):
    "Take events until one of them is met; all that was taken."
    taken = []
    while not taken or not met(taken[-1]):
        event = events.get(20)
        if event is None:
            raise SystemExit(f"{os.getpid()}: nothing more after {[e.data for e in taken]}")
        taken.append(event)
    return taken

"""


def program(body: str) -> Process:
    """A program, as a file's worth of code would run; without the warning that forks deserve."""
    env: dict[str, str | None] = {"DJANGO_SETTINGS_MODULE": "tests.settings", **database_environ()}
    code = PRELUDE + textwrap.dedent(body)
    return python("-W", "ignore::DeprecationWarning", "-c", code, env=env)


def finished(body: str) -> Process:
    """The program once it has ended by itself, with nothing to complain of."""
    with program(body) as process:
        assert process.wait() == 0, process.report()
    for trouble in ("lost synchronization", "Traceback", "SSL", "server closed", "gap"):
        assert trouble not in process.stderr + process.stdout, process.report()
    assert process.stderr == "", process.report()
    return process


def numbers(process: Process, pattern: str) -> list[int]:
    return [int(found) for found in re.findall(pattern, process.stdout, re.MULTILINE)]


def test_children_of_multiprocessing_publish_and_subscribe_while_the_parent_works() -> None:
    body = """
        def child(number, everybody):
            with subscribe([f"child{number}", "all"]) as events:
                say("backend", backend())
                everybody.wait(20)
                for turn in range(40):
                    publish("parent", [number, turn])
                own = until(events, lambda event: event.data == "end")
                say("child heard", len([e for e in own if e.topic == "all"]))

        with subscribe("parent") as events:
            say("backend", backend())
            first = backend()
            everybody = fork.Barrier(5)
            connections.close_all()
            children = [fork.Process(target=child, args=(n, everybody)) for n in range(4)]
            for each in children:
                each.start()
            everybody.wait(20)
            for turn in range(40):
                publish("all", turn)       # while all of them publish
            heard = []
            while len(heard) < 160:
                event = events.get(20)
                assert event is not None and event.action != "gap", event
                heard.append(event.data)
            for number in range(4):
                publish(f"child{number}", "end")
            for each in children:
                each.join(20)
            say("exit codes", [each.exitcode for each in children])
            assert all([n for who, n in heard if who == w] == list(range(40)) for w in range(4))
            assert backend() == first
            publish("parent", "last")
            say("parent heard", until(events, lambda event: event.data == "last")[-1].data)
    """
    process = finished(body)
    backends = numbers(process, r"^backend (\d+)")
    assert len(backends) == len(set(backends)) == 5
    assert numbers(process, r"^child heard (\d+)") == [40] * 4
    assert "exit codes [0, 0, 0, 0]" in process.stdout
    assert "parent heard last" in process.stdout


def test_a_prefork_server_whose_master_listens_before_it_forks_serves_and_replaces_workers() -> (
    None
):
    """As gunicorn with --preload: the app is imported, and subscribes, in the master."""
    body = """
        master = subscribe("master")       # at import time, in the master
        master.__enter__()
        masters = backend()
        say("backend", masters)

        def work(number):
            try:
                with subscribe(f"worker{number}") as requests:
                    say("backend", backend())
                    publish("master", ["ready", number])
                    for request in requests:
                        publish("master", ["answer", number, request.data])
                        if request.data == "stop":
                            break
                        if request.data == "die":
                            os.kill(os.getpid(), signal.SIGKILL)
            except BaseException as exc:
                say("worker failed", repr(exc))
                os._exit(1)
            os._exit(0)                     # as gunicorn's arbiter does, or nearly

        def spawn(number):
            connections.close_all()
            pid = os.fork()
            if pid == 0:
                work(number)
            until(master, lambda event: event.data == ["ready", number])
            return pid

        workers = {number: spawn(number) for number in range(3)}
        for turn in range(20):
            for number in workers:
                publish(f"worker{number}", turn)
        answers = []
        while len(answers) < 60:
            answers += [event.data[1:] for event in until(master, lambda event: True)]
        assert sorted(answers) == sorted([n, turn] for turn in range(20) for n in workers)
        publish("worker1", "die")
        _, status = os.waitpid(workers[1], 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        workers[1] = spawn(1)               # forked while three connections are in use
        publish("worker1", "again")
        until(master, lambda event: event.data == ["answer", 1, "again"])
        for number, pid in workers.items():
            publish(f"worker{number}", "stop")
            until(master, lambda event: event.data == ["answer", number, "stop"])
            say("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert backend() == masters
        assert master.stats["gaps"] == 0
        master.close()
    """
    process = finished(body)
    backends = numbers(process, r"^backend (\d+)")
    assert len(backends) == len(set(backends)) == 5
    assert numbers(process, r"^status (\d+)") == [0, 0, 0]


def test_a_pool_of_forked_processes_publishes_and_subscribes_in_every_task() -> None:
    body = """
        def task(number):
            with subscribe(f"task{number}") as events:
                publish(f"task{number}", number)
                publish("parent", number)
                [own] = until(events, lambda event: True)
            return os.getpid(), backend(), own.data

        with subscribe("parent") as events:
            first = backend()
            connections.close_all()
            with concurrent.futures.ProcessPoolExecutor(3, mp_context=fork) as pool:
                results = list(pool.map(task, range(60)))
            assert [data for _, _, data in results] == list(range(60))
            used = {pid: set() for pid, _, _ in results}
            for pid, backend_pid, _ in results:
                used[pid].add(backend_pid)
            say("one connection per worker", all(len(backends) == 1 for backends in used.values()))
            everybodys = [backend_pid for backends in used.values() for backend_pid in backends]
            assert len(set(everybodys)) == len(everybodys) and first not in everybodys
            heard = sorted(event.data for event in (events.get(20) for _ in range(60)))
            assert heard == list(range(60)), heard
            assert backend() == first and events.stats["dropped"] == 0
            say("done")
    """
    process = finished(body)
    assert "one connection per worker True" in process.stdout
    assert "done" in process.stdout


def test_a_pool_is_shut_down_and_its_workers_end_though_each_listens() -> None:
    """Exit handlers do not run in such a worker, and its listening thread must not keep it."""
    body = """
        def task(number):
            subscribe("task").__enter__()   # never left
            return backend()

        connections.close_all()
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=fork) as pool:
            backends = set(pool.map(task, range(10)))
            workers = list(pool._processes.values())
        for worker in workers:
            worker.join(10)
        say("ended", [worker.exitcode for worker in workers])
        for pid in backends:
            say("backend", pid)
    """
    with program(body) as process:
        assert process.wait() == 0, process.report()
    assert re.search(r"^ended \[0(, 0)?\]$", process.stdout, re.MULTILINE), process.report()
    assert "lost synchronization" not in process.stderr
    backends = numbers(process, r"^backend (\d+)")
    assert backends
    wait_until_gone(backends)


def wait_until_gone(backends: list[int]) -> None:
    with psycopg.connect(dsn(), autocommit=True) as other:
        for _ in range(100):
            row = other.execute(
                "SELECT count(*), pg_sleep(CASE WHEN count(*) > 0 THEN 0.1 END)"
                " FROM pg_stat_activity WHERE pid = ANY(%s)",
                [backends],
            ).fetchone()
            assert row is not None
            if row[0] == 0:
                return
    raise AssertionError(f"still connected: {query('SELECT pid FROM pg_stat_activity')}")


def test_a_child_of_a_child_listens_on_a_connection_of_its_own() -> None:
    body = """
        def descend(depth):
            with subscribe("family") as events:
                say("backend", backend())
                if depth:
                    connections.close_all()
                    child = fork.Process(target=descend, args=(depth - 1,))
                    child.start()
                    child.join(30)
                    assert child.exitcode == 0, child.exitcode
                publish("family", depth)
                heard = [e.data for e in until(events, lambda event: event.data == depth)]
                assert heard == list(range(depth + 1)), heard

        descend(3)
        say("done")
    """
    process = finished(body)
    backends = numbers(process, r"^backend (\d+)")
    assert len(backends) == len(set(backends)) == 4
    assert "done" in process.stdout


def test_forking_without_a_pause_while_events_pour_in_disturbs_neither_side() -> None:
    """Threads hold locks at any moment: none of those in a child may wait for one for ever."""
    body = """
        stop = threading.Event()

        def pour():
            number = 0
            while not stop.is_set():
                publish("pour", number)
                number += 1
            publish("pour", "end")
            connections.close_all()

        def child(number):
            signal.alarm(20)                # a deadlock is a failure, not a wait
            publish("children", number)
            with subscribe("children") as events:
                publish("children", number)
                until(events, lambda event: event.data == number)

        with subscribe("pour", max_waiting=10**9) as events:
            first = backend()
            pouring = threading.Thread(target=pour)
            pouring.start()
            codes = []
            for number in range(25):
                each = fork.Process(target=child, args=(number,))
                each.start()
                each.join(30)
                codes.append(each.exitcode)
            stop.set()
            pouring.join()
            heard = [event.data for event in until(events, lambda event: event.data == "end")]
            assert heard[:-1] == list(range(len(heard) - 1))
            assert backend() == first
            say("codes", set(codes), "heard some", len(heard) > 25)
    """
    process = finished(body)
    assert "codes {0} heard some True" in process.stdout


def test_a_child_that_publishes_on_a_connection_it_inherited_open_does_not_share_the_socket() -> (
    None
):
    """Whoever forgets to close Django's connections before a fork gets them new in the child."""
    body = """
        def django_backend():
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                return cursor.fetchone()[0]

        def child(number, everybody):
            everybody.wait(20)
            for turn in range(100):
                publish("all", [number, turn])
            say("django", django_backend())

        with subscribe("all") as events:
            publish("all", "the parent's connection is open")
            until(events, lambda event: True)
            say("django", django_backend())
            everybody = fork.Barrier(4)
            children = [fork.Process(target=child, args=(n, everybody)) for n in range(3)]
            for each in children:
                each.start()
            everybody.wait(20)
            for turn in range(100):
                publish("all", [3, turn])
            for each in children:
                each.join(20)
            say("codes", [each.exitcode for each in children])
            heard = [event.data for event in (events.get(20) for _ in range(400)) if event]
            assert all([t for who, t in heard if who == w] == list(range(100)) for w in range(4))
            say("django", django_backend())
    """
    process = finished(body)
    assert "codes [0, 0, 0]" in process.stdout
    mine, *children, still_mine = numbers(process, r"^django (\d+)")
    assert mine == still_mine
    assert len({mine, *children}) == 4


def test_no_connection_of_a_program_that_forked_is_left_behind() -> None:
    body = """
        def child():
            with subscribe("a"):
                say("backend", backend())

        with subscribe("a"):
            say("backend", backend())
            connections.close_all()
            for _ in range(3):
                each = fork.Process(target=child)
                each.start()
                each.join(20)
                assert each.exitcode == 0
    """
    process = finished(body)
    backends = numbers(process, r"^backend (\d+)")
    assert len(set(backends)) == 4
    assert os.getpid() not in backends
    wait_until_gone(backends)
