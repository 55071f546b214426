"""Durable consumers: what is in the log is handled, in order, however it was written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from pytest_django import DjangoAssertNumQueries

from django_pgnotify import Event, Topic, publish, publish_many, receiver, subscribe
from django_pgnotify.conf import conf
from django_pgnotify.durable import entries
from django_pgnotify.durable.cursor import LogReader
from django_pgnotify.durable.state import register as register_consumer
from django_pgnotify.listening.background import stop_all
from django_pgnotify.listening.listener import Listener
from django_pgnotify.models import Consumer, LoggedEvent
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.durable import (
    LEDGER,
    consume,
    letters,
    other_session,
    register,
    stored,
    until,
    wake,
    write,
)
from tests.integration.recording import (
    DEADLINE,
    Gate,
    Recorder,
    client,
    notify,
    query,
    rolled_back,
)
from tests.testapp.models import Order, Sku

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry(settings: Any) -> Iterator[Registry]:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 0.05
    with registry.isolated() as isolated:
        yield isolated
    stop_all()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# -- what was written is handled ------------------------------------------------------------------


def test_a_consumer_hears_what_is_published_while_it_runs(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        event_id = publish(LEDGER, {"n": 1}, key="a")
        [event] = recorder.wait_for(1)
    assert (event.id, event.topic, event.action) == (event_id, "ledger", "published")
    assert (event.data, event.key, event.using) == ({"n": 1}, "a", "default")
    assert event.source == conf.source


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
        publish(LEDGER, 4)
        recorder.wait_for(4)
    assert recorder.data == [1, 2, 3, 4]


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


def test_what_is_published_once_the_listener_says_that_it_is_ready_is_not_missed() -> None:
    # Each time anew: the consumer must exist before the listener is said to be ready.
    for number in range(5):
        heard = Recorder()
        consume(heard, f"consumer {number}")
        with running_listener():
            publish(LEDGER, number)
            heard.wait_for(1)
        assert heard.data == [number]


def test_an_event_that_commits_late_is_not_lost_behind_one_that_was_quicker(
    recorder: Recorder,
) -> None:
    consume(recorder)
    with running_listener(), other_session() as slow:
        write(slow, '"slow"')
        publish(LEDGER, "quick")
        recorder.wait_for(1)
        slow.commit()
        wake()
        recorder.wait_for(2)
    assert recorder.data == ["quick", "slow"]


def test_a_long_transaction_elsewhere_does_not_hold_events_up(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener(), other_session() as long:
        long.execute("SELECT pg_current_xact_id()")
        for n in range(5):
            publish(LEDGER, n)
            recorder.wait_for(n + 1)
    assert recorder.data == [0, 1, 2, 3, 4]


def test_writers_that_wait_for_each_other_are_heard_in_the_order_of_their_commits(
    recorder: Recorder,
) -> None:
    """The one that commits last has the lower transaction id."""
    consume(recorder)
    register()
    sku = Sku.objects.create(code="shared")
    with other_session() as early, other_session() as late:
        early.execute("SELECT pg_current_xact_id()")
        late.execute("UPDATE testapp_sku SET stock = 1 WHERE code = %s", [sku.code])
        write(late, "1", key="shared")
        late.commit()
        early.execute("UPDATE testapp_sku SET stock = 2 WHERE code = %s", [sku.code])
        write(early, "2", key="shared")
        early.commit()
    with running_listener():
        recorder.wait_for(2)
    assert recorder.data == [1, 2]


def test_more_than_a_page_that_was_missed_is_read_page_by_page_in_order(
    recorder: Recorder,
) -> None:
    consume(recorder)
    register()
    with other_session() as slow:
        # The lowest id of all, committed last: where the sweep begins must allow for it.
        write(slow, "-1")
        for start in range(0, 3500, 500):
            publish_many(LEDGER, range(start, start + 500))
            publish_many(Topic("other", "durable"), range(700))
        slow.commit()
    with running_listener():
        recorder.wait_for(3501)
        until(lambda: (stored().handled, stored().target) == (3501, ""))
    assert recorder.data == [-1, *range(3500)]


def test_a_lost_wake_up_is_healed_by_the_next_sweep(recorder: Recorder, settings: Any) -> None:
    settings.PGNOTIFY_SWEEP_INTERVAL = 0.05
    consume(recorder)
    with running_listener(), other_session() as silent:
        write(silent, '"no NOTIFY was sent"')
        silent.commit()
        recorder.wait_for(1)


def test_a_consumer_of_several_topics_gets_them_in_one_order(recorder: Recorder) -> None:
    other = Topic("invoices", delivery="durable")
    consume(recorder, source=[LEDGER, other])
    register()
    for n in range(20):
        publish((LEDGER, other)[n % 2], n)
    with running_listener():
        recorder.wait_for(20)
    assert recorder.data == list(range(20))


def test_large_events_are_read_whole(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        publish(LEDGER, "x" * 100_000)
        publish(LEDGER, "y" * 40_000)
        recorder.wait_for(2)
    assert [(data[0], len(data)) for data in recorder.data] == [("x", 100_000), ("y", 40_000)]


def test_of_a_page_of_large_events_no_more_is_read_than_is_at_hand(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "BYTES_AT_ONCE", 150_000)
    read, body, at_hand = Recorder(), LogReader.body, []

    def count(self: LogReader, event: Any) -> str | None:
        read(event)
        return body(self, event)

    def work(event: Event) -> None:
        recorder(event)
        at_hand.append(len(read.events) - len(recorder.events) + 1)

    monkeypatch.setattr(LogReader, "body", count)
    consume(work)
    register()
    publish_many(LEDGER, [f"{number}" * 100_000 for number in range(10)])
    with running_listener():
        recorder.wait_for(10)
    assert [data[0] for data in recorder.data] == list("0123456789")
    assert at_hand == [2, 1] * 5


# -- models -------------------------------------------------------------------------------------


@pytest.fixture
def durable_models(settings: Any) -> None:
    settings.PGNOTIFY_DELIVERY = "durable"


@pytest.mark.usefixtures("durable_models")
def test_a_row_and_its_event_are_committed_together_also_in_autocommit() -> None:
    """Whoever sees the row sees the event: there is no moment between two commits."""
    order = Order.objects.create()
    [(row, event)] = query(
        "SELECT o.xmin::text::bigint, e.xid::text::bigint"
        " FROM testapp_order AS o, pgnotify_event_log AS e WHERE o.id = %s",
        order.pk,
    )
    assert row == event
    order.delete()
    assert [row.body.count('"deleted"') for row in LoggedEvent.objects.order_by("id")] == [0, 1]


@pytest.mark.usefixtures("durable_models")
def test_a_save_whose_event_cannot_be_logged_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no log today")

    monkeypatch.setattr("django_pgnotify.publishing.publisher.append", refuse)
    with pytest.raises(RuntimeError, match="no log today"):
        Order.objects.create()
    assert Order.objects.count() == 0


@pytest.mark.usefixtures("durable_models")
def test_a_durable_receiver_of_a_model_gets_its_actions_and_no_other_events() -> None:
    created = Recorder()
    receiver(Order, actions=["created"], dispatch_uid="created")(created)
    register()
    publish("testapp.order", "not of the model")
    order = Order.objects.create()
    order.save()
    Order.objects.create()
    with running_listener():
        created.wait_for(2)
    assert [event.action for event in created.events] == ["created", "created"]
    assert created.events[0].instance() == order


def test_an_abandoned_transaction_leaves_no_event_behind(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        with transaction.atomic():
            publish(LEDGER, 1)
            with rolled_back():
                publish(LEDGER, "of a savepoint")
            publish(LEDGER, 2)
        recorder.wait_for(2)
    assert recorder.data == [1, 2]
    assert LoggedEvent.objects.count() == 2


# -- live receivers of a durable topic ----------------------------------------------------------


def test_receivers_that_are_not_consumers_hear_a_durable_topic_live() -> None:
    node, plain, durable = Recorder(), Recorder(), Recorder()
    receiver(LEDGER, every_node=True, dispatch_uid="node")(node)
    receiver("ledger", durable=False, dispatch_uid="plain")(plain)
    consume(durable)
    with running_listener() as listener, subscribe("ledger") as events:
        publish(LEDGER, "x" * 20_000)
        listener.wait_for(1)
        durable.wait_for(1)
        heard = events.get(timeout=10)
        assert heard is not None
        assert heard.data == "x" * 20_000
    assert len(node.events) == len(plain.events) == len(durable.events) == 1
    assert len({event.id for event in (*node.events, *plain.events, *durable.events)}) == 1


def test_a_consumer_hears_only_what_is_in_the_log(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        notify("ledger", "from psql")
        publish("ledger", "after the commit", delivery="after_commit")
        publish(LEDGER, "in the log")
        recorder.wait_for(1)
    assert recorder.data == ["in the log"]


# -- how they are called ------------------------------------------------------------------------


def test_async_consumers_run_on_the_loop_in_order() -> None:
    heard: list[Any] = []
    done = threading.Event()

    async def run(event: Event) -> None:
        await asyncio.sleep(0)
        heard.append((event.data, threading.current_thread().name))
        if event.data == 99:
            done.set()

    consume(run)
    with running_listener():
        publish_many(LEDGER, range(100))
        assert done.wait(15)
    assert [data for data, _ in heard] == list(range(100))
    assert {thread for _, thread in heard} == {"running-listener"}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_keys_run_beside_each_other_and_events_of_one_key_in_order(kind: str) -> None:
    heard = Recorder()
    with Gate() as gate:

        def run(event: Event) -> None:
            if event.data == 0:
                gate.pass_through()
            heard(event)

        async def arun(event: Event) -> None:
            if event.data == 0:
                await gate.apass_through()
            heard(event)

        consume(run if kind == "sync" else arun, concurrency=3)
        with running_listener():
            publish_many(LEDGER, [n // 3 for n in range(30)], key=None)
            gate.wait_for(3)
            gate.open()
            heard.wait_for(30)
            assert gate.most == 3
            publish_many(LEDGER, range(1, 61), key=lambda n: f"key {n % 3}")
            heard.wait_for(90)
    for key in range(3):
        mine = [event.data for event in heard.events if event.key == f"key {key}"]
        assert mine == sorted(mine)
        assert len(mine) == 20


def test_a_consumer_that_is_stopped_finishes_the_event_at_hand_and_forgets_nothing() -> None:
    heard = Recorder()
    with Gate() as gate:

        def slow(event: Event) -> None:
            if event.data == 2:
                gate.pass_through()
            heard(event)

        consume(slow)
        stopper: threading.Thread
        with running_listener():
            publish_many(LEDGER, range(6))
            gate.wait_for(1)
            stopper = threading.Timer(0, gate.open)
            stopper.start()
        stopper.join()
        first = list(heard.data)
        with running_listener():
            heard.wait_for(6)
    assert heard.data == [0, 1, 2, 3, 4, 5]
    assert first == heard.data[: len(first)]


# -- writing ------------------------------------------------------------------------------------


def test_publish_many_writes_a_thousand_events_in_two_statements(
    django_assert_num_queries: DjangoAssertNumQueries, recorder: Recorder
) -> None:
    consume(recorder)
    with running_listener():
        with transaction.atomic(), django_assert_num_queries(1):
            ids = publish_many(LEDGER, range(1000), key=lambda n: f"k{n % 7}")
        recorder.wait_for(1000)
    assert recorder.data == list(range(1000))
    assert [event.id for event in recorder.events] == ids
    assert {event.key for event in recorder.events} == {f"k{n}" for n in range(7)}


def test_publish_many_of_durable_events_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_pgnotify.durable.log.ROWS_PER_STATEMENT", 2)
    with connection.cursor() as cursor:
        cursor.execute(
            "ALTER TABLE pgnotify_event_log ADD CONSTRAINT refuse CHECK (body NOT LIKE '%poison%')"
        )
    try:
        with pytest.raises(Exception, match="refuse"):
            publish_many(LEDGER, [1, 2, 3, "poison"])
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE pgnotify_event_log DROP CONSTRAINT refuse")
    assert LoggedEvent.objects.count() == 0


@pytest.mark.parametrize("delivery", ["after_commit", "atomic"])
def test_publish_many_serves_the_other_tiers_too(delivery: Any) -> None:
    heard = Recorder()
    receiver("jobs")(heard)
    with running_listener():
        publish_many("jobs", [1, 2, 3], delivery=delivery)
        with transaction.atomic():
            publish_many("jobs", [4, 5], delivery=delivery)
        with rolled_back():
            publish_many("jobs", [6], delivery=delivery)
        assert publish_many("jobs", [], delivery=delivery) == []
        publish("jobs", 7, delivery=delivery)
        heard.wait_for(6)
    assert heard.data == [1, 2, 3, 4, 5, 7]
    assert LoggedEvent.objects.count() == 0


# -- several processes --------------------------------------------------------------------------


def test_a_consumer_is_run_by_one_listener_and_taken_over_by_another(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener(), running_listener() as second:
        publish(LEDGER, 1)
        recorder.wait_for(1)
        second.settle()
    with running_listener():
        publish(LEDGER, 2)
        recorder.wait_for(2)
    assert recorder.data == [1, 2]


def test_no_consumer_is_held_before_the_way_is_proven(
    recorder: Recorder, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a pooler a lock would stay on a connection of the pooler's, and lock others out."""
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.5
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    consume(recorder)
    register()
    echo, held = Listener._echo, []

    async def late_echo(self: Listener, nonce: str) -> None:
        async with client() as other:
            rows = await other.execute(
                "SELECT count(*) FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)"
                " WHERE locktype = 'advisory' AND application_name = 'pglisten consumers'"
                " AND datname = current_database()"
            )
            held.append(await rows.fetchone())
        if len(held) > 3:
            await echo(self, nonce)

    monkeypatch.setattr(Listener, "_echo", late_echo)
    with running_listener(timeout=DEADLINE) as listener:
        publish(LEDGER, 1)
        recorder.wait_for(1)
        assert listener.service is not None
        assert listener.service.durable.held == ["ledger"]
    assert held[:4] == [(0,)] * 4


