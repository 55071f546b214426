"""``subscribe()``: events as an iterator in any process, sync or async."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, transaction
from pytest_django import Settings

from django_pgnotify import Event, Topic, apublish, publish, subscribe
from django_pgnotify.events import EVENT_FIELDS
from django_pgnotify.exceptions import (
    InvalidArgument,
    InvalidTopic,
    ListenError,
    UnsupportedDatabase,
)
from django_pgnotify.listening.background import background_listener, stop_all
from django_pgnotify.listening.connection import ListenConnection
from django_pgnotify.listening.subscribe import EventStream
from tests.integration.recording import (
    DEADLINE,
    alias_at,
    backends_of_listeners,
    notify,
    query,
    terminate,
)
from tests.integration.test_background import in_child, pytest_fork
from tests.proxy import TCPProxy
from tests.testapp.models import Invoice, Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The LISTENs and UNLISTENs of this process, without the listeners' own channels."""
    said: list[str] = []
    original = ListenConnection._each

    async def each(
        self: ListenConnection, statement: str, channels: Sequence[str], timeout: float
    ) -> None:
        await original(self, statement, channels, timeout)
        said.extend(statement.format(name) for name in channels if not name.startswith("pgnotify."))

    monkeypatch.setattr(ListenConnection, "_each", each)
    return said


def take(events: EventStream, count: int) -> list[Event]:
    """The next ``count`` events."""
    taken: list[Event] = []
    while len(taken) < count:
        event = events.get(DEADLINE)
        assert event is not None, f"{len(taken)} of {count} events: {taken}"
        taken.append(event)
    return taken


async def atake(events: EventStream, count: int) -> list[Event]:
    taken: list[Event] = []
    async with asyncio.timeout(DEADLINE):
        while len(taken) < count:
            event = await events.aget()
            assert event is not None, f"{len(taken)} of {count} events: {taken}"
            taken.append(event)
    return taken


def data(events: Sequence[Event]) -> list[Any]:
    return [event.data for event in events]


def wait_until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        query("SELECT 1")


def received(events: EventStream, count: int) -> None:
    """Wait until the listener's thread has handed over ``count`` events, or dropped them."""
    wait_until(lambda: events.stats["received"] >= count, f"{count} received")
    loop = background_listener("default")._loop
    assert loop is not None
    # They are counted, and handed over in the same step of the loop: so after the next one.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(DEADLINE)


class Consumer(threading.Thread):
    """A thread that does one thing; :meth:`result` is what came of it, if it ended in time."""

    def __init__(self, work: Callable[..., Any], *args: Any) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._work_args = args
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work(*self._work_args)
        except BaseException as exc:  # noqa: BLE001 - raised in the thread that asks
            self._error = exc

    def result(self, timeout: float = DEADLINE) -> Any:
        self.join(timeout)
        assert not self.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._result


# -- what is heard ----------------------------------------------------------------------------


def test_what_is_published_right_after_entering_is_heard() -> None:
    for number in range(30):
        with subscribe(f"fresh{number}") as events:
            publish(f"fresh{number}", number)
            [event] = take(events, 1)
        assert (event.topic, event.action, event.data) == (f"fresh{number}", "published", number)


async def test_what_is_published_right_after_entering_is_heard_in_async_code_too() -> None:
    for number in range(30):
        async with subscribe(f"fresh{number}") as events:
            await apublish(f"fresh{number}", number)
            [event] = await atake(events, 1)
        assert (event.topic, event.action, event.data) == (f"fresh{number}", "published", number)


def test_a_stream_is_iterated_over_in_the_order_of_publication() -> None:
    heard = []
    with subscribe("jobs") as events:
        with transaction.atomic():
            for number in range(500):
                publish("jobs", number)
        publish("jobs", "end")
        for event in events:
            if event.data == "end":
                break
            heard.append(event.data)
    assert heard == list(range(500))


