"""Events ride with the COMMIT: out with it, never without it, and by the hook where they cannot."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import psycopg
import pytest
from django.db import Error, IntegrityError, connection, transaction
from pytest_django import Settings

from django_pgnotify import publish
from django_pgnotify.publishing import riding
from django_pgnotify.publishing.buffer import FIRST_PORTION
from django_pgnotify.publishing.statement import commit_and_notify
from django_pgnotify.stats import publishing_stats
from example_project.embedded import EmbeddedPostgres
from tests.integration.hearing import (
    Ear,
    before_anything_else,
    full_queue,
    hearing,
    statements,
    terminate_own_backend,
)
from tests.integration.recording import query
from tests.integration.redirecting import default_reached
from tests.settings import database_settings
from tests.testapp.models import Order, Shipment

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others", "testapp.order", "testapp.shipment") as one:
        yield one


@pytest.fixture
def rides(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each ride so far, how many frames it took."""
    taken: list[int] = []

    def counted(frames: Any, connection: Any) -> psycopg.Error | None:
        taken.append(len(frames))
        return commit_and_notify(frames, connection)

    monkeypatch.setattr(riding, "commit_and_notify", counted)
    return taken


def test_what_breaks_right_after_the_commit_costs_no_event(ear: Ear, rides: list[int]) -> None:
    try:
        with transaction.atomic():
            order = Order.objects.create()
            publish("jobs", 1)
            before_anything_else(terminate_own_backend)
    finally:
        connection.close()
    assert Order.objects.filter(pk=order.pk).exists()
    assert [event.topic for event in ear.events()] == ["testapp.order", "jobs"]
    assert rides == [2]


def test_each_event_is_sent_once_and_counted_once(ear: Ear, rides: list[int]) -> None:
    published, frames = publishing_stats["published"], publishing_stats["frames"]
    ran = []
    with transaction.atomic():
        Order.objects.exists()
        for number in range(3):
            publish("jobs", number)
        transaction.on_commit(lambda: ran.append(len(ear.data())))
    assert ran == [3]
    assert ear.data() == []
    assert publishing_stats["published"] == published + 3
    assert publishing_stats["frames"] == frames + 1
    assert rides == [1]


def test_the_event_is_not_heard_before_the_row_is_there(ear: Ear, rides: list[int]) -> None:
    with transaction.atomic():
        order = Order.objects.create(status="paid")
    [heard] = ear.frames()
    [event] = ear.decode(heard)
    assert event.pk == order.pk
    assert ear.execute("SELECT status FROM testapp_order WHERE id = %s", order.pk) == "paid"
    assert rides == [1]


