"""Durable consumers: what is in the log is handled, in order, however it was written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction

from django_pgnotify import Event, Topic, consumers, publish, publish_many, receiver
from django_pgnotify.models import Consumer, DeadLetter, LoggedEvent
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.recording import DEADLINE, Recorder, dsn, failures, notify, rolled_back
from tests.testapp.models import Order, Sku

pytestmark = pytest.mark.django_db(transaction=True)

LEDGER = Topic("ledger", delivery="durable")


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture(autouse=True)
def _quick(settings: Any) -> None:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 0.05


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def consume(recorder: Any, name: str = "ledger", **options: Any) -> None:
    receiver(options.pop("source", LEDGER), dispatch_uid=name, **options)(recorder)


@contextmanager
def other_session() -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn()) as other:
        yield other


def test_a_consumer_hears_what_is_published_while_it_runs(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        publish(LEDGER, {"n": 1})
        [event] = recorder.wait_for(1)
    assert (event.topic, event.action, event.data) == ("ledger", "published", {"n": 1})
    assert event.using == "default"


def test_what_was_published_while_no_listener_ran_is_handled_by_the_next(
    recorder: Recorder,
) -> None:
    consume(recorder)
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
    publish(LEDGER, 2)
    with transaction.atomic():
        publish(LEDGER, 3)
    with rolled_back():
        publish(LEDGER, "never")
    with running_listener():
        recorder.wait_for(3)
    assert recorder.data == [1, 2, 3]


def test_a_new_consumer_starts_from_now_or_from_the_beginning_by_choice() -> None:
    late, early = Recorder(), Recorder()
    publish(LEDGER, "before")
    consume(late, "late")
    consume(early, "early", start="beginning")
    with running_listener():
        publish(LEDGER, "after")
        early.wait_for(2)
        late.wait_for(1)
    assert early.data == ["before", "after"]
    assert late.data == ["after"]


def test_an_event_that_commits_late_is_not_lost_behind_one_that_was_quicker(
    recorder: Recorder,
) -> None:
    consume(recorder)
    with running_listener(), other_session() as slow:
        slow.execute(
            "INSERT INTO pgnotify_event_log (topic, source, body)"
            " VALUES ('ledger', 'psql', '{\"data\": \"slow\"}')"
        )
        publish(LEDGER, "quick")
        recorder.wait_for(1)
        slow.commit()
        consumers.wake_consumers("default")
        recorder.wait_for(2)
    assert recorder.data == ["quick", "slow"]


def test_more_than_a_page_that_was_missed_is_read_page_by_page_in_order(
    recorder: Recorder,
) -> None:
    consume(recorder)
    with running_listener():
        pass
    with other_session() as slow:
        # The lowest id of all, committed last: where the sweep begins must allow for it.
        slow.execute(
            "INSERT INTO pgnotify_event_log (topic, source, body)"
            " VALUES ('ledger', 'psql', '{\"data\": -1}')"
        )
        for start in range(0, 3500, 500):
            publish_many(LEDGER, range(start, start + 500))
            publish_many(Topic("other", "durable"), range(700))
        slow.commit()
    with running_listener():
        recorder.wait_for(3501)
    assert recorder.data == [-1, *range(3500)]


def test_a_long_transaction_elsewhere_does_not_hold_events_up(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener(), other_session() as long:
        long.execute("SELECT pg_current_xact_id()")
        for n in range(5):
            publish(LEDGER, n)
            recorder.wait_for(n + 1)
    assert recorder.data == [0, 1, 2, 3, 4]


def test_events_of_another_model_on_the_topic_are_not_for_it(recorder: Recorder) -> None:
    receiver(Order, durable=True, dispatch_uid="orders", actions=["created"])(recorder)
    with running_listener():
        publish(Topic("testapp.order", "durable"), "no order")
        with transaction.atomic():
            order = Order.objects.create()
        del order
        publish(Topic("testapp.order", "durable"), {"n": 1})
        done = Recorder()
        del done
    assert recorder.events == []