async def test_an_async_stream_is_iterated_over_in_the_order_of_publication() -> None:
    heard = []
    async with subscribe("jobs") as events, asyncio.timeout(DEADLINE):
        for number in range(50):
            await apublish("jobs", number)
        await apublish("jobs", "end")
        async for event in events:
            if event.data == "end":
                break
            heard.append(event.data)
    assert heard == list(range(50))


def test_several_sources_are_one_stream() -> None:
    with subscribe([Order, "jobs", Topic("news")]) as events:
        order = Order.objects.create(status="new")
        publish("jobs", 1)
        publish("news", 2)
        publish("other", 3)
        order.status = "paid"
        order.save(update_fields=["status"])
        heard = take(events, 4)
    assert [(event.topic, event.action) for event in heard] == [
        ("testapp.order", "created"),
        ("jobs", "published"),
        ("news", "published"),
        ("testapp.order", "updated"),
    ]
    assert heard[0].pk == order.pk
    assert heard[3].changed == ("status",)
    assert heard[3].instance() == order


def test_a_source_named_twice_is_heard_once() -> None:
    with subscribe(["jobs", Topic("jobs"), "jobs"]) as events:
        publish("jobs", 1)
        publish("jobs", 2)
        assert data(take(events, 2)) == [1, 2]


def test_of_a_shared_topic_only_the_model_asked_for_is_heard() -> None:
    with subscribe(Invoice) as invoices, subscribe("billing") as everything:
        publish("billing", "by hand")
        invoice = Invoice.objects.create(number="1")
        publish("billing", "by hand")
        Invoice.objects.create(number="2")
        heard = take(invoices, 2)
        assert len(take(everything, 4)) == 4
    assert [event.model for event in heard] == ["testapp.invoice"] * 2
    assert heard[0].pk == invoice.pk


def test_a_model_and_its_whole_topic_together_hear_each_event_once() -> None:
    with subscribe([Invoice, "billing"]) as events:
        Invoice.objects.create(number="1")
        publish("billing", "by hand")
        assert [event.action for event in take(events, 2)] == ["created", "published"]


def test_what_is_too_big_for_a_notify_arrives_whole_and_in_its_place() -> None:
    big = "x" * 100_000
    with subscribe("jobs") as events:
        for value in ("before", big, "after", big + "y", "last"):
            publish("jobs", value)
        assert data(take(events, 5)) == ["before", big, "after", big + "y", "last"]


async def test_a_stored_event_reaches_who_iterates_in_the_one_thread_of_sync_to_async() -> None:
    big = "x" * 100_000

    def consume() -> list[Any]:
        with subscribe("jobs") as events:
            publish("jobs", big)
            publish("jobs", "behind it")
            return data(take(events, 2))

    assert await sync_to_async(consume)() == [big, "behind it"]


def test_a_notify_from_psql_and_a_broken_frame_are_told_apart() -> None:
    with subscribe("jobs") as events:
        notify("jobs", '{"pgnotify":1,"events":[', "do job 1001")
        [event] = take(events, 1)
        assert (event.action, event.data) == ("published", "do job 1001")
        assert events.stats["broken"] == 1


def test_a_rolled_back_event_is_never_heard() -> None:
    with subscribe([Order, "jobs"]) as events:
        with transaction.atomic():
            Order.objects.create()
            publish("jobs", "rolled back")
            transaction.set_rollback(True)
        publish("jobs", "committed")
        assert data(take(events, 1)) == ["committed"]


def test_get_returns_none_when_nothing_came_in_time_and_the_stream_goes_on() -> None:
    with subscribe("jobs") as events:
        assert events.get(timeout=0) is None
        assert events.get(timeout=0.01) is None
        publish("jobs", 1)
        assert data(take(events, 1)) == [1]