def test_a_commit_that_fails_takes_its_events_along(ear: Ear, rides: list[int]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        publish("jobs", "never")
        Shipment.objects.create(order_id=-1)  # the foreign key is checked by the COMMIT
    assert rides
    assert ear.events() == []
    with transaction.atomic():
        publish("jobs", "next")
    assert ear.data() == ["next"]


def test_a_transaction_that_an_error_has_broken_sends_nothing(ear: Ear, rides: list[int]) -> None:
    """Django commits what its code lets through, and PostgreSQL makes a rollback of it."""
    with transaction.atomic():
        publish("jobs", "never")
        try:
            with connection.connection.cursor() as raw:
                raw.execute("SELECT 1 / 0")
        except psycopg.errors.DivisionByZero:
            pass
    assert rides == []
    assert ear.events() == []


@pytest.mark.parametrize("at", ["the call", "the commit"])
def test_a_notify_that_fails_behind_the_commit_is_counted_and_the_rows_stand(
    ear: Ear,
    rides: list[int],
    caplog: pytest.LogCaptureFixture,
    at: Literal["the call", "the commit"],
) -> None:
    failed = publishing_stats["publish_failed"]
    hooks = []
    with full_queue(at):
        backend = connection.connection.info.backend_pid
        with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"), transaction.atomic():
            order = Order.objects.create(note="s3cret-payload")
            transaction.on_commit(lambda: hooks.append(1))
        assert hooks == [1]
        assert connection.get_autocommit()
        assert Order.objects.filter(pk=order.pk).exists()
        assert connection.connection.info.backend_pid == backend
    assert rides == [1]
    assert publishing_stats["publish_failed"] == failed + 1
    assert "too many notifications" in caplog.text
    assert "s3cret-payload" not in caplog.text
    assert ear.events() == []


def test_a_queue_that_is_really_full_costs_the_events_and_nothing_else(
    rides: list[int],
    caplog: pytest.LogCaptureFixture,
    start_server: Callable[..., EmbeddedPostgres],
) -> None:
    server = start_server(options={"fsync": "off", "max_notify_queue_pages": "64"})  # the least
    failed = publishing_stats["publish_failed"]
    large = "x" * 7000
    with ExitStack() as stack:
        stack.enter_context(default_reached(**database_settings(server.url())))
        stack.enter_context(caplog.at_level(logging.ERROR, "django_pgnotify.publishing"))
        reader = stack.enter_context(psycopg.connect(server.url(), autocommit=True))
        reader.execute("LISTEN jobs")
        reader.execute("BEGIN")  # who sits in a transaction does not read
        with pytest.raises(Error, match="too many notifications"):
            for _ in range(200):
                publish("jobs", large, delivery="atomic")
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("CREATE TABLE rows AS SELECT 1 AS value")
            publish("jobs", large)
        assert query("SELECT value FROM rows") == [(1,)]
        assert "too many notifications" in caplog.text
    assert rides == [1]
    assert publishing_stats["publish_failed"] == failed + 1


def test_a_connection_that_is_gone_at_the_commit_raises_as_a_commit_does(
    ear: Ear, rides: list[int]
) -> None:
    try:
        with pytest.raises(Error), transaction.atomic():
            publish("jobs", "never")
            Order.objects.exists()
            terminate_own_backend()
    finally:
        connection.close()
    assert rides
    assert ear.events() == []
    publish("jobs", "next")
    assert ear.data() == ["next"]


def test_what_a_savepoint_has_undone_does_not_ride(ear: Ear, rides: list[int]) -> None:
    with transaction.atomic():
        Order.objects.exists()
        publish("jobs", 1)
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            publish("jobs", 2)
            raise ZeroDivisionError
        with transaction.atomic():
            publish("jobs", 3)
    assert ear.data() == [1, 3]
    assert rides == [1]


def test_who_looks_at_the_queries_sees_them(ear: Ear, rides: list[int]) -> None:
    with statements() as seen, transaction.atomic():
        Order.objects.exists()
        publish("jobs", 1)
    assert len(seen.notify) == 1
    assert ear.data() == [1]
    assert rides == []


def test_one_that_is_too_big_for_a_frame_keeps_the_others_from_riding(
    ear: Ear, rides: list[int]
) -> None:
    data = [1, "x" * 9000, 3]
    with transaction.atomic():
        Order.objects.exists()
        for one in data:
            publish("jobs", one)
    assert ear.data() == data
    assert rides == []


def test_the_first_events_of_a_large_transaction_ride_and_the_others_follow(
    ear: Ear, rides: list[int]
) -> None:
    count = 3 * FIRST_PORTION
    with transaction.atomic():
        Order.objects.exists()
        for number in range(count):
            if number % 7:
                publish("jobs", number)
            else:
                with transaction.atomic():
                    publish("jobs", number)
    assert ear.data() == list(range(count))
    assert len(rides) == 1


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_events_for_another_database_leave_by_the_hook(rides: list[int]) -> None:
    with hearing("jobs", using="other") as other:
        with transaction.atomic():
            Order.objects.exists()
            publish("jobs", 1, using="other")
        assert other.data() == [1]
    assert rides == []


def test_where_nothing_is_to_be_committed_a_notify_is_all_that_is_sent(
    ear: Ear, rides: list[int]
) -> None:
    """psycopg begins a transaction with its first statement."""
    with transaction.atomic():
        publish("jobs", 1)
    assert ear.data() == [1]
    assert rides == []


def test_signed_frames_ride_too(ear: Ear, rides: list[int], settings: Settings) -> None:
    settings.PGNOTIFY_SIGNING = True
    with transaction.atomic():
        Order.objects.exists()
        publish("jobs", "signed")
    assert ear.data() == ["signed"]
    assert rides == [1]


def test_the_connection_is_as_before_after_a_ride(ear: Ear, rides: list[int]) -> None:
    for number in range(20):
        with transaction.atomic():
            Order.objects.exists()
            publish("jobs", number)
        raw = connection.connection
        assert raw.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF
        assert raw.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert connection.get_autocommit()
        assert Order.objects.count() == 0
    assert ear.data() == list(range(20))
    assert rides == [1] * 20
