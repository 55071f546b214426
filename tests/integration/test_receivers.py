"""How receivers run: threads and their connections, the loop, limits, order under concurrency."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction
from pytest_django import Settings

from django_pgnotify import Event, publish, receiver
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import RunningListener, running_listener
from tests.integration.recording import (
    DEADLINE,
    Gate,
    Recorder,
    failures,
    other_backends,
    query,
    stats,
)
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# -- threads and their connections --------------------------------------------------------------


def test_a_sync_receiver_runs_in_a_thread_of_its_own_with_its_own_connection() -> None:
    seen: list[tuple[str, int]] = []

    @receiver("jobs")
    def run(event: Event) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            seen.append((threading.current_thread().name, cursor.fetchone()[0]))

    with running_listener() as listener:
        publish("jobs")
        listener.wait_for(1)
        [(thread, pid)] = seen
        assert thread.startswith("pgnotify-receiver")
        assert pid not in (query("SELECT pg_backend_pid()")[0][0], listener.backend_pid)


def test_receivers_leave_no_idle_connection_behind() -> None:
    @receiver("jobs", concurrency=4)
    def run(event: Event) -> None:
        Order.objects.count()

    with running_listener() as listener:
        for number in range(20):
            publish("jobs", number)
        listener.wait_for(20)
        wait_until_gone()


@pytest.mark.parametrize("max_age", [None, 600])
def test_persistent_connections_are_kept_by_the_threads_and_closed_at_the_end(
    monkeypatch: pytest.MonkeyPatch, max_age: int | None
) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "CONN_MAX_AGE", max_age)

    @receiver("jobs", concurrency=4)
    def run(event: Event) -> None:
        Order.objects.count()

    with running_listener() as listener:
        for number in range(20):
            publish("jobs", number)
        listener.wait_for(20)
        assert 1 <= len(other_backends()) <= 8  # PGNOTIFY_CONCURRENCY threads
    wait_until_gone()


def wait_until_gone() -> None:
    """A closed connection's backend needs a moment to go."""
    deadline = time.monotonic() + 5
    while (left := other_backends()) and time.monotonic() < deadline:
        pass
    assert left == []


def test_a_receiver_whose_connection_was_terminated_works_on_the_next_event() -> None:
    pids: list[int] = []

    @receiver("jobs")
    def run(event: Event) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pid = cursor.fetchone()[0]
            if event.data == "die":
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            pids.append(pid)

    with running_listener() as listener, failures() as told:
        # In one frame: the next event comes with no pause in which somebody could tidy up.
        with transaction.atomic():
            publish("jobs", "die")
            publish("jobs", "live")
        listener.wait_for(2)
        publish("jobs", "live too")
        listener.wait_for(3)
        assert [entry["event"].data for entry in told] == ["die"]
    assert len(pids) == 2


@pytest.mark.parametrize("max_age", [0, None])
def test_a_connection_that_dies_while_idle_costs_no_event_where_health_checks_are_on(
    monkeypatch: pytest.MonkeyPatch, max_age: int | None
) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "CONN_MAX_AGE", max_age)
    monkeypatch.setitem(connections["default"].settings_dict, "CONN_HEALTH_CHECKS", True)

    @receiver("jobs")
    def run(event: Event) -> None:
        Order.objects.count()

    with running_listener() as listener, failures() as told:
        publish("jobs", 1)
        listener.wait_for(1)
        query(
            "SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s::int[]) AS pid",
            [pid for pid, _ in other_backends()],
        )
        publish("jobs", 2)
        listener.wait_for(2)
        assert stats(listener)["handled"] == 2
        assert told == []
    wait_until_gone()


def test_an_async_receiver_that_lost_its_connection_works_on_the_next_event() -> None:
    counted: list[Any] = []

    @receiver("jobs")
    async def run(event: Event) -> None:
        if event.data == "die":
            await asyncio.to_thread(end_backend_of_async_orm)
        counted.append(await Order.objects.acount())

    def end_backend_of_async_orm() -> None:
        from asgiref.sync import SyncToAsync

        def end() -> None:
            with suppress(OperationalError), connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        SyncToAsync.single_thread_executor.submit(end).result(DEADLINE)

    with running_listener() as listener, failures() as told:
        publish("jobs", 0)
        listener.wait_for(1)
        with transaction.atomic():
            publish("jobs", "die")
            publish("jobs", 2)
        listener.wait_for(3)
        assert len(told) <= 1  # the one whose connection was taken away
    assert len(counted) >= 2


# -- async ------------------------------------------------------------------------------------


def test_an_async_receiver_runs_on_the_listeners_loop_and_uses_the_async_orm() -> None:
    seen: list[tuple[str, Any, int]] = []

    @receiver(Order)
    async def run(event: Event) -> None:
        row = await event.ainstance()
        seen.append((threading.current_thread().name, row, await Order.objects.acount()))

    with running_listener() as listener:
        order = Order.objects.create(status="new")
        listener.wait_for(1)
    [(thread, row, count)] = seen
    assert thread == "running-listener"
    assert (row, count) == (order, 1)


