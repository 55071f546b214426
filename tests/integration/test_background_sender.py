"""The background sender: no save waits for its NOTIFY, and none is lost, repeated or overtaken."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections, transaction
from pytest_django import Settings

from django_pgnotify import apublish, publish, receiver
from django_pgnotify.publishing import background
from django_pgnotify.publishing.background import BackgroundSender, sender
from django_pgnotify.publishing.sender import send
from django_pgnotify.registry import registry
from django_pgnotify.stats import publishing_stats
from django_pgnotify.testing import InMemoryBus, capture_events
from django_pgnotify.wire import Outgoing
from tests.integration.hearing import Ear, hearing, statements
from tests.integration.recording import (
    DEADLINE,
    Recorder,
    other_backends,
    query,
    rolled_back,
    terminate,
)
from tests.integration.redirecting import new_connections
from tests.proxy import TCPProxy
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

NAME = "pgnotify-sender"


def senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def _in_background(settings: Settings) -> Iterator[None]:
    settings.PGNOTIFY_BACKGROUND_SENDER = True
    yield
    sender.close(DEADLINE)
    for left in senders():  # after a test that failed
        with sender._changed:
            sender._stopping = True
            sender._changed.notify_all()
        left.join(DEADLINE)
        sender._stopping = False


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others", "testapp.order") as one:
        yield one


def flush() -> None:
    assert sender.flush(DEADLINE), f"{sender._waiting} events still wait"


def sent(ear: Ear) -> list[Any]:
    """The data of what has been published up to now."""
    flush()
    return ear.data()


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < deadline
        query("SELECT 1")


class Held:
    """A sender whose statements reach a proxy that holds them back."""

    def __init__(self, proxy: TCPProxy) -> None:
        self.proxy = proxy

    def put_one(self, data: Any) -> None:
        """Publish, and wait until the sender has it in hand: what follows is the next batch."""
        publish("jobs", data)
        wait_until(lambda: not sender._queue)


@pytest.fixture
def behind_proxy(ear: Ear, proxy: TCPProxy) -> Iterator[TCPProxy]:
    """The sender reaches the server through the proxy; nobody else does."""
    connection.ensure_connection()
    with new_connections(HOST=proxy.host, PORT=str(proxy.port)):
        yield proxy
        proxy.open()
        proxy.resume()
        sender.close(DEADLINE)


@contextmanager
def held(proxy: TCPProxy) -> Iterator[Held]:
    """Nothing of what the sender sends in the block arrives before its end."""
    publish("others", "connects")
    flush()
    proxy.blackhole()
    try:
        yield Held(proxy)
    finally:
        proxy.resume()


# -- what arrives ----------------------------------------------------------------------------


def test_events_arrive_once_and_in_order(ear: Ear) -> None:
    for number in range(500):
        publish("jobs", number)
    assert sent(ear) == list(range(500))
    assert ear.events() == []


def test_an_event_says_what_it_says_without_the_background(ear: Ear) -> None:
    order = Order.objects.create(status="paid")
    event_id = publish("jobs", {"a": 1}, key="k")
    flush()
    row, published = ear.events()
    assert (row.action, row.pk, row.model) == ("created", order.pk, "testapp.order")
    assert (published.id, published.data, published.key) == (event_id, {"a": 1}, "k")


def test_events_of_a_transaction_leave_after_its_commit_and_in_order(ear: Ear) -> None:
    with transaction.atomic():
        for number in range(3000):
            publish("jobs", number)
        assert sent(ear) == []
    assert sent(ear) == list(range(3000))


def test_after_a_rollback_nothing_leaves(ear: Ear) -> None:
    with rolled_back():
        publish("jobs", "lost")
        Order.objects.create()
    with transaction.atomic():
        publish("jobs", 1)
        with rolled_back():
            publish("jobs", "lost too")
        publish("jobs", 2)
    assert sent(ear) == [1, 2]


def test_an_event_too_big_for_a_frame_arrives(ear: Ear) -> None:
    publish("jobs", 1)
    publish("jobs", "x" * 20_000)
    publish("jobs", 2)
    assert sent(ear) == [1, "x" * 20_000, 2]


def test_several_threads_publish_and_each_keeps_its_order(ear: Ear) -> None:
    together = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            together.wait(DEADLINE)
            for turn in range(100):
                with transaction.atomic():
                    publish("jobs", [number, turn])
                    if turn % 2:
                        transaction.set_rollback(True)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(senders()) == 1
    data = sent(ear)
    assert len(data) == 6 * 50
    for number in range(6):
        assert [turn for one, turn in data if one == number] == list(range(0, 100, 2))


async def test_apublish_goes_to_the_background_too() -> None:
    ear = await sync_to_async(Ear)("default", ("jobs",))
    try:
        for number in range(10):
            await apublish("jobs", number)
        data = await sync_to_async(sent)(ear)
    finally:
        ear.close()
    assert data == list(range(10))


def test_each_database_gets_its_own(ear: Ear) -> None:
    with hearing("jobs", using="other") as other:
        for number in range(20):
            publish("jobs", number, using=("default", "other")[number % 2])
        flush()
        assert ear.data() == list(range(0, 20, 2))
        assert other.data() == list(range(1, 20, 2))


def test_one_frame_carries_what_was_put_while_a_statement_was_in_flight(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    with held(behind_proxy) as sending:
        ear.frames()
        before = publishing_stats.snapshot()
        sending.put_one(0)
        for number in range(1, 21):
            publish("jobs", number)
        assert ear.frames() == []
    flush()
    frames = ear.frames()
    assert [[event.data for event in ear.decode(one)] for one in frames] == [
        [0],
        list(range(1, 21)),
    ]
    assert publishing_stats["frames"] - before["frames"] == 2
    assert publishing_stats["published"] - before["published"] == 21


# -- the publisher ---------------------------------------------------------------------------


def test_the_publisher_s_own_connection_issues_no_notify(ear: Ear) -> None:
    with statements() as ran:
        publish("jobs", 1)
        with transaction.atomic():
            Order.objects.create()
            publish("jobs", 2)
    flush()
    assert ran.notify == []
    [(own,)] = query("SELECT pg_backend_pid()")
    backends = {one.backend for one in ear.frames()}
    assert len(backends) == 1
    assert own not in backends


def test_the_publisher_need_not_be_connected(ear: Ear) -> None:
    connection.close()
    publish("jobs", 1)
    assert connection.connection is None
    assert sent(ear) == [1]


def test_a_save_does_not_wait_for_a_server_that_does_not_answer(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    with held(behind_proxy) as sending:
        sending.put_one(1)
        with transaction.atomic():
            Order.objects.create()
        assert Order.objects.count() == 1
        assert not sender.flush(0)
    assert sent(ear) == ["connects", 1, {}]


def test_the_atomic_tier_stays_in_its_transaction(ear: Ear) -> None:
    with transaction.atomic():
        with statements() as ran:
            publish("jobs", 1, delivery="atomic")
        assert len(ran.notify) == 1
        assert sent(ear) == []
    assert ear.data() == [1]
    with rolled_back():
        publish("jobs", 2, delivery="atomic")
    assert sent(ear) == []


def test_a_transaction_by_hand_keeps_its_events_to_itself(ear: Ear) -> None:
    transaction.set_autocommit(False)
    try:
        publish("jobs", 1)
        assert sent(ear) == []
        transaction.rollback()
        publish("jobs", 2)
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert sent(ear) == [2]


def test_what_is_published_where_the_setting_is_off_goes_by_itself(
    ear: Ear, settings: Settings
) -> None:
    settings.PGNOTIFY_BACKGROUND_SENDER = False
    with statements() as ran:
        publish("jobs", 1)
    assert len(ran.notify) == 1
    assert senders() == []
    assert ear.data() == [1]


# -- in tests --------------------------------------------------------------------------------


def test_capture_events_sees_what_is_published_at_once(ear: Ear) -> None:
    with capture_events() as captured:
        publish("jobs", 1)
        with transaction.atomic():
            publish("jobs", 2)
        assert [event.data for event in captured] == [1, 2]
        assert ear.data() == [1, 2]
    assert senders() == []


def test_an_in_memory_bus_delivers_before_publish_returns(ear: Ear) -> None:
    recorder = Recorder()
    with registry.isolated():
        receiver("jobs")(recorder)
        with InMemoryBus() as bus:
            publish("jobs", 1)
            assert recorder.data == [1]
    assert [event.data for event in bus.events] == [1]
    assert senders() == []
    assert ear.events() == []


def test_capture_events_does_not_see_what_was_published_before_it(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    with held(behind_proxy) as sending:
        sending.put_one("in flight before")
        publish("jobs", "waiting before")
        with capture_events() as captured:
            behind_proxy.resume()
            flush()
            assert [event.data for event in captured] == []
    assert ear.data() == ["connects", "in flight before", "waiting before"]


def test_an_in_memory_bus_does_not_take_what_was_published_before_it(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    with held(behind_proxy) as sending:
        sending.put_one("in flight before")
        publish("jobs", "waiting before")
        with InMemoryBus() as bus:
            behind_proxy.resume()
            flush()
    assert [event.data for event in bus.events] == []
    assert ear.data() == ["connects", "in flight before", "waiting before"]


# -- a bound ---------------------------------------------------------------------------------


def test_what_there_is_no_room_for_is_counted_and_logged_and_the_rest_arrives(
    ear: Ear, behind_proxy: TCPProxy, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with held(behind_proxy) as sending:
        settings.PGNOTIFY_QUEUE_MAX_EVENTS = 5
        failed = publishing_stats["publish_failed"]
        sending.put_one(0)  # in flight, and not yet sent
        with caplog.at_level(logging.ERROR, "django_pgnotify.publishing"):
            for number in range(1, 8):
                publish("jobs", number if number < 5 else f"s3cret {number}")
        assert publishing_stats["publish_failed"] == failed + 3
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 3
        assert all("topic(s) jobs" in one and "5 events wait" in one for one in messages)
        assert "s3cret" not in caplog.text
    assert sent(ear) == ["connects", 0, 1, 2, 3, 4]
    publish("jobs", "next")
    assert sent(ear) == ["next"]
    assert publishing_stats["publish_failed"] == failed + 3


def test_of_a_transaction_that_has_room_in_part_the_first_events_arrive(
    ear: Ear, behind_proxy: TCPProxy, settings: Settings
) -> None:
    with held(behind_proxy) as sending:
        settings.PGNOTIFY_QUEUE_MAX_EVENTS = 4
        failed = publishing_stats["publish_failed"]
        sending.put_one(0)
        with transaction.atomic():
            for number in range(1, 8):
                publish("jobs", number)
        assert publishing_stats["publish_failed"] == failed + 4
    assert sent(ear) == ["connects", 0, 1, 2, 3]


def test_a_transaction_larger_than_the_bound_keeps_to_it(ear: Ear, settings: Settings) -> None:
    settings.PGNOTIFY_QUEUE_MAX_EVENTS = 10
    failed = publishing_stats["publish_failed"]
    with transaction.atomic():
        for number in range(25):
            publish("jobs", number)
    assert sent(ear) == list(range(10))
    assert publishing_stats["publish_failed"] == failed + 15


# -- a server that goes away -----------------------------------------------------------------


def test_what_is_published_while_the_server_cannot_be_reached_arrives_when_it_is_back(
    ear: Ear, behind_proxy: TCPProxy, caplog: pytest.LogCaptureFixture
) -> None:
    publish("jobs", "before")
    flush()
    failed, waited = publishing_stats["publish_failed"], publishing_stats["sender_waited"]
    behind_proxy.close()
    for number in range(5):
        publish("jobs", number)
    wait_until(lambda: publishing_stats["sender_waited"] >= waited + 3)
    assert ear.data() == ["before"]
    behind_proxy.open()
    assert sent(ear) == list(range(5))
    assert publishing_stats["publish_failed"] == failed
    assert "waits for database 'default'" in caplog.text


def test_a_sender_whose_first_attempt_to_connect_fails_keeps_the_events(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    waited = publishing_stats["sender_waited"]
    behind_proxy.close()
    publish("jobs", 1)
    wait_until(lambda: publishing_stats["sender_waited"] > waited)
    publish("jobs", 2)
    behind_proxy.open()
    assert sent(ear) == [1, 2]


def test_an_idle_connection_that_the_server_ended_costs_no_event(ear: Ear) -> None:
    publish("jobs", 0)
    flush()
    [first] = ear.frames()
    failed = publishing_stats["publish_failed"]
    backend = first.backend
    for number in range(1, 4):
        terminate(backend)
        publish("jobs", number)
        flush()
        [frame] = ear.frames()
        assert [event.data for event in ear.decode(frame)] == [number]
        assert frame.backend != backend
        backend = frame.backend
    assert publishing_stats["publish_failed"] == failed


def test_an_idle_connection_that_was_reset_on_the_way_costs_no_event(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    publish("jobs", 0)
    assert sent(ear) == [0]
    failed = publishing_stats["publish_failed"]
    assert behind_proxy.disconnect(reset=True) == 1
    publish("jobs", 1)
    assert sent(ear) == [1]
    assert publishing_stats["publish_failed"] == failed


def test_what_was_in_flight_when_the_connection_broke_is_counted_and_not_repeated(
    ear: Ear,
    behind_proxy: TCPProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sending = threading.Event()

    def watched(events: Sequence[Any], using: str) -> None:
        sending.set()
        send(events, using)

    with held(behind_proxy):
        failed = publishing_stats["publish_failed"]
        monkeypatch.setattr(background, "send_by_notify", watched)
        publish("jobs", "in flight")
        assert sending.wait(DEADLINE)
        publish("jobs", "waiting")
        behind_proxy.disconnect()
    assert sent(ear) == ["connects", "waiting"]
    assert publishing_stats["publish_failed"] == failed + 1
    assert "could not be sent" in caplog.text
    assert "in flight" not in caplog.text


def test_an_event_that_cannot_be_sent_does_not_stop_those_behind_it(
    ear: Ear, settings: Settings
) -> None:
    publish("jobs", 1)
    flush()
    failed = publishing_stats["publish_failed"]
    settings.PGNOTIFY_CHANNEL_PREFIX = 7  # which is refused where it is read
    publish("jobs", 2)
    flush()
    settings.PGNOTIFY_CHANNEL_PREFIX = ""
    publish("jobs", 3)
    assert sent(ear) == [1, 3]
    assert publishing_stats["publish_failed"] == failed + 1
    assert len(senders()) == 1


# -- the thread ------------------------------------------------------------------------------


def test_nobody_starts_a_thread_who_publishes_nothing() -> None:
    assert senders() == []
    with rolled_back():
        publish("jobs", 1)
    assert senders() == []
    assert sender.flush(0)


def test_one_thread_and_one_connection_serve_all_publishers(ear: Ear) -> None:
    publish("jobs", 0)
    flush()
    [thread] = senders()
    backends = {one.backend for one in ear.frames()}
    for number in range(20):
        publish("jobs", number)
        flush()
    backends |= {one.backend for one in ear.frames()}
    assert senders() == [thread]
    assert thread.daemon
    assert len(backends) == 1


def test_close_sends_what_waits_and_ends_thread_and_connection(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    with held(behind_proxy) as sending:
        [thread] = senders()
        sending.put_one(0)
        for number in range(1, 50):
            publish("jobs", number)
        closing = threading.Thread(target=sender.close, args=(DEADLINE,))
        closing.start()
        assert closing.is_alive()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert not thread.is_alive()
    assert ear.data() == ["connects", *range(50)]
    behind_proxy.wait_for_connections(0)


def test_close_without_anything_to_send_is_quick_and_may_be_repeated() -> None:
    sender.close(DEADLINE)
    publish("jobs", 1)
    flush()
    sender.close(DEADLINE)
    sender.close(DEADLINE)
    assert senders() == []


def test_after_close_the_sender_starts_anew(ear: Ear) -> None:
    for number in range(5):
        publish("jobs", number)
        sender.close(DEADLINE)
        assert senders() == []
        assert ear.data() == [number]


def test_close_leaves_no_connection_behind(ear: Ear) -> None:
    publish("jobs", 1)
    flush()
    [frame] = ear.frames()
    assert frame.backend in [pid for pid, _ in other_backends()]
    sender.close(DEADLINE)
    wait_until(lambda: frame.backend not in [pid for pid, _ in other_backends()])


def test_what_could_not_be_sent_before_close_gave_up_is_counted_and_logged(
    ear: Ear, behind_proxy: TCPProxy, caplog: pytest.LogCaptureFixture
) -> None:
    with held(behind_proxy) as sending:
        sending.put_one("in flight")
        failed = publishing_stats["publish_failed"]
        publish("jobs", 1)
        publish("jobs", 2)
        sender.close(0.05)
        assert publishing_stats["publish_failed"] >= failed + 2
        assert "after the process was told to end" in caplog.text


def test_what_never_left_because_no_connection_was_made_is_counted_when_close_gives_up(
    behind_proxy: TCPProxy,
) -> None:
    failed = publishing_stats["publish_failed"]
    behind_proxy.blackhole()
    with transaction.atomic():
        for number in range(5):
            publish("jobs", number)
    behind_proxy.wait_for_accepted(1)  # the sender has them in hand, and waits for a connection
    sender.close(0.05)
    assert publishing_stats["publish_failed"] == failed + 5


def test_a_close_that_gave_up_leaves_no_second_sender_behind(
    ear: Ear, behind_proxy: TCPProxy
) -> None:
    """Two of them would overtake each other."""
    with held(behind_proxy) as sending:
        [first] = senders()
        sending.put_one("in flight")
        sender.close(0.05)
        publish("jobs", 1)
    first.join(DEADLINE)
    assert not first.is_alive()
    assert sent(ear)[-1] == 1
    assert len(senders()) == 1


def test_flush_tells_whether_everything_has_been_sent(behind_proxy: TCPProxy) -> None:
    assert sender.flush(0)
    with held(behind_proxy) as sending:
        sending.put_one(1)
        assert not sender.flush(0)
        assert not sender.flush(0.05)
    assert sender.flush(DEADLINE)
    assert sender.flush(0)


def test_a_thread_that_cannot_be_started_breaks_no_save_and_is_tried_again(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    failed = publishing_stats["publish_failed"]
    try:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            publish("jobs", 1)  # the commit stands, whatever becomes of its event
        publish("jobs", 2)
        data = sent(ear)
    finally:
        if sender._thread is not None and sender._thread.ident is None:
            sender._thread = None  # nobody could join it
    assert data[-1] == 2
    assert len(data) + publishing_stats["publish_failed"] - failed == 2


class Unconnected(BackgroundSender):
    """A sender without a database, whose thread stops where the test wants it to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.sent: list[Any] = []
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.fails = self.hangs = self.hangs_at_end = False
        monkeypatch.setattr(background, "send_by_notify", self.keep)
        monkeypatch.setattr(background, "connections", self)

    def keep(self, events: Sequence[Any], using: str) -> None:
        self.sent += [event.body for event in events]

    def put_one(self, body: str) -> bool:
        return self.put([Outgoing("jobs", None, body, 1)], "default")

    def _connect(self, using: str) -> None:
        if self.hangs:
            self.wait()
        if self.fails:
            raise RuntimeError("as asked")

    def wait(self) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE)

    def close_all(self) -> None:
        """As that of Django's connections, by the thread that ends."""
        if self.hangs_at_end:
            self.wait()


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unconnected]:
    one = Unconnected(monkeypatch)
    one._closes_at_exit = True
    yield one
    one.go_on.set()
    one.close(DEADLINE)


