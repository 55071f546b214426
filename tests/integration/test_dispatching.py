"""From a NOTIFY to the right receivers, in order; lanes that overflow, gaps, and the end."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction
from pytest_django import Settings

from django_pgnotify import Event, publish, receiver
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.recording import (
    Gate,
    Recorder,
    notify,
    query,
    rolled_back,
    stats,
    terminate,
)
from tests.testapp.models import Article, Invoice, Order, Tag

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# -- who is called with what ------------------------------------------------------------------


def test_changes_of_a_model_reach_its_receiver_in_order(recorder: Recorder) -> None:
    receiver(Order)(recorder)
    with running_listener() as listener:
        order = Order.objects.create(status="new")
        pk = order.pk
        order.status = "paid"
        order.save(update_fields=["status"])
        order.delete()
        listener.wait_for(3)
    assert [event.action for event in recorder.events] == ["created", "updated", "deleted"]
    assert {(event.model, event.pk) for event in recorder.events} == {("testapp.order", pk)}
    assert recorder.events[1].changed == ("status",)


def test_a_receiver_reads_the_row_of_its_event(recorder: Recorder) -> None:
    rows: list[Any] = []

    @receiver(Order)
    def read(event: Event) -> None:
        rows.append(event.instance())

    with running_listener() as listener:
        order = Order.objects.create(status="new")
        listener.wait_for(1)
        order.delete()
        listener.wait_for(2)
    assert rows == [order, None] or (rows[0].status, rows[1]) == ("new", None)


def test_a_thousand_saves_of_one_transaction_arrive_once_each_in_order(recorder: Recorder) -> None:
    receiver(Order)(recorder)
    with running_listener() as listener:
        with transaction.atomic():
            pks = [Order.objects.create().pk for _ in range(1000)]
        listener.wait_for(1000)
    assert [event.pk for event in recorder.events] == pks


def test_a_rolled_back_transaction_sends_nothing(recorder: Recorder) -> None:
    receiver([Order, "after"])(recorder)
    with running_listener() as listener:
        with rolled_back():
            Order.objects.create()
        publish("after")
        listener.wait_for(1)
    assert [event.topic for event in recorder.events] == ["after"]


def test_a_receiver_of_a_model_on_a_shared_topic_hears_only_its_model(recorder: Recorder) -> None:
    everything = Recorder()
    receiver(Invoice)(recorder)
    receiver("billing", dispatch_uid="everything")(everything)
    with running_listener() as listener:
        publish("billing", "not a model's")
        Invoice.objects.create(number="1")
        listener.wait_for(2)
    assert [event.model for event in recorder.events] == ["testapp.invoice"]
    assert [event.model for event in everything.events] == [None, "testapp.invoice"]


def test_actions_filter_what_a_receiver_hears(recorder: Recorder) -> None:
    receiver(Order, actions=["deleted"])(recorder)
    with running_listener() as listener:
        Order.objects.create().delete()
        listener.wait_for(2)
    assert [event.action for event in recorder.events] == ["deleted"]


def test_a_receiver_of_two_sources_on_one_topic_hears_an_event_once(recorder: Recorder) -> None:
    receiver([Invoice, "billing"])(recorder)
    with running_listener() as listener:
        Invoice.objects.create(number="1")
        listener.wait_for(1)
    assert len(recorder.events) == 1


def test_m2m_changes_arrive(recorder: Recorder) -> None:
    receiver(Article, actions=["m2m_changed"])(recorder)
    with running_listener(["testapp.article"]) as listener:
        article = Article.objects.create(title="t")
        tag = Tag.objects.create(name="x")
        article.tags.add(tag)
        listener.wait_for(2)
    [event] = recorder.events
    assert event.pk == article.pk
    assert event.data == {"field": "tags", "operation": "add", "pks": [tag.pk]}


def test_topics_that_are_not_asked_for_are_not_heard(recorder: Recorder) -> None:
    receiver(["a", "b"])(recorder)
    with running_listener(["b"]) as listener:
        publish("a", 1)
        publish("b", 2)
        listener.wait_for(1)
    assert recorder.data == [2]


@pytest.mark.parametrize(
    ("payload", "data"),
    [
        ("do job 1001", "do job 1001"),
        ('{"task": 7}', {"task": 7}),
        ("[1, 2]", [1, 2]),
        ("42", 42),
        ('"text"', "text"),
        ("null", None),
        ("true", True),
        ("", ""),
        ("{not json}", "{not json}"),
        ("NaN", "NaN"),
        ("naïve “quotes” O'Brien; --", "naïve “quotes” O'Brien; --"),
        ('{"events": [], "version": 1}', {"events": [], "version": 1}),
    ],
)
def test_a_foreign_payload_arrives_as_one_published_event(
    recorder: Recorder, payload: str, data: Any
) -> None:
    receiver("jobs")(recorder)
    with running_listener() as listener:
        [(pid,)] = query("SELECT pg_backend_pid()")
        notify("jobs", payload)
        listener.wait_for(1)
        assert stats(listener)["foreign"] == 1
        assert stats(listener)["broken"] == 0
    [event] = recorder.events
    assert (event.action, event.topic, event.model, event.pk) == ("published", "jobs", None, None)
    assert event.data == data
    assert event.source == f"backend:{pid}"
    assert event.published_at.tzinfo is not None


# -- overflow -------------------------------------------------------------------------------------


def test_what_a_slow_receiver_has_no_room_for_is_dropped_counted_and_told_as_one_gap(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PGNOTIFY_QUEUE_MAX_EVENTS = 10
    quick = Recorder()
    slow = Recorder()
    receiver("jobs", dispatch_uid="quick")(quick)
    with Gate() as gate:

        @receiver("jobs", dispatch_uid="slow", on_gap=True)
        def run(event: Event) -> None:
            gate.pass_through()
            slow(event)

        with running_listener() as listener:
            publish("jobs", 0)
            gate.wait_for(1)
            for number in range(1, 31):
                publish("jobs", number)
                quick.wait_for(number + 1)
            assert stats(listener)["dropped"] == 20
            gate.open()
            slow.wait_for(12)
            publish("jobs", "after")
            listener.wait_for(32)
    assert quick.data == [*range(31), "after"]  # the other lane lost nothing
    actions = [event.action for event in slow.events]
    assert actions.count("gap") == 1
    gap = slow.events[actions.index("gap")]
    assert [event.data for event in slow.events if event.action != "gap"] == [*range(11), "after"]
    assert slow.events[-1].data == "after"
    assert gap.topic == "jobs"
    assert "keep up" in gap.data["cause"]
    assert gap.data["since"] <= gap.data["until"]
    complaints = [record for record in caplog.records if "does not keep up" in record.getMessage()]
    assert len(complaints) == 1


def test_a_burst_larger_than_the_queue_in_one_batch_is_cut_at_its_end(settings: Settings) -> None:
    settings.PGNOTIFY_QUEUE_MAX_EVENTS = 5
    slow = Recorder()
    receiver("jobs", on_gap=True)(slow)
    with running_listener() as listener:
        with transaction.atomic():
            for number in range(50):
                publish("jobs", number)
        listener.wait_for(50)
        slow.wait_until(lambda events: events[-1].action == "gap")
        assert stats(listener)["dropped"] == 45
    assert slow.data[:5] == [0, 1, 2, 3, 4]


# -- gaps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_node", [True, False], ids=["every node", "leader"])
def test_a_gap_reaches_on_gap_receivers_once_per_topic_before_later_events(
    every_node: bool,
) -> None:
    asked, not_asked, by_action = Recorder(), Recorder(), Recorder()
    receiver(["a", "b"], on_gap=True, every_node=every_node, dispatch_uid="asked")(asked)
    receiver("a", every_node=every_node, dispatch_uid="not")(not_asked)
    receiver("a", actions=["gap"], every_node=every_node, dispatch_uid="by action")(by_action)
    with running_listener() as listener:
        publish("a", "before")
        listener.wait_for(1)
        terminate(listener.backend_pid)
        listener.wait_until_ready(2)
        publish("a", "after")
        listener.wait_for(2)
        asked.wait_for(4)
        assert stats(listener)["gaps"] >= 1
    assert [event.action for event in asked.events] == ["published", "gap", "gap", "published"]
    assert [event.topic for event in asked.events] == ["a", "a", "b", "a"]
    assert [event.action for event in not_asked.events] == ["published", "published"]
    assert [event.action for event in by_action.events] == ["gap"]
    gap = asked.events[1]
    assert gap.data["since"] < gap.data["until"]
    assert gap.data["cause"]
    assert (gap.model, gap.pk, gap.key) == (None, None, None)


# -- the end --


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_stopping_lets_what_runs_and_what_waits_finish(kind: str) -> None:
    done = Recorder()
    with Gate() as gate:

        def run(event: Event) -> None:
            gate.pass_through()
            done(event)

        async def arun(event: Event) -> None:
            await gate.apass_through()
            done(event)

        receiver("jobs")(run if kind == "sync" else arun)
        with running_listener() as listener:
            with transaction.atomic():
                for number in range(3):
                    publish("jobs", number)
            gate.wait_for(1)
            assert listener.service is not None
            assert listener._loop is not None
            listener._loop.call_soon_threadsafe(listener.service.stop)
            gate.open()
    assert done.data == [0, 1, 2]


def test_what_does_not_finish_in_time_is_given_up_and_the_rest_dropped_and_counted(
    settings: Settings,
) -> None:
    settings.PGNOTIFY_SHUTDOWN_TIMEOUT = 0.1
    done = Recorder()
    with Gate() as gate:

        @receiver("jobs")
        def run(event: Event) -> None:
            gate.pass_through()
            done(event)

        with running_listener() as listener:
            with transaction.atomic():
                for number in range(3):
                    publish("jobs", number)
            gate.wait_for(1)
            assert listener._loop is not None
            service = listener.service
            assert service is not None
            listener._loop.call_soon_threadsafe(service.stop)
            listener._thread.join(3)
            gate.open()
        assert service.stats["dropped"] == 2
        assert service.dispatcher.waiting == 0
        done.wait_for(1)
    assert done.data == [0]


def test_receivers_see_nothing_of_the_listeners_context() -> None:

    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="clean")
    seen: list[str] = []

    @receiver("jobs")
    def run(event: Event) -> None:
        seen.append(mark.get())
        mark.set("dirty")

    with running_listener() as listener:
        publish("jobs", 1)
        listener.wait_for(1)
        publish("jobs", 2)
        listener.wait_for(2)
    assert seen == ["clean", "clean"]
