"""What went wrong in programs that used LISTEN before this one, each as a promise kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections, transaction
from pytest_django import Settings

from django_pgnotify import Event, publish, receiver, subscribe
from django_pgnotify.epochs import use
from django_pgnotify.listening.background import background_listener, stop_all
from django_pgnotify.listening.connection import ListenConnection, Notification
from django_pgnotify.listening.listener import Listener
from django_pgnotify.listening.subscribe import EventStream
from django_pgnotify.registry import Registry, registry
from django_pgnotify.testing import running_listener
from tests.integration.hearing import hearing
from tests.integration.recording import (
    DEADLINE,
    Gate,
    Recorder,
    Sink,
    anotify,
    backends_of_listeners,
    client,
    failures,
    notify,
    query,
    running,
    stats,
)
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated
    stop_all()


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The LISTENs and UNLISTENs of this process, once each has been committed."""
    said: list[str] = []
    original = ListenConnection._each

    async def each(
        self: ListenConnection, statement: str, channels: Sequence[str], timeout: float
    ) -> None:
        await original(self, statement, channels, timeout)
        said.extend(statement.format(name) for name in channels if not name.startswith("pgnotify."))

    monkeypatch.setattr(ListenConnection, "_each", each)
    return said


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(0)`` to ``work(count - 1)`` at the same time; what they returned, in order."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(DEADLINE)
            results[number] = work(number)
        except BaseException as exc:  # noqa: BLE001 - raised in the thread of the test
            errors.append(exc)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * DEADLINE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


def take(events: EventStream, count: int) -> list[Event]:
    taken: list[Event] = []
    while len(taken) < count:
        event = events.get(DEADLINE)
        assert event is not None, f"{len(taken)} of {count} events: {taken}"
        taken.append(event)
    return taken


def wait_until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        query("SELECT 1")


# -- notifications that arrive while the listening side is busy with the database -------------


@contextmanager
def slow_update_trigger(seconds: float) -> Iterator[None]:
    """Each UPDATE of an order takes its time, and then notifies ``touched`` with its key."""
    query_without_rows(
        f"""
        CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep({seconds});
            PERFORM pg_notify('touched', NEW.id::text);
            RETURN NULL;
        END $$;
        CREATE TRIGGER touched AFTER UPDATE ON testapp_order
            FOR EACH ROW EXECUTE FUNCTION touched();
        """
    )
    try:
        yield
    finally:
        query_without_rows("DROP FUNCTION touched() CASCADE")


def query_without_rows(statement: str) -> None:
    with connections["default"].cursor() as cursor:
        cursor.execute(statement)


async def test_what_arrives_during_a_statement_of_the_listening_connection_waits_for_no_other() -> (
    None
):
    """The last one arrives with the answer itself: no further notification would wake anybody."""
    sink = Sink()
    listener = Listener("default", ["jobs"], sink)
    async with client() as other, running(listener):
        await sink.until("established")
        for number in range(5):
            statement = asyncio.create_task(
                listener._open().execute(b"SELECT pg_sleep(0.1)", timeout=DEADLINE)
            )
            await anotify(other, "jobs", f"{number} a", f"{number} b")
            await statement
            await sink.until("heard", 2 * number + 2)
    assert sink.of("heard") == [f"{number} {half}" for number in range(5) for half in "ab"]
    assert sink.kinds.count("established") == 1


def test_what_arrives_while_the_listener_proves_itself_all_the_time_is_delivered(
    settings: Settings,
) -> None:
    """A statement of the listener's own is always in flight, or has just been answered."""
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.001
    heard = Recorder()
    receiver("jobs")(heard)
    with running_listener():
        for number in range(300):
            publish("jobs", number)
            heard.wait_for(number + 1)  # each by itself: nothing comes after it
    assert heard.data == list(range(300))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_receiver_that_updates_the_table_it_hears_of_hears_of_all_its_own_updates(
    kind: str,
) -> None:
    touched = Recorder()
    changed = Recorder()

    def work(event: Event) -> None:
        # A statement, and a commit: during both, others' notifications and our own arrive.
        with transaction.atomic():
            order = Order.objects.select_for_update().get(pk=event.pk)
            order.status = "done"
            order.save(update_fields=["status"])

    async def awork(event: Event) -> None:
        order = await Order.objects.aget(pk=event.pk)
        order.status = "done"
        await order.asave(update_fields=["status"])

    receiver(Order, actions=["created"], concurrency=4)(work if kind == "sync" else awork)
    receiver(Order, actions=["updated"])(changed)
    receiver("touched")(touched)
    with slow_update_trigger(0.02), running_listener() as listener:
        pks = [Order.objects.create().pk for _ in range(30)]
        touched.wait_for(30)
        changed.wait_for(30)
        listener.settle()
        assert stats(listener)["failed"] == 0
        assert stats(listener)["received"] == 90
    assert sorted(touched.data) == pks
    assert sorted(event.pk for event in changed.events) == pks
    assert set(Order.objects.values_list("status", flat=True)) == {"done"}