def test_what_is_put_while_the_thread_ends_is_sent_and_not_told_as_unsent(
    unconnected: Unconnected,
) -> None:
    failed = publishing_stats["publish_failed"]
    unconnected.put_one("a")
    assert unconnected.flush(DEADLINE)
    unconnected.hangs_at_end = True
    closing = threading.Thread(target=unconnected.close, args=(DEADLINE,))
    closing.start()
    assert unconnected.reached.wait(DEADLINE)  # it has looked for the last time
    assert unconnected.put_one("b")
    unconnected.hangs_at_end = False
    unconnected.go_on.set()
    closing.join(DEADLINE)
    assert unconnected.flush(DEADLINE)
    assert unconnected.sent == ["a", "b"]
    assert publishing_stats["publish_failed"] == failed


def test_what_is_put_once_the_thread_has_ended_is_left_alone_by_the_close_that_ended_it(
    unconnected: Unconnected,
) -> None:
    failed = publishing_stats["publish_failed"]
    unconnected.put_one("a")
    assert unconnected.flush(DEADLINE)
    thread = unconnected._thread
    assert thread is not None

    def join(timeout: float) -> None:
        threading.Thread.join(thread, timeout)
        assert unconnected.put_one("b")

    thread.join = join  # type: ignore[method-assign, assignment]
    unconnected.close(DEADLINE)
    assert unconnected.flush(DEADLINE)
    assert unconnected.sent == ["a", "b"]
    assert publishing_stats["publish_failed"] == failed


