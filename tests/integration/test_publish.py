"""``publish()`` on a real server: what leaves, when, on which channel; and what is refused."""

# ruff: noqa: PT012  a block that is rolled back is more than one statement

from __future__ import annotations

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, connection, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_django import Settings

from django_pgnotify import Topic, apublish, no_notify, publish
from django_pgnotify.conf import conf
from django_pgnotify.exceptions import (
    EventDataError,
    InvalidArgument,
    InvalidDelivery,
    InvalidSetting,
    InvalidTopic,
    PgNotifyError,
    UnsupportedDatabase,
)
from django_pgnotify.publishing.sender import NotifyTransport
from django_pgnotify.stats import publishing_stats
from django_pgnotify.wire import FramePacker, Outgoing, wire_channel
from tests.integration.hearing import (
    Ear,
    before_anything_else,
    by_hook,
    hearing,
    statements,
    terminate_own_backend,
)
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others") as one:
        yield one


# -- what leaves -----------------------------------------------------------------------------


def test_a_published_event_arrives_with_everything_it_says(ear: Ear) -> None:
    before = datetime.now(UTC)
    event_id = publish("jobs", {"task_id": 1}, key="a")
    event = ear.event()
    assert (event.id, event.topic, event.action) == (event_id, "jobs", "published")
    assert (event.model, event.pk, event.changed) == (None, None, None)
    assert (event.data, event.key) == ({"task_id": 1}, "a")
    assert event.source == conf.source
    assert event.source.endswith(f":{os.getpid()}")
    assert before - timedelta(milliseconds=1) <= event.published_at <= datetime.now(UTC)


@pytest.mark.parametrize(
    "data", [None, 0, False, "", [], {}, "text", [1, [2]], {"ü": "\x00'\"\\ \U0001f600\ud800"}]
)
def test_any_json_value_is_data(ear: Ear, data: Any) -> None:
    publish("jobs", data)
    event = ear.event()
    assert event.data == data
    assert type(event.data) is type(data)


def test_what_django_writes_as_json_is_data(ear: Ear) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)
    publish("jobs", {"at": moment, "price": Decimal("1.50"), "id": uuid.UUID(int=7)})
    assert ear.event().data == {
        "at": "2026-01-02T03:04:05.123456+00:00",
        "price": "1.50",
        "id": str(uuid.UUID(int=7)),
    }


@pytest.mark.parametrize(
    "topic",
    [
        "jobs",
        "shop.order",
        "Ünïcode ☃ \U0001f600",
        'quo"ted',
        "apo'strophe; DROP TABLE x; --",
        "per%cent %s",
        "UPPER and  spaces\t",
        "x" * 63,
        "x" * 64,
        "é" * 200,
        "line\nbreak",
        "back\\slash",
    ],
)
def test_a_topic_is_heard_whatever_its_name(topic: str) -> None:
    with hearing(topic) as ear:
        publish(topic, 1)
        publish(topic + "!", 2)
        assert ear.data() == [1]


def test_the_channel_prefix_keeps_two_deployments_apart(settings: Settings) -> None:
    with hearing("jobs") as bare:
        settings.PGNOTIFY_CHANNEL_PREFIX = "blue."
        with hearing("jobs") as blue:
            publish("jobs", 1)
            assert blue.data() == [1]
            assert bare.events() == []
            blue.execute("SELECT pg_notify('blue.jobs', 'by hand')")
            assert blue.data() == ["by hand"]