def test_a_consumer_of_a_stream_that_updates_the_table_misses_none_of_its_own_updates() -> None:
    with slow_update_trigger(0.01), subscribe(["touched", Order]) as events:
        pks = [Order.objects.create().pk for _ in range(10)]
        heard: list[Event] = []
        while len(heard) < 40:
            [event] = take(events, 1)
            heard.append(event)
            if event.action == "created":
                Order.objects.filter(pk=event.pk).update(note="bulk")  # the trigger notifies
                order = Order.objects.get(pk=event.pk)
                order.status = "seen"
                order.save(update_fields=["status"])  # the trigger, and we
    touched = [event.data for event in heard if event.topic == "touched"]
    assert sorted(touched) == sorted(pks * 2)
    for action in ("created", "updated"):
        assert [event.pk for event in heard if event.action == action] == pks


def test_a_long_transaction_of_a_receiver_does_not_hold_up_the_reader() -> None:
    """It is on a connection of its own: neither the listener nor the server's queue waits."""
    heard = Recorder()
    receiver("other")(heard)
    with Gate() as gate:

        @receiver("jobs")
        def work(event: Event) -> None:
            with transaction.atomic():
                Order.objects.count()
                gate.pass_through()

        with running_listener() as listener:
            publish("jobs")
            gate.wait_for(1)
            for number in range(50):
                publish("other", number)
                heard.wait_for(number + 1)
            [(state, xact)] = query(
                "SELECT state, xact_start FROM pg_stat_activity WHERE pid = %s",
                listener.backend_pid,
            )
            gate.open()
    assert heard.data == list(range(50))
    assert (state, xact) == ("idle", None)