async def test_a_wait_that_is_cancelled_takes_nothing_with_it() -> None:
    async with subscribe("jobs") as events:
        for number in range(30):
            waiting = asyncio.create_task(events.aget())
            publishing = asyncio.create_task(apublish("jobs", number))
            await publishing
            if waiting.cancel():
                # Cancelled or, if it had just been woken, done: never both and never neither.
                done, _ = await asyncio.wait([waiting], timeout=DEADLINE)
                assert done
            if waiting.cancelled():
                [event] = await atake(events, 1)
            else:
                taken = waiting.result()
                assert taken is not None
                event = taken
            assert event.data == number


def test_the_events_are_those_of_receivers_with_all_their_fields() -> None:
    with subscribe("jobs") as events:
        identity = publish("jobs", {"task": 1}, key="a")
        [event] = take(events, 1)
    assert event.id == identity
    assert event.key == "a"
    assert event.using == "default"
    assert {name: getattr(event, name) for name in EVENT_FIELDS}["source"].rpartition(":")[2]


# -- one connection ---------------------------------------------------------------------------


def test_two_streams_share_one_connection_and_each_hears_everything() -> None:
    with subscribe(["a", "b"]) as first, subscribe("a") as second:
        assert backends_of_listeners() == [background_listener("default").backend_pid]
        publish("a", 1)
        publish("b", 2)
        assert data(take(first, 2)) == [1, 2]
        assert data(take(second, 1)) == [1]


def test_a_stream_that_ends_leaves_the_other_what_it_listens_to(statements: list[str]) -> None:
    with subscribe(["a", "b"]) as stays:
        with subscribe(["b", "c"]) as leaves:
            publish("b", 1)
            assert data(take(leaves, 1)) == [1]
        wait_until(lambda: "UNLISTEN c" in statements, "the channel of nobody is left")
        publish("b", 2)
        assert data(take(stays, 2)) == [1, 2]
    wait_until(lambda: "UNLISTEN b" in statements, "the last one has left")
    assert sorted(statements) == [
        *("LISTEN a", "LISTEN b", "LISTEN c"),
        *("UNLISTEN a", "UNLISTEN b", "UNLISTEN c"),
    ]


def test_a_topic_of_any_name_is_heard() -> None:
    for topic in ("Ünïcode; \"quoted\" 'name'", "t" * 63, "long" * 100):
        with subscribe(topic) as events:
            publish(topic, 1)
            assert [event.topic for event in take(events, 1)] == [topic]


def test_the_stream_listens_on_the_database_it_was_told() -> None:
    with subscribe("jobs", using="other") as events, subscribe("jobs") as default:
        publish("jobs", "on other", using="other")
        publish("jobs", "on default")
        [event] = take(events, 1)
        assert (event.data, event.using) == ("on other", "other")
        assert data(take(default, 1)) == ["on default"]
    connections["other"].close()


test_the_stream_listens_on_the_database_it_was_told = pytest.mark.django_db(
    transaction=True, databases=["default", "other"]
)(test_the_stream_listens_on_the_database_it_was_told)


# -- gaps -------------------------------------------------------------------------------------


def test_a_terminated_connection_is_told_as_a_gap_per_topic_before_later_events() -> None:
    with subscribe([Order, "jobs"]) as events:
        publish("jobs", "before")
        assert data(take(events, 1)) == ["before"]
        terminate(background_listener("default").backend_pid)
        gaps = take(events, 2)
        publish("jobs", "after")
        assert data(take(events, 1)) == ["after"]
        assert events.stats["gaps"] == 1
    assert [(event.action, event.topic) for event in gaps] == [
        ("gap", "jobs"),
        ("gap", "testapp.order"),
    ]
    for gap in gaps:
        assert gap.data["since"] <= gap.data["until"]
        assert "the connection broke" in gap.data["cause"]
        assert (gap.model, gap.pk, gap.key) == (None, None, None)


async def test_a_terminated_connection_is_told_to_async_code_before_later_events() -> None:
    async with subscribe("jobs") as events:
        await apublish("jobs", "before")
        await asyncio.to_thread(_terminate_and_close, background_listener("default").backend_pid)
        heard = await atake(events, 2)
        await apublish("jobs", "after")
        heard += await atake(events, 1)
    assert [event.action for event in heard] == ["published", "gap", "published"]