def test_a_notify_by_hand_is_an_event_too(ear: Ear) -> None:
    ear.execute("SELECT pg_notify('jobs', 'do job 1001')")
    event = ear.event()
    assert (event.action, event.data) == ("published", "do job 1001")
    assert event.source.startswith("backend:")


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"])
@pytest.mark.parametrize("over", [0, 1, 2])
def test_the_server_accepts_a_frame_of_the_last_byte_and_one_byte_more_is_stored(
    ear: Ear, letter: str, over: int
) -> None:
    room = FramePacker(conf.source).room
    filler = room - len('{"data":""}') + over
    width = len(letter.encode())
    text = letter * (filler // width) + "x" * (filler % width)
    event = Outgoing("jobs", None, f'{{"data":"{text}"}}', room + over)
    NotifyTransport().send([event], "default")
    [heard] = ear.frames()
    if over:
        assert '"ref":' in heard.payload
    else:
        assert len(heard.payload.encode()) == 7999
    assert [event.data for event in ear.decode(heard)] == [text]


def test_the_server_itself_refuses_what_we_take_for_the_limits(ear: Ear) -> None:
    assert ear.execute("SELECT pg_notify(%s, %s)", wire_channel("x" * 64), "y" * 7999) == ""
    with pytest.raises(Exception, match="payload string too long"):
        ear.execute("SELECT pg_notify('jobs', %s)", "y" * 8000)
    with pytest.raises(Exception, match="channel name too long"):
        ear.execute("SELECT pg_notify(%s, '')", "x" * 64)


def test_equal_events_are_events_of_their_own(ear: Ear) -> None:
    """PostgreSQL folds equal payloads of one transaction into one."""
    with transaction.atomic():
        for _ in range(10):
            publish("jobs", 1)
            publish("jobs", 1, delivery="atomic")
    events = ear.events()
    assert len(events) == 20
    assert len({event.id for event in events}) == 20


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["jobs", "others"]), st.integers(0, 12_000), st.sampled_from("xé☃")
        ),
        max_size=30,
    )
)
def test_whatever_is_published_arrives_once_each_and_in_order(
    ear: Ear, wanted: list[tuple[str, int, str]]
) -> None:
    with transaction.atomic():
        for number, (topic, size, letter) in enumerate(wanted):
            publish(topic, [number, letter * size])
    events = ear.events()
    for topic in ("jobs", "others"):
        assert [event.data for event in events if event.topic == topic] == [
            [number, letter * size]
            for number, (chosen, size, letter) in enumerate(wanted)
            if chosen == topic
        ]


# -- when ------------------------------------------------------------------------------------


def test_outside_a_transaction_it_leaves_at_once(ear: Ear) -> None:
    with statements() as ran:
        publish("jobs", 1)
    assert len(ran.notify) == len(ran.all) == 1
    assert ear.data() == [1]


def test_inside_a_transaction_it_leaves_after_the_commit(ear: Ear) -> None:
    with transaction.atomic():
        with statements() as ran:
            publish("jobs", 1)
        assert ran.all == []
        assert ear.events() == []
    assert ear.data() == [1]


def test_after_a_rollback_it_never_leaves(ear: Ear) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        publish("jobs", 1)
        publish("jobs", 2, delivery="atomic")
        raise RuntimeError
    with transaction.atomic():
        publish("jobs", 3)
        publish("jobs", 4, delivery="atomic")
        transaction.set_rollback(True)
    publish("jobs", 5)
    assert ear.data() == [5]


def test_the_commit_of_the_default_tier_does_not_take_the_lock_of_notify(ear: Ear) -> None:
    """NOTIFY runs after COMMIT, in a transaction of its own."""
    with statements() as ran, transaction.atomic():
        Order.objects.create()
        publish("jobs", 1)
    order = ["COMMIT" if "COMMIT" in one else "NOTIFY" for one in ran.all
             if "COMMIT" in one or "pg_notify(" in one]  # fmt: skip
    assert order[0] == "COMMIT"
    assert "NOTIFY" in order


def test_the_atomic_tier_notifies_inside_the_transaction(ear: Ear) -> None:
    with transaction.atomic():
        with statements() as ran:
            publish("jobs", 1, delivery="atomic")
        assert len(ran.notify) == 1
        assert ear.events() == []
    assert ear.data() == [1]


def test_the_atomic_tier_follows_its_savepoint(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1, delivery="atomic")
        with pytest.raises(RuntimeError), transaction.atomic():
            publish("jobs", 2, delivery="atomic")
            raise RuntimeError
        publish("jobs", 3, delivery="atomic")
    assert ear.data() == [1, 3]


def test_a_failure_of_the_atomic_tier_raises_because_nothing_is_committed_yet(ear: Ear) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        with pytest.raises(DatabaseError), transaction.atomic():
            with connection.cursor() as cursor, pytest.raises(DatabaseError):
                cursor.execute("SELECT 1/0")
            publish("jobs", 2, delivery="atomic")
    assert ear.data() == [1]