# -- apps that answer each other --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_two_apps_that_answer_each_other_get_to_the_end(kind: str) -> None:
    turns = 200
    work_a, work_b = Recorder(), Recorder()

    def answer(recorder: Recorder, topic: str) -> Callable[[Event], Any]:
        def reply(event: Event) -> None:
            recorder(event)
            if event.data < turns:
                publish(topic, event.data + 1)

        async def areply(event: Event) -> None:
            await asyncio.to_thread(_closing, reply, event)

        return reply if kind == "sync" else areply

    receiver("workA", dispatch_uid="A")(answer(work_a, "workB"))
    receiver("workB", dispatch_uid="B")(answer(work_b, "workA"))
    with running_listener(["workA"]), running_listener(["workB"]):
        assert len(backends_of_listeners()) == 2
        publish("workA", 0)
        work_a.wait_for(turns // 2 + 1)
    assert work_a.data == list(range(0, turns + 1, 2))
    assert work_b.data == list(range(1, turns, 2))


def _closing(func: Callable[[Event], None], event: Event) -> None:
    try:
        func(event)
    finally:
        connections.close_all()


def test_two_apps_that_answer_each_other_over_streams_get_to_the_end() -> None:
    """Each publishes on what the other subscribed to, from many conversations at once."""

    def converse(number: int) -> int:
        mine, theirs = f"work{number}", f"work{number ^ 1}"
        with subscribe(mine) as events:
            ready.wait(DEADLINE)
            if number % 2 == 0:
                publish(theirs, 0)
            while True:
                [event] = take(events, 1)
                if event.data >= 40:
                    publish(theirs, event.data + 1)
                    return int(event.data)
                publish(theirs, event.data + 1)

    ready = threading.Barrier(6)
    assert in_threads(6, converse) == [41, 40] * 3


# -- several at once --------------------------------------------------------------------------


def test_what_one_transaction_says_arrives_together_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[list[Any]] = []
    heard = Recorder()
    receiver("jobs")(heard)
    with hearing("jobs") as ear, running_listener() as listener:
        assert listener.service is not None
        dispatcher = listener.service.dispatcher
        original = dispatcher.dispatch

        def dispatch(events: Sequence[Event], *args: Any) -> None:
            batches.append([event.data for event in events])
            original(events, *args)

        monkeypatch.setattr(dispatcher, "dispatch", dispatch)
        with transaction.atomic():
            for number in range(40):
                publish("jobs", number)
        listener.wait_for(40)
        assert len(ear.frames()) == 1
    assert batches == [list(range(40))]
    assert heard.data == list(range(40))


def test_several_notifications_of_one_transaction_wake_the_listener_once_and_none_is_left() -> None:
    """As another program sends them: each its own NOTIFY, all of them in one commit."""
    heard = Recorder()
    receiver("jobs")(heard)
    with running_listener():
        for burst in range(20):
            notify("jobs", *(f"job {burst} {number}" for number in range(10)))
            heard.wait_for(10 * (burst + 1))
    assert heard.data == [f"job {burst} {number}" for burst in range(20) for number in range(10)]


def test_transactions_of_many_sessions_arrive_each_in_one_piece_and_in_its_own_order() -> None:
    heard = Recorder()
    receiver("jobs")(heard)

    def work(thread: int) -> None:
        for turn in range(10):
            with transaction.atomic():
                for number in range(5):
                    publish("jobs", [thread, turn, number])

    with running_listener() as listener:
        in_threads(4, work)
        listener.wait_for(200)
    pieces = [heard.data[start : start + 5] for start in range(0, 200, 5)]
    assert all(piece == [[*piece[0][:2], number] for number in range(5)] for piece in pieces)
    for thread in range(4):
        assert [piece[0][1] for piece in pieces if piece[0][0] == thread] == list(range(10))


# -- LISTEN and UNLISTEN ----------------------------------------------------------------------


def test_many_components_on_one_topic_are_one_listen_and_the_last_to_leave_one_unlisten(
    statements: list[str],
) -> None:
    barrier = threading.Barrier(16)

    def component(number: int) -> list[Any]:
        with subscribe("shared") as events:
            if barrier.wait(DEADLINE) == 0:
                publish("shared", "to all")
            heard = [event.data for event in take(events, 1)]
            barrier.wait(DEADLINE)
            return heard

    with subscribe("other"):
        assert in_threads(16, component) == [["to all"]] * 16
        wait_until(lambda: "UNLISTEN shared" in statements, "the topic of nobody is left")
    assert [said for said in statements if said.endswith(" shared")] == [
        "LISTEN shared",
        "UNLISTEN shared",
    ]


def test_many_receivers_of_one_topic_are_one_listen_on_one_connection(
    statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Caches, which other tests of this process may have used, would have all models listened to.
    monkeypatch.setattr(use, "_declared", False)
    monkeypatch.setattr(use, "_looked_at", float("-inf"))
    recorders = [Recorder() for _ in range(20)]
    for number, recorder in enumerate(recorders):
        receiver(["shared", f"own{number}"], dispatch_uid=str(number))(recorder)
    with running_listener() as listener:
        assert len(backends_of_listeners()) == 1
        publish("shared", "to all")
        listener.wait_for(1)
    assert all(recorder.data == ["to all"] for recorder in recorders)
    assert statements.count("LISTEN shared") == 1
    assert len(statements) == 21


def test_listen_and_unlisten_in_any_order_and_from_many_threads_end_in_what_is_wanted(
    settings: Settings,
) -> None:
    """Whoever has entered hears; and at the end the server listens to what is left, no more."""
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.02

    def churn(thread: int) -> int:
        missed = 0
        for turn in range(20):
            topics = [f"t{(thread + turn) % 4}", f"t{(thread * turn) % 4}", f"own{thread}"]
            with subscribe(topics, max_waiting=100_000) as events:
                mark = [thread, turn]
                for topic in set(topics):
                    publish(topic, mark)
                found = 0
                while found < len(set(topics)):
                    event = events.get(DEADLINE)
                    if event is None:
                        missed += 1
                        break
                    found += event.data == mark
        return missed

    with subscribe("stays") as stays:
        assert in_threads(6, churn) == [0] * 6
        listener = background_listener("default")._listener
        assert listener is not None

        def left() -> set[str]:
            listening = listener._server_listens
            assert listening is not None
            return {channel for channel in listening if not channel.startswith("pgnotify.")}

        wait_until(lambda: left() == {"stays"}, "the server listens to what is wanted")
        publish("stays", "still heard")
        assert [event.data for event in take(stays, 1)] == ["still heard"]
        assert stays.stats["gaps"] == 0


def test_a_topic_taken_again_while_it_is_about_to_be_left_is_heard_from_the_moment_it_is_promised(
    statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, go_on = threading.Event(), threading.Event()
    original = ListenConnection.listen

    async def listen(self: ListenConnection, channels: Sequence[str], *, timeout: float) -> None:
        await original(self, channels, timeout=timeout)
        if "comes" in channels:
            listening.set()
            await asyncio.to_thread(go_on.wait, DEADLINE)

    monkeypatch.setattr(ListenConnection, "listen", listen)
    heard: list[str] = []
    arrived = threading.Event()

    def hear(notifications: Sequence[Notification]) -> None:
        heard.extend(notification.payload.decode() for notification in notifications)
        arrived.set()

    background = background_listener("default")
    leaves = background.subscribe("flaps", lambda notifications: None)
    leaves.established.result(DEADLINE)
    loop = background._loop
    assert loop is not None

    async def one_leaves_and_another_comes() -> None:
        leaves.close()
        background.subscribe("comes", lambda notifications: None)

    asyncio.run_coroutine_threadsafe(one_leaves_and_another_comes(), loop).result(DEADLINE)
    assert listening.wait(DEADLINE)
    # The listener is in the middle of LISTEN comes, with UNLISTEN flaps to follow.
    back = background.subscribe("flaps", hear)
    said_when_promised: list[int] = []
    back.established.add_done_callback(lambda _: said_when_promised.append(len(statements)))
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(DEADLINE)
    go_on.set()
    back.established.result(DEADLINE)
    # One statement follows the other, so whatever was to follow has followed now.
    background.subscribe("last", lambda notifications: None).established.result(DEADLINE)
    assert "UNLISTEN flaps" not in statements[said_when_promised[0] :]
    notify("flaps", "right after")
    assert arrived.wait(DEADLINE)
    assert heard == ["right after"]


# -- many at once, and failures ---------------------------------------------------------------


class AsyncGate(Gate):
    """A gate whose visitors wait on the loop: as many as come, without a thread each."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[asyncio.Future[None]] = []

    async def apass_through(self, event: Event | None = None) -> None:
        waiter = asyncio.get_running_loop().create_future()
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            if self._open:
                waiter.set_result(None)
            else:
                self._waiting.append(waiter)
        await waiter
        with self._changed:
            self.inside -= 1

    def open(self) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, []
        super().open()
        for waiter in waiting:
            waiter.get_loop().call_soon_threadsafe(waiter.set_result, None)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_ten_at_once_and_no_eleventh_however_slow_they_are(kind: str, settings: Settings) -> None:
    settings.PGNOTIFY_CONCURRENCY = 10
    done = Recorder()
    with AsyncGate() as gate, failures() as failed:

        def finish(event: Event) -> None:
            if event.data % 7 == 3:
                raise RuntimeError(f"job {event.data}")
            done(event)

        def work(event: Event) -> None:
            gate.pass_through()
            finish(event)

        async def awork(event: Event) -> None:
            await gate.apass_through()
            finish(event)

        receiver("jobs", concurrency=20)(work if kind == "sync" else awork)
        with running_listener() as listener:
            with transaction.atomic():
                for number in range(25):
                    publish("jobs", number)
            gate.wait_for(10)
            # All have arrived, and the loop has looked at what to do with them.
            wait_until(lambda: stats(listener)["received"] == 25, "25 received")
            listener._on_loop(asyncio.sleep(0), DEADLINE)
            assert gate.inside == 10
            gate.open()
            listener.wait_for(25)
            assert stats(listener)["handled"] == 21
            assert stats(listener)["failed"] == 4
    assert gate.most == 10
    assert sorted(done.data) == [number for number in range(25) if number % 7 != 3]
    assert {str(told["exception"]) for told in failed} == {"job 3", "job 10", "job 17", "job 24"}
    assert [told["will_retry"] for told in failed] == [False] * 4


def test_a_graceful_stop_finishes_all_ten_that_run_and_takes_on_nothing_new(
    settings: Settings,
) -> None:
    settings.PGNOTIFY_CONCURRENCY = 10
    done = Recorder()
    with Gate() as gate:

        @receiver("jobs", concurrency=10)
        def work(event: Event) -> None:
            gate.pass_through()
            done(event)

        with running_listener() as listener:
            for number in range(10):
                publish("jobs", number)
            gate.wait_for(10)
            service = listener.service
            assert service is not None
            assert listener._loop is not None
            listener._loop.call_soon_threadsafe(service.stop)
            wait_until(lambda: backends_of_listeners() == [], "the connection is closed first")
            publish("jobs", "too late")
            assert listener._thread.is_alive()
            gate.open()
        assert service.stats["dropped"] == 0
        assert service.stats["handled"] == 10
    assert sorted(done.data) == list(range(10))