def _terminate_and_close(pid: int | None) -> None:
    try:
        terminate(pid)
    finally:
        connections.close_all()  # those of this thread


def test_a_number_that_is_missing_lies_before_a_gap(settings: Settings) -> None:
    """Published without a pause while the connection is ended again and again."""
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.05
    done = threading.Event()

    def publish_for_ever() -> int:
        number = 0
        try:
            while not done.is_set():
                publish("jobs", number)
                number += 1
        finally:
            connections.close_all()
        return number

    heard: list[Event] = []
    with subscribe("jobs") as events:
        publisher = Consumer(publish_for_ever)
        try:
            for times in range(1, 6):
                heard += take(events, 50)
                terminate(background_listener("default").backend_pid)
                while sum(event.action == "gap" for event in heard) < times:
                    heard += take(events, 1)
        finally:
            done.set()
        count = publisher.result()
        publish("jobs", "end")
        while heard[-1].data != "end":
            heard += take(events, 1)
    expected, gap_before = 0, False
    for event in heard[:-1]:
        if event.action == "gap":
            gap_before = True
            continue
        assert event.data == expected or (gap_before and event.data > expected), event.data
        expected, gap_before = event.data + 1, False
    assert expected == count or gap_before


def test_who_does_not_keep_up_gets_one_gap_per_topic_where_events_are_missing() -> None:
    with subscribe(["a", "b"], max_waiting=5) as events:
        for number in range(10):
            publish("a", number)
            publish("b", number)
        received(events, 20)
        assert events.stats["dropped"] == 15
        heard = take(events, 7)
        publish("a", "after")
        heard += take(events, 1)
        assert events.get(timeout=0) is None
        assert events.stats["dropped"] == 15
    # Events of two topics that arrive together may come in another order than they left in.
    for topic in ("a", "b"):
        of_topic = data([event for event in heard[:5] if event.topic == topic])
        assert of_topic == list(range(len(of_topic)))
    gaps = heard[5:7]
    assert sorted((gap.action, gap.topic) for gap in gaps) == [("gap", "a"), ("gap", "b")]
    assert heard[7].data == "after"
    for gap in gaps:
        assert "keep up" in gap.data["cause"]
        assert gap.data["since"] <= gap.data["until"]


def test_nothing_is_heard_between_the_first_dropped_event_and_the_gap() -> None:
    """Room that a taken event makes must not let a later event overtake the gap."""
    with subscribe("a", max_waiting=3) as events:
        for number in range(4):
            publish("a", number)
        received(events, 4)
        assert data(take(events, 2)) == [0, 1]
        publish("a", 4)
        received(events, 5)
        heard = take(events, 2)
        publish("a", 5)
        heard += take(events, 1)
    assert [event.data if event.action != "gap" else "gap" for event in heard] == [2, "gap", 5]


def test_an_overflow_can_be_survived_again_and_again_with_one_gap_each() -> None:
    with subscribe("a", max_waiting=2) as events:
        for times in range(1, 6):
            for number in range(5):
                publish("a", number)
            received(events, 5 * times)
            heard = take(events, 3)
            assert [event.action for event in heard] == ["published", "published", "gap"]
            assert events.get(timeout=0) is None


def test_every_dropped_event_lies_inside_the_gap() -> None:
    """Publishers' clocks and paths differ: the last one dropped need not be the latest."""
    with subscribe("a", max_waiting=1) as events:
        for at in (1000.0, 3000.0, 2000.0):
            notify("a", f'{{"pgnotify":1,"events":[{{"action":"published","at":{at}}}]}}')
        received(events, 3)
        [first, gap] = take(events, 2)
    assert first.published_at.timestamp() == 1000.0
    assert gap.data["since"] <= "1970-01-01T00:33:20+00:00"
    assert gap.data["until"] >= "1970-01-01T00:50:00+00:00"