@pytest.mark.parametrize(
    ("setting", "topic", "argument", "inside"),
    [
        ("after_commit", None, None, 0),
        ("atomic", None, None, 1),
        ("atomic", "after_commit", None, 0),
        ("after_commit", "atomic", None, 1),
        ("after_commit", "atomic", "after_commit", 0),
        ("after_commit", "after_commit", "atomic", 1),
    ],
)
def test_a_call_beats_its_topic_and_a_topic_beats_the_setting(
    settings: Settings,
    ear: Ear,
    setting: str,
    topic: Any,
    argument: Any,
    inside: int,
) -> None:
    settings.PGNOTIFY_DELIVERY = setting
    with transaction.atomic():
        with statements() as ran:
            publish(Topic("jobs", delivery=topic), 1, delivery=argument)
        assert len(ran.notify) == inside
    assert ear.data() == [1]


@pytest.mark.parametrize("delivery", ["after_commit", "atomic"])
def test_without_autocommit_it_leaves_with_the_commit_by_hand(ear: Ear, delivery: Any) -> None:
    transaction.set_autocommit(False)
    try:
        publish("jobs", 1, delivery=delivery)
        assert ear.events() == []
        transaction.rollback()
        publish("jobs", 2, delivery=delivery)
        assert ear.events() == []
        transaction.commit()
        assert ear.data() == [2]
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    assert ear.events() == []


def test_no_notify_does_not_silence_what_is_published_by_name(ear: Ear) -> None:
    with no_notify():
        publish("jobs", 1)
    assert ear.data() == [1]


# -- async -----------------------------------------------------------------------------------


async def test_apublish_is_publish_from_async_code() -> None:
    ear = await sync_to_async(Ear)("default", ("jobs",))
    try:
        event_id = await apublish(Topic("jobs", delivery="atomic"), {"a": 1}, key="k")
        event = await sync_to_async(ear.event)()
    finally:
        ear.close()
    assert (event.id, event.data, event.key) == (event_id, {"a": 1}, "k")


async def test_apublish_from_many_tasks_loses_nothing() -> None:
    ear = await sync_to_async(Ear)("default", ("jobs",))
    try:
        await asyncio.gather(*(apublish("jobs", number) for number in range(50)))
        data = await sync_to_async(ear.data)()
    finally:
        ear.close()
    assert sorted(data) == list(range(50))


async def test_apublish_inside_a_transaction_of_its_thread_waits_for_the_commit() -> None:
    ear = await sync_to_async(Ear)("default", ("jobs",))

    def open_transaction() -> Any:
        atomic = transaction.atomic()
        atomic.__enter__()
        return atomic

    try:
        atomic = await sync_to_async(open_transaction)()
        await apublish("jobs", 1)
        before = await sync_to_async(ear.events)()
        await sync_to_async(atomic.__exit__)(None, None, None)
        after = await sync_to_async(ear.data)()
    finally:
        ear.close()
    assert (before, after) == ([], [1])


@pytest.mark.parametrize("bad", ["", None, "a\x00"])
async def test_apublish_refuses_what_publish_refuses(bad: Any) -> None:
    with pytest.raises(InvalidTopic):
        await apublish(bad)