def test_a_flush_does_not_wait_for_what_close_has_given_up(unconnected: Unconnected) -> None:
    unconnected.hangs = True
    unconnected.put_one("a")
    assert unconnected.reached.wait(DEADLINE)
    flushed: list[bool] = []
    flushing = threading.Thread(
        target=lambda: flushed.append(unconnected.flush(10 * DEADLINE)), daemon=True
    )
    flushing.start()
    wait_until(lambda: bool(unconnected._changed._waiters))  # type: ignore[attr-defined]
    unconnected.close(0.05)
    flushing.join(DEADLINE)
    assert flushed == [True]


def test_what_close_has_told_as_unsent_does_not_leave_later(unconnected: Unconnected) -> None:
    failed = publishing_stats["publish_failed"]
    unconnected.hangs = True
    unconnected.put_one("a")
    assert unconnected.reached.wait(DEADLINE)
    unconnected.close(0.05)
    assert publishing_stats["publish_failed"] == failed + 1
    unconnected.hangs = False
    unconnected.go_on.set()
    unconnected.put_one("b")
    assert unconnected.flush(DEADLINE)
    assert unconnected.sent == ["b"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_is_replaced(
    unconnected: Unconnected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a handler of the log, as asked")

    unconnected.fails = True
    with monkeypatch.context() as patched:
        patched.setattr(background, "report_unsent", fail)
        unconnected.put_one("a")
        [thread] = senders()
        thread.join(DEADLINE)
    unconnected.fails = False
    assert unconnected.put_one("b")
    assert unconnected.flush(DEADLINE)
    assert unconnected.sent == ["b"]