# -- the end ----------------------------------------------------------------------------------


def test_close_from_another_thread_ends_the_iteration() -> None:
    with subscribe("jobs") as events:
        consumer = Consumer(lambda: [event.data for event in events])
        publish("jobs", 1)
        wait_until(lambda: not events._events and events.stats["received"] == 1, "1 was taken")
        events.close()
        assert consumer.result() == [1]


async def test_close_from_another_thread_ends_an_async_iteration() -> None:
    async with subscribe("jobs") as events:
        heard: list[Any] = []
        reached = asyncio.Event()

        async def consume() -> None:
            async for event in events:
                heard.append(event.data)
                reached.set()

        task = asyncio.create_task(consume())
        await apublish("jobs", 1)
        async with asyncio.timeout(DEADLINE):
            await reached.wait()
            await asyncio.to_thread(events.close)
            await task
    assert heard == [1]


def test_what_waits_when_a_stream_is_closed_is_still_handed_out() -> None:
    with subscribe("jobs") as events:
        for number in range(3):
            publish("jobs", number)
        received(events, 3)
    assert data(list(events)) == [0, 1, 2]
    assert list(events) == []
    assert events.get() is None


def test_closing_twice_or_before_entering_is_harmless() -> None:
    subscribe("jobs").close()
    with subscribe("jobs") as events:
        events.close()
        events.close()
        assert events.get() is None


def test_leaving_the_block_by_an_error_ends_the_subscription(statements: list[str]) -> None:
    with pytest.raises(RuntimeError, match="as asked"), subscribe("jobs"):
        raise RuntimeError("as asked")
    wait_until(lambda: "UNLISTEN jobs" in statements, "the channel is left")


async def test_without_a_block_async_for_subscribes_and_leaving_it_unsubscribes(
    statements: list[str],
) -> None:
    stop = asyncio.Event()

    async def publish_for_ever() -> None:
        while not stop.is_set():
            await apublish("jobs", "again")  # nobody says when the loop has begun to listen

    publisher = asyncio.create_task(publish_for_ever())
    try:
        async with asyncio.timeout(DEADLINE):
            async for event in subscribe("jobs"):
                assert event.data == "again"
                break
    finally:
        stop.set()
        await publisher
    assert statements[0] == "LISTEN jobs"
    async with subscribe("other") as events, asyncio.timeout(DEADLINE):
        while "UNLISTEN jobs" not in statements:
            await apublish("other")
            await events.aget()


def test_without_a_block_a_for_loop_subscribes_too() -> None:
    with subscribe("jobs") as witness:
        stream = subscribe("jobs")
        consumer = Consumer(lambda: next(iter(stream)))
        try:
            deadline = time.monotonic() + 5
            while consumer.is_alive() and time.monotonic() < deadline:
                publish("jobs", "again")
                take(witness, 1)
            assert not consumer.is_alive(), "the loop waits for ever, without a word"
        finally:
            stream.close()
        assert consumer.result().data == "again"


def test_a_stream_whose_listener_has_ended_does_not_wait_for_ever() -> None:
    with subscribe("jobs") as events:
        consumer = Consumer(lambda: list(events))
        stop_all()
        try:
            consumer.join(5)
            assert not consumer.is_alive(), "deaf, and believes itself well"
        finally:
            events.close()
        try:
            assert consumer.result() == []
        except ListenError:
            pass  # as good


# -- not established --------------------------------------------------------------------------


@pytest.fixture
def unreachable(settings: Settings) -> Iterator[str]:
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.3
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    with alias_at("unreachable", HOST="127.0.0.1", PORT="1") as alias:
        yield alias
        stop_all()


def test_what_cannot_be_established_in_time_is_an_error_that_names_the_database(
    unreachable: str,
) -> None:
    started = time.monotonic()
    with (
        pytest.raises(ListenError, match=r"'unreachable'.*pglisten --check"),
        subscribe(["a", "b", "c"], using=unreachable),
    ):
        pass
    assert time.monotonic() - started < 5