def test_threads_publish_on_connections_of_their_own(ear: Ear) -> None:
    together = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            with transaction.atomic():
                publish("jobs", [number, 1])
                together.wait(30)  # six transactions are open at once
                publish("jobs", [number, 2])
                if number % 2:
                    transaction.set_rollback(True)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    data = ear.data()
    assert sorted(data) == [[number, turn] for number in (0, 2, 4) for turn in (1, 2)]


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"topic": ""}, InvalidTopic, "non-empty"),
        ({"topic": "a\x00b"}, InvalidTopic, "NUL"),
        ({"topic": None}, InvalidTopic, "None"),
        ({"topic": 7}, InvalidTopic, "7"),
        ({"topic": b"jobs"}, InvalidTopic, "bytes"),
        ({"topic": ["jobs"]}, InvalidTopic, "list"),
        ({"delivery": "immediate"}, InvalidDelivery, "after_commit, atomic"),
        ({"delivery": ""}, InvalidDelivery, "''"),
        ({"key": ""}, InvalidArgument, "key="),
        ({"key": 7}, InvalidArgument, "key="),
        ({"using": "nowhere"}, UnsupportedDatabase, "'nowhere'"),
        ({"using": "lite"}, UnsupportedDatabase, "sqlite"),
        ({"using": 7}, UnsupportedDatabase, "7"),
        ({"data": {"a": [1, {2}]}}, EventDataError, r"data\['a'\]\[1\]"),
        ({"data": {"a": float("nan")}}, EventDataError, r"data\['a'\]"),
        ({"data": b"x"}, EventDataError, "bytes"),
    ],
)
def test_bad_input_is_refused_and_nothing_else_is_lost(
    ear: Ear, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with transaction.atomic():
        publish("jobs", "before")
        call: dict[str, Any] = {"topic": "jobs", "data": 1} | arguments
        with pytest.raises(error, match=says):
            publish(**call)
        publish("jobs", "after")
        assert Order.objects.count() == 0  # the transaction is usable
    assert ear.data() == ["before", "after"]


def test_an_unknown_argument_is_refused(ear: Ear) -> None:
    with pytest.raises(TypeError, match="tier"):
        publish("jobs", tier="atomic")  # type: ignore[call-arg]
    assert ear.events() == []


def test_a_model_is_no_topic_to_publish_on_and_the_message_does_not_say_it_is() -> None:
    with pytest.raises(InvalidTopic) as caught:
        publish(Order, 1)  # type: ignore[arg-type]
    assert "a model class; got" not in str(caught.value)


@pytest.mark.parametrize("name", ["PGNOTIFY_DELIVERY", "PGNOTIFY_DATABASE"])
def test_a_bad_setting_is_refused_when_it_is_used(settings: Settings, ear: Ear, name: str) -> None:
    setattr(settings, name, 7)
    with pytest.raises(InvalidSetting, match=name):
        publish("jobs", 1)


# -- failures --------------------------------------------------------------------------------


def test_a_notify_that_fails_after_the_commit_is_logged_and_counted_and_not_raised(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    failed = publishing_stats["publish_failed"]
    try:
        with (
            caplog.at_level(logging.ERROR, "django_pgnotify.publishing"),
            by_hook(),
            transaction.atomic(),
        ):
            order = Order.objects.create(status="paid")
            publish("jobs", "s3cret-payload", key="k")
            publish("others", 2)
            before_anything_else(terminate_own_backend)
    finally:
        connection.close()
    assert publishing_stats["publish_failed"] == failed + 3  # the order's event too
    assert Order.objects.filter(pk=order.pk).exists()
    [record] = [one for one in caplog.records if one.name == "django_pgnotify.publishing"]
    assert record.levelname == "ERROR"
    assert "jobs" in record.getMessage()
    assert "others" in record.getMessage()
    assert "s3cret-payload" not in caplog.text
    assert ear.events() == []
    publish("jobs", "next")
    assert ear.data() == ["next"]


def test_outside_a_transaction_a_notify_that_fails_is_not_raised_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = publishing_stats["publish_failed"]
    Order.objects.exists()
    terminate_own_backend()
    try:
        with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
            publish("jobs", "s3cret-payload")
    finally:
        connection.close()
    assert publishing_stats["publish_failed"] == failed + 1
    assert "s3cret-payload" not in caplog.text


def test_what_is_published_is_counted(ear: Ear) -> None:
    before = publishing_stats.snapshot()
    with transaction.atomic():
        for number in range(10):
            publish("jobs", number)
    after = publishing_stats.snapshot()
    assert after["published"] - before.get("published", 0) == 10
    assert after["frames"] - before.get("frames", 0) == len(ear.frames()) == 1


def test_every_error_of_publish_is_one_of_ours() -> None:
    wrong: list[dict[str, Any]] = [
        {"topic": 7}, {"data": object()}, {"using": "lite"}, {"key": 1}, {"delivery": 1},
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(PgNotifyError):
            publish(**{"topic": "jobs"} | bad)
