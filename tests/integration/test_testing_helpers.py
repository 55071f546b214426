"""What the package offers to the tests of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.test import TestCase, TransactionTestCase

from django_pgnotify import Event, apublish, no_notify, publish, receiver, signals
from django_pgnotify.exceptions import ListenError
from django_pgnotify.registry import registry
from django_pgnotify.testing import InMemoryBus, capture_events, running_listener
from tests.integration.recording import Recorder, alias_at, query, rolled_back, terminate
from tests.testapp.models import Article, Invoice, Order, Shipment, Tag


class Undo(Exception):
    """Raised by a test to roll something back."""


# -- capture_events ---------------------------------------------------------------------------


class CaptureInTestCase(TestCase):
    """Nothing is ever committed here."""

    def test_events_of_the_tests_own_transaction_are_seen(self) -> None:
        with capture_events() as events:
            assert len(events) == 0
            order = Order.objects.create(status="new")
            publish("jobs", {"n": 1}, key="k")
            assert [event.action for event in events] == ["created", "published"]
        assert len(events) == 2
        assert (events[0].model, events[0].pk, events[0].topic) == (
            "testapp.order", order.pk, "testapp.order",
        )  # fmt: skip
        assert (events[1].data, events[1].key) == ({"n": 1}, "k")
        assert events[0].instance() == order
        assert [event.topic for event in events[-1:]] == ["jobs"]

    def test_events_before_and_after_the_block_are_not_seen(self) -> None:
        publish("jobs", "before")
        with capture_events() as events:
            publish("jobs", "inside")
        publish("jobs", "after")
        assert [event.data for event in events] == ["inside"]

    def test_savepoints_that_roll_back_take_their_events_with_them(self) -> None:
        with capture_events() as events:
            publish("jobs", 1)
            with rolled_back():
                publish("jobs", 2)
                with transaction.atomic():
                    publish("jobs", 3)
                assert [event.data for event in events] == [1, 2, 3]
            with transaction.atomic():
                publish("jobs", 4)
                with rolled_back():
                    publish("jobs", 5)
                publish("jobs", 6)
        assert [event.data for event in events] == [1, 4, 6]

    def test_a_savepoint_that_rolls_back_after_the_block_does_not_matter_any_more(self) -> None:
        with rolled_back(), capture_events() as events:
            publish("jobs", 1)
        assert [event.data for event in events] == [1]

    def test_atomic_events_of_a_savepoint_that_rolls_back_are_not_there(self) -> None:
        with capture_events() as events:
            publish("jobs", 1, delivery="atomic")
            with rolled_back():
                publish("jobs", 2, delivery="atomic")
            publish("jobs", 3)
        assert [event.data for event in events] == [1, 3]

    def test_events_are_seen_once_with_capture_on_commit_callbacks(self) -> None:
        with capture_events() as events:
            with self.captureOnCommitCallbacks(execute=True):
                publish("jobs", 1)
                publish("jobs", 2)
            publish("jobs", 3)
        assert [event.data for event in events] == [1, 2, 3]

    def test_everything_that_publishes_is_seen_in_the_order_it_was_published(self) -> None:
        with capture_events() as events:
            article = Article.objects.create(title="t")
            article.tags.add(Tag.objects.create(name="x"))
            order = Order.objects.create()
            shipment = Shipment.objects.create(order=order, status="packed")
            shipment.status = "sent"
            shipment.save()
            Invoice.objects.create(number="1")
            with no_notify():
                publish("jobs", "published all the same")
                Order.objects.create()
            article.delete()
        assert [(event.topic, event.action) for event in events] == [
            ("testapp.article", "created"),
            ("testapp.article", "m2m_changed"),
            ("testapp.order", "created"),
            ("testapp.shipment", "created"),
            ("testapp.shipment", "updated"),
            ("billing", "created"),
            ("jobs", "published"),
            ("testapp.article", "deleted"),
        ]
        assert events[4].changed == ("status",)
        assert events[4].data["status"] == "sent"

    def test_an_event_of_any_size_is_captured_whole(self) -> None:
        with capture_events() as events:
            publish("jobs", "x" * 100_000)
        assert events[0].data == "x" * 100_000

    def test_blocks_may_be_nested(self) -> None:
        with capture_events() as outer:
            publish("jobs", 1)
            with capture_events() as inner:
                publish("jobs", 2)
        assert [event.data for event in outer] == [1, 2]
        assert [event.data for event in inner] == [2]

    def test_an_error_in_the_block_goes_through(self) -> None:
        events: Sequence[Event] = ()

        def work() -> None:
            nonlocal events
            with capture_events() as events:
                publish("jobs", 1)
                raise Undo

        with pytest.raises(Undo):
            work()
        assert [event.data for event in events] == [1]


class CaptureInTransactionTestCase(TransactionTestCase):
    """Everything is committed here."""

    def test_committed_events_are_seen_and_rolled_back_ones_are_not(self) -> None:
        with capture_events() as events:
            publish("jobs", 1)
            with rolled_back():
                publish("jobs", 2)
            with transaction.atomic():
                publish("jobs", 3)
                with rolled_back():
                    publish("jobs", 4)
            Order.objects.create()
        assert [event.data for event in events] == [1, 3, {}]

    def test_atomic_events_of_a_transaction_that_rolls_back_are_not_there(self) -> None:
        with capture_events() as events:
            with rolled_back():
                publish("jobs", 1, delivery="atomic")
            publish("jobs", 2, delivery="atomic")
        assert [event.data for event in events] == [2]

    def test_what_another_thread_commits_is_seen(self) -> None:
        def work() -> None:
            with transaction.atomic():
                publish("jobs", 1)
            connections.close_all()

        with capture_events() as events:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert [event.data for event in events] == [1]

    def test_what_is_captured_is_sent_as_well(self) -> None:
        heard = Recorder()
        with registry.isolated():
            receiver("jobs")(heard)
            with running_listener() as listener, capture_events() as events:
                publish("jobs", 1)
                listener.wait_for(1)
        assert heard.data == [1]
        assert heard.events[0].id == events[0].id


# -- InMemoryBus ------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Any:
    with registry.isolated():
        recorder = Recorder()
        receiver(["jobs", Order], on_gap=True, dispatch_uid="recorder")(recorder)
        yield recorder


@pytest.mark.django_db(transaction=True)
def test_the_bus_calls_receivers_before_publish_returns(heard: Recorder) -> None:
    with InMemoryBus() as bus:
        publish("jobs", {"n": 1})
        assert heard.data == [{"n": 1}]
        order = Order.objects.create()
        publish("nobody listens", 2)
    assert heard.events[1].pk == order.pk
    assert [event.topic for event in bus.events] == ["jobs", "testapp.order", "nobody listens"]
    publish("jobs", "after the block")
    assert len(heard.events) == 2


@pytest.mark.django_db(transaction=True)
def test_the_bus_keeps_the_meaning_of_transactions(heard: Recorder) -> None:
    with InMemoryBus():
        with transaction.atomic():
            publish("jobs", 1)
            with rolled_back():
                publish("jobs", 2)
            assert heard.data == []
        assert heard.data == [1]
        with rolled_back():
            publish("jobs", 3)
    assert heard.data == [1]


@pytest.mark.django_db
def test_in_a_testcase_deliver_stands_where_the_commit_would_be(heard: Recorder) -> None:
    with InMemoryBus() as bus:
        publish("jobs", 1)
        publish("jobs", 2)
        assert heard.data == []
        assert bus.deliver() == 2
        assert heard.data == [1, 2]
        assert bus.deliver() == 0
        publish("jobs", 3)
        assert bus.deliver() == 1
    assert heard.data == [1, 2, 3]


@pytest.mark.django_db
def test_in_a_testcase_on_commit_callbacks_deliver_each_event_once(
    heard: Recorder, django_capture_on_commit_callbacks: Any
) -> None:
    with InMemoryBus() as bus:
        with django_capture_on_commit_callbacks(execute=True):
            publish("jobs", 1)
        assert heard.data == [1]
        assert bus.deliver() == 0
    assert heard.data == [1]


@pytest.mark.django_db
def test_what_was_published_before_the_bus_is_not_its_business(heard: Recorder) -> None:
    publish("jobs", "before")
    with InMemoryBus() as bus:
        publish("jobs", "inside")
        bus.deliver()
    assert heard.data == ["inside"]


@pytest.mark.django_db(transaction=True)
def test_the_bus_runs_async_receivers_to_their_end() -> None:
    seen: list[Any] = []
    with registry.isolated():

        @receiver(Order)
        async def run(event: Event) -> None:
            await asyncio.sleep(0)
            seen.append(await event.ainstance())

        with InMemoryBus():
            order = Order.objects.create()
    assert seen == [order]


@pytest.mark.django_db(transaction=True)
async def test_the_bus_works_inside_a_running_loop() -> None:
    seen: list[Any] = []
    with registry.isolated():

        @receiver("jobs", dispatch_uid="async")
        async def run(event: Event) -> None:
            await asyncio.sleep(0)
            seen.append(("async", event.data, await Order.objects.acount()))

        @receiver("jobs", dispatch_uid="sync")
        def run_sync(event: Event) -> None:
            seen.append(("sync", event.data, Order.objects.count()))

        with InMemoryBus() as bus:
            await apublish("jobs", 1)
            bus.notify("jobs", "from psql")
    assert seen == [
        ("async", 1, 0), ("sync", 1, 0), ("async", "from psql", 0), ("sync", "from psql", 0),
    ]  # fmt: skip


@pytest.mark.django_db
def test_notify_is_what_another_program_would_send(heard: Recorder) -> None:
    with InMemoryBus() as bus:
        bus.notify("jobs", "do job 1001")
        bus.notify("jobs", {"task": 7})
        bus.notify("jobs")
        bus.notify("jobs", '{"task": 8}')
    assert heard.data == ["do job 1001", {"task": 7}, "", {"task": 8}]
    assert {(event.action, event.source) for event in heard.events} == {("published", "backend:0")}


@pytest.mark.django_db
def test_notify_takes_a_frame_of_ours_too(heard: Recorder) -> None:
    with InMemoryBus() as bus:
        bus.notify(
            "jobs", '{"pgnotify":1,"source":"go:1","events":[{"data":1,"key":"k"},{"data":2}]}'
        )
    assert heard.data == [1, 2]
    assert heard.events[0].key == "k"


@pytest.mark.django_db
def test_gap_is_told_to_those_who_asked(heard: Recorder) -> None:
    deaf = Recorder()
    receiver("jobs", dispatch_uid="deaf")(deaf)
    with InMemoryBus() as bus:
        bus.gap("the cable was cut", topics=["jobs"])
    [event] = heard.events
    assert (event.action, event.topic) == ("gap", "jobs")
    assert event.data["cause"] == "the cable was cut"
    assert deaf.events == []


@pytest.mark.django_db(transaction=True)
def test_an_error_of_a_receiver_fails_the_test_or_is_reported_as_a_listener_would() -> None:
    told: list[Any] = []

    def keep(**kwargs: Any) -> None:
        told.append(kwargs["exception"])

    with registry.isolated():

        @receiver("jobs")
        def broken(event: Event) -> None:
            raise Undo

        with pytest.raises(Undo), InMemoryBus():
            publish("jobs")
        signals.receiver_failed.connect(keep)
        try:
            with InMemoryBus(raise_errors=False):
                publish("jobs")
        finally:
            signals.receiver_failed.disconnect(keep)
    assert [type(exc) for exc in told] == [Undo]


@pytest.mark.django_db(transaction=True)
def test_an_error_of_a_receiver_fails_the_test_after_a_commit_too() -> None:
    with registry.isolated():

        @receiver("jobs")
        def broken(event: Event) -> None:
            raise Undo

        with pytest.raises(Undo), InMemoryBus(), transaction.atomic():
            publish("jobs")


@pytest.mark.django_db(transaction=True)
def test_actions_and_models_are_told_apart_as_a_listener_does() -> None:
    deleted, invoices = Recorder(), Recorder()
    with registry.isolated():
        receiver(Order, actions=["deleted"])(deleted)
        receiver(Invoice)(invoices)
        with InMemoryBus():
            Order.objects.create().delete()
            publish("billing", "no invoice")
            Invoice.objects.create(number="1")
    assert [event.action for event in deleted.events] == ["deleted"]
    assert [event.model for event in invoices.events] == ["testapp.invoice"]


@pytest.mark.django_db(transaction=True)
def test_a_receiver_may_publish_in_its_turn(heard: Recorder) -> None:
    @receiver("first")
    def passes_on(event: Event) -> None:
        publish("jobs", event.data)

    with InMemoryBus() as bus:
        publish("first", 1)
    assert heard.data == [1]
    assert [event.topic for event in bus.events] == ["first", "jobs"]


# -- running_listener -------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_wait_for_says_how_many_arrived_in_time(heard: Recorder) -> None:
    with running_listener() as listener:
        publish("jobs", 1)
        listener.wait_for(1)
        with pytest.raises(TimeoutError, match=r"1 of 2 event\(s\)"):
            listener.wait_for(2, timeout=0.05)


@pytest.mark.django_db(transaction=True)
def test_wait_for_returns_when_the_receivers_have_run(heard: Recorder) -> None:
    with running_listener() as listener:
        for number in range(1, 51):
            publish("jobs", number)
            assert len(listener.wait_for(number)) == number
            assert len(heard.events) == number


@pytest.mark.django_db(transaction=True)
def test_wait_for_returns_when_slow_async_receivers_have_run_too() -> None:
    done: list[Any] = []
    with registry.isolated():

        @receiver("jobs")
        async def run(event: Event) -> None:
            for _ in range(100):
                await asyncio.sleep(0)
            done.append(event.data)

        with running_listener() as listener:
            for number in range(1, 11):
                publish("jobs", number)
                listener.wait_for(number)
                assert len(done) == number


@pytest.mark.django_db(transaction=True)
def test_a_listener_that_cannot_be_established_says_why() -> None:
    with (
        alias_at("nobody", HOST="127.0.0.1", PORT="1") as alias,
        pytest.raises(ListenError, match="refused"),
        running_listener(using=alias, timeout=1),
    ):
        pass


@pytest.mark.django_db(transaction=True)
def test_wait_until_ready_counts_every_time_it_is_established() -> None:
    with running_listener(["jobs"]) as listener:
        pid = listener.backend_pid
        terminate(pid)
        listener.wait_until_ready(2)
        assert listener.backend_pid not in (None, pid)


@pytest.mark.django_db(transaction=True)
def test_an_error_in_the_block_goes_through_and_the_listener_ends() -> None:
    with pytest.raises(Undo), running_listener(["jobs"]) as listener:
        raise Undo
    assert not listener._thread.is_alive()


# -- the pytest fixtures ------------------------------------------------------------------------


@pytest.mark.django_db
def test_pgnotify_events(pgnotify_events: Any) -> None:
    publish("jobs", 1)
    assert [event.data for event in pgnotify_events] == [1]


@pytest.mark.django_db(transaction=True)
def test_pgnotify_bus(pgnotify_registry: Any, pgnotify_bus: Any) -> None:
    recorder = Recorder()
    receiver("jobs")(recorder)
    publish("jobs", 1)
    assert recorder.data == [1]
    assert [event.data for event in pgnotify_bus.events] == [1]


def test_pgnotify_registry_is_empty(pgnotify_registry: Any) -> None:
    assert pgnotify_registry.receivers == []
    assert "testapp.order" in pgnotify_registry.publications


def test_pgnotify_listener(pgnotify_registry: Any, pgnotify_listener: Any) -> None:
    recorder = Recorder()
    receiver("jobs")(recorder)
    listener = pgnotify_listener(["jobs"])
    publish("jobs", 1)
    listener.wait_for(1)
    assert recorder.data == [1]
    assert query("SELECT 1") == [(1,)]


@pytest.mark.django_db(transaction=True)
async def test_events_of_async_code_are_captured(pgnotify_events: Any) -> None:
    await apublish("jobs", 1)
    await sync_to_async(publish)("jobs", 2)
    await Order.objects.acreate()
    assert [event.data for event in pgnotify_events] == [1, 2, {}]