async def test_what_cannot_be_established_in_time_is_an_error_in_async_code_too(
    unreachable: str,
) -> None:
    started = time.monotonic()
    with pytest.raises(ListenError, match=r"'unreachable'.*pglisten --check"):
        async with subscribe(["a", "b", "c"], using=unreachable):
            pass
    assert time.monotonic() - started < 5


def test_a_block_that_could_not_be_entered_leaves_no_subscription(unreachable: str) -> None:
    stream = subscribe(["a", "b"], using=unreachable)
    with pytest.raises(ListenError), stream:
        pass
    assert background_listener(unreachable)._subscriptions == {}
    assert stream.get(timeout=0) is None


@pytest.mark.parametrize("how", ["timed out", "cancelled"])
async def test_an_async_block_that_could_not_be_entered_leaves_no_subscription(
    unreachable: str, how: str, settings: Settings
) -> None:
    stream = subscribe(["a", "b"], using=unreachable)
    if how == "timed out":
        with pytest.raises(ListenError):
            await stream.__aenter__()
    else:
        settings.PGNOTIFY_CONNECT_TIMEOUT = 60.0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.__aenter__()
    assert background_listener(unreachable)._subscriptions == {}


def test_entering_during_an_outage_returns_once_it_is_over(
    proxy: TCPProxy, settings: Settings
) -> None:
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    with alias_at("proxied", HOST=proxy.host, PORT=str(proxy.port)) as alias:
        try:
            with subscribe("a", using=alias) as first:
                proxy.close()
                publish("b", "into the hole")
                stream = subscribe("b", using=alias)
                entering = Consumer(stream.__enter__)
                entering.join(0.2)
                assert entering.is_alive(), "nothing listens, and it says that something does"
                proxy.open()
                entering.result()
                publish("b", "heard")
                heard = take(stream, 1)
                while heard[-1].action == "gap":
                    heard += take(stream, 1)
                assert heard[-1].data == "heard"
                stream.close()
                assert take(first, 1)[0].action == "gap"
        finally:
            stop_all()


# -- bad arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", [None, "", "  ", 7, [], ["jobs", None], object(), "a\x00b", Event]
)
def test_a_source_that_is_none_is_refused_at_once(source: Any) -> None:
    with pytest.raises(InvalidTopic):
        subscribe(source)


@pytest.mark.parametrize("value", [0, -1, 1.5, "10", None, True])
def test_a_max_waiting_that_is_no_count_is_refused_at_once(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="max_waiting="):
        subscribe("jobs", max_waiting=value)


@pytest.mark.parametrize("alias", ["lite", "nowhere"])
def test_a_database_that_cannot_be_listened_on_is_refused_by_name_at_once(alias: str) -> None:
    with pytest.raises(UnsupportedDatabase, match=repr(alias)):
        subscribe("jobs", using=alias)


def test_a_stream_is_used_once() -> None:
    stream = subscribe("jobs")
    with stream:
        with pytest.raises(InvalidArgument, match="used before"), stream:
            pass
        publish("jobs", "the attempt did no harm")
        assert data(take(stream, 1)) == ["the attempt did no harm"]
    with pytest.raises(InvalidArgument, match="used before"), stream:
        pass


async def test_an_async_stream_is_used_once() -> None:
    stream = subscribe("jobs")
    async with stream:
        pass
    with pytest.raises(InvalidArgument, match="used before"):
        async with stream:
            pass


# -- loops and threads ------------------------------------------------------------------------


def test_streams_of_several_loops_at_once_share_the_connection_and_hear_everything() -> None:
    ready = threading.Barrier(5)

    async def consume(number: int) -> list[Any]:
        async with subscribe(["all", f"of{number}"]) as events:
            await asyncio.to_thread(ready.wait, DEADLINE)
            return data(await atake(events, 21))

    consumers = [Consumer(asyncio.run, consume(number)) for number in range(4)]
    ready.wait(DEADLINE)
    assert len(backends_of_listeners()) == 1
    for number in range(20):
        publish("all", number)
    for number in range(4):
        publish(f"of{number}", "own")
    for consumer in consumers:
        assert consumer.result() == [*range(20), "own"]