def test_the_loss_of_the_connection_that_holds_the_locks_is_survived(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
        ended = query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'pglisten consumers'"
        )
        assert ended == [(True,)]
        publish(LEDGER, 2)
        recorder.wait_for(2)
    assert recorder.data == [1, 2]


def lock_connections() -> list[Any]:
    return query(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'pglisten consumers'"
    )


def test_a_topic_that_newer_code_reads_is_not_passed_by_older_code_that_still_runs(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    invoices, newer = Topic("invoices", delivery="durable"), Recorder()
    consume(recorder)
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
        register_consumer("ledger", ["ledger", "invoices"], "now", "default")  # as migrate does
        publish(invoices, 2)
        publish(LEDGER, 3)
        until(lambda: stored().holder == "")
        registry.remove(recorder)
        consume(newer, source=[LEDGER, invoices])
        with running_listener():
            newer.wait_for(2)
            assert newer.data == [2, 3]
        # And back again.
        register_consumer("ledger", ["ledger"], "now", "default")
        publish(LEDGER, 4)
        recorder.wait_until(lambda events: events[-1].data == 4)
    assert caplog.text.count("Consumer ledger is left to others: code that started later") == 1


def test_the_topics_of_newer_code_outlast_what_older_code_does_over_a_new_connection(
    recorder: Recorder,
) -> None:
    consume(recorder)
    with running_listener():
        publish(LEDGER, 1)
        recorder.wait_for(1)
        register_consumer("ledger", ["ledger", "invoices"], "now", "default")
        [(pid,)] = lock_connections()
        assert query("SELECT pg_terminate_backend(%s, 5000)", pid) == [(True,)]
        until(lambda: len(lock_connections()) == 1)
        until(lambda: stored().holder == "")
    assert stored().topics == ["ledger", "invoices"]


def test_older_code_that_is_started_anew_has_its_topics_again(recorder: Recorder) -> None:
    register_consumer("ledger", ["ledger", "invoices"], "now", "default")
    publish(LEDGER, 1)
    consume(recorder)
    with running_listener():
        recorder.wait_for(1)
    assert stored().topics == ["ledger"]


def test_two_listeners_share_the_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a slow machine the second may not take in time what the first has let go for it.
    monkeypatch.setattr("django_pgnotify.durable.sharing.KEPT", 0.0)
    heard = Recorder()
    for number in range(4):
        consume(heard, f"consumer {number}")
    with running_listener() as first, running_listener() as second:
        assert first.service is not None
        assert second.service is not None
        one, other = first.service.durable, second.service.durable

        def shared() -> bool:
            publish(LEDGER, "time passes")
            return (len(one.held), len(other.held)) == (2, 2)

        until(shared)
    assert Consumer.objects.exclude(holder="").count() == 0


def test_nothing_is_put_aside_in_everyday_life(recorder: Recorder) -> None:
    consume(recorder)
    with running_listener():
        publish_many(LEDGER, range(10))
        recorder.wait_for(10)
    assert letters() == []