def test_a_hundred_async_events_leave_at_most_one_connection() -> None:
    @receiver("jobs", concurrency=4)
    async def run(event: Event) -> None:
        await Order.objects.acount()

    with running_listener() as listener:
        with transaction.atomic():
            for number in range(100):
                publish("jobs", number)
        listener.wait_for(100)
        assert len(other_backends()) <= 1


def test_the_reader_goes_on_while_every_receiver_is_busy(recorder: Recorder) -> None:
    with Gate() as gate:
        receiver("jobs")(gate.pass_through)
        receiver("other")(recorder)
        with running_listener() as listener:
            publish("jobs")
            gate.wait_for(1)
            publish("other", 1)
            recorder.wait_for(1)
            gate.open()
            listener.wait_for(2)


# -- concurrency and order ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_concurrency_n_runs_exactly_n_at_once(kind: str) -> None:
    with Gate() as gate:
        receiver("jobs", concurrency=3)(gate.pass_through if kind == "sync" else gate.apass_through)
        with running_listener() as listener:
            with transaction.atomic():
                for number in range(9):
                    publish("jobs", number)
            gate.wait_for(3)
            assert listener.service is not None
            assert listener.service.dispatcher.running == 3
            gate.open()
            listener.wait_for(9)
        assert gate.most == 3


def test_without_concurrency_one_event_runs_at_a_time_in_order() -> None:
    inside = 0
    overlaps: list[Any] = []
    order: list[Any] = []

    @receiver("jobs")
    def run(event: Event) -> None:
        nonlocal inside
        inside += 1
        if inside > 1:
            overlaps.append(event.data)
        order.append(event.data)
        inside -= 1

    with running_listener() as listener:
        for number in range(200):
            publish("jobs", number, key=str(number % 7))
        listener.wait_for(200)
    assert overlaps == []
    assert order == list(range(200))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_events_of_one_key_stay_in_order_and_never_overlap_under_concurrency(kind: str) -> None:
    lock = threading.Lock()
    running: set[Any] = set()
    overlaps: list[Any] = []
    order: dict[str, list[int]] = {}

    def enter(event: Event) -> None:
        with lock:
            if event.key in running:
                overlaps.append(event.key)
            running.add(event.key)
            order.setdefault(str(event.key), []).append(event.data)

    def leave(event: Event) -> None:
        with lock:
            running.discard(event.key)

    def run(event: Event) -> None:
        enter(event)
        time.sleep(0)  # lets the other threads in
        leave(event)

    async def arun(event: Event) -> None:
        enter(event)
        await asyncio.sleep(0)
        leave(event)

    receiver("jobs", concurrency=8)(run if kind == "sync" else arun)
    with running_listener() as listener:
        for batch in range(10):
            with transaction.atomic():
                for number in range(50):
                    publish("jobs", batch * 50 + number, key=f"key {number % 5}")
        listener.wait_for(500)
    assert overlaps == []
    assert sorted(order) == [f"key {number}" for number in range(5)]
    for numbers in order.values():
        assert numbers == sorted(numbers)
        assert len(numbers) == 100


def test_a_busy_key_does_not_hold_up_the_others() -> None:
    done = Recorder()
    with Gate() as gate:

        @receiver("jobs", concurrency=2)
        def run(event: Event) -> None:
            if event.key == "slow":
                gate.pass_through()
            done(event)

        with running_listener() as listener:
            with transaction.atomic():
                publish("jobs", 1, key="slow")
                publish("jobs", 2, key="slow")
                publish("jobs", 3, key="quick")
            gate.wait_for(1)
            done.wait_for(1)
            assert done.data == [3]
            gate.open()
            listener.wait_for(3)
    assert done.data == [3, 1, 2]


def test_the_changes_of_a_row_are_handled_in_order_under_concurrency() -> None:
    order: dict[Any, list[str]] = {}
    lock = threading.Lock()

    @receiver(Order, concurrency=8)
    def run(event: Event) -> None:
        with lock:
            order.setdefault(event.pk, []).append(event.action)

    with running_listener() as listener:
        with transaction.atomic():
            rows = [Order.objects.create() for _ in range(20)]
            for row in rows:
                row.save()
        listener.wait_for(40)
    assert len(order) == 20
    assert all(actions == ["created", "updated"] for actions in order.values())


@pytest.mark.parametrize("kinds", ["sync sync sync", "async async async", "sync async sync"])
def test_no_more_than_the_global_limit_of_receivers_run_at_once(
    kinds: str, settings: Settings
) -> None:
    settings.PGNOTIFY_CONCURRENCY = 2
    with Gate() as gate:
        for number, kind in enumerate(kinds.split()):
            receiver("jobs", dispatch_uid=f"limited {number}", concurrency=4)(
                gate.pass_through if kind == "sync" else gate.apass_through
            )
        with running_listener() as listener:
            with transaction.atomic():
                for number in range(5):
                    publish("jobs", number)
            gate.wait_for(2)
            listener_has_dispatched(listener, 5)
            assert gate.most == 2
            gate.open()
            listener.wait_for(5)
        assert gate.most <= 2


def listener_has_dispatched(listener: RunningListener, count: int) -> None:
    """Wait until the events are in their lanes and each task had a turn on the loop."""
    deadline = time.monotonic() + DEADLINE
    while len(listener.events) < count and time.monotonic() < deadline:
        time.sleep(0)

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    listener._on_loop(turns(), DEADLINE)