def test_one_loop_after_another_can_subscribe() -> None:
    async def once(number: int) -> list[Any]:
        async with subscribe("jobs") as events:
            task = asyncio.create_task(atake(events, 1))
            await asyncio.to_thread(_publish_and_close, number)
            return data(await task)

    assert [asyncio.run(once(number)) for number in range(5)] == [[n] for n in range(5)]


def _publish_and_close(value: Any) -> None:
    try:
        publish("jobs", value)
    finally:
        connections.close_all()


def test_a_stream_whose_loop_was_closed_under_it_disturbs_nobody() -> None:
    streams: list[EventStream] = []
    waiting: list[asyncio.Task[Event | None]] = []

    async def abandon() -> None:
        streams.append(await subscribe("jobs").__aenter__())
        waiting.append(asyncio.create_task(streams[0].aget()))
        await asyncio.sleep(0)  # it waits now, and is cancelled when the loop is closed
        assert streams[0]._waiter is not None

    with subscribe("jobs") as events:
        asyncio.run(abandon())
        publish("jobs", 1)
        assert data(take(events, 1)) == [1]
        received(streams[0], 1)
        streams[0].close()


def test_many_streams_that_come_and_go_in_many_threads_hear_their_own() -> None:
    def churn(thread: int) -> int:
        heard = 0
        try:
            for turn in range(15):
                topic = f"topic{(thread + turn) % 3}"
                with subscribe(topic) as events:
                    publish(topic, [thread, turn])
                    while take(events, 1)[0].data != [thread, turn]:
                        pass
                    heard += 1
        finally:
            connections.close_all()
        return heard

    consumers = [Consumer(churn, number) for number in range(6)]
    assert [consumer.result() for consumer in consumers] == [15] * 6


# -- fork -------------------------------------------------------------------------------------


@pytest_fork
def test_a_forked_child_subscribes_on_a_connection_of_its_own() -> None:
    with subscribe("jobs") as events:
        backend = background_listener("default").backend_pid
        connections.close_all()  # Django's own connection is not ours to make fork-safe

        def work() -> None:
            with subscribe("jobs") as own:
                assert background_listener("default").backend_pid not in (None, backend)
                publish("jobs", "from the child")
                assert data(take(own, 1)) == ["from the child"]
            stop_all()

        in_child(work)
        publish("jobs", "from the parent")
        assert data(take(events, 2)) == ["from the child", "from the parent"]
        assert background_listener("default").backend_pid == backend


@pytest_fork
def test_a_stream_inherited_by_a_child_says_that_it_cannot_hear_there() -> None:
    with subscribe("jobs") as events:
        connections.close_all()

        def work() -> None:
            consumer = Consumer(lambda: next(iter(events), None))
            with pytest.raises(ListenError):
                consumer.result(3)

        in_child(work)
        publish("jobs", "still here")
        assert data(take(events, 1)) == ["still here"]


@pytest_fork
def test_a_child_forked_while_an_event_is_handed_over_can_leave_the_block() -> None:
    """The parent's threads hold locks at that moment, which nobody in the child lets go of."""
    with subscribe("jobs") as events:
        connections.close_all()
        background = background_listener("default")
        held, forked = threading.Event(), threading.Event()

        def hold() -> None:
            with events._changed, background._lock:
                held.set()
                assert forked.wait(DEADLINE)

        holder = Consumer(hold)
        assert held.wait(DEADLINE)

        def work() -> None:
            Consumer(events.close).result(3)

        try:
            in_child(work)
        finally:
            forked.set()
            holder.result()
        publish("jobs", "still here")
        assert data(take(events, 1)) == ["still here"]
