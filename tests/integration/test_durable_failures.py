"""When a durable consumer fails: retries, dead letters, transactions, and keys that go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, ProgrammingError, connection, connections, transaction
from django.utils import timezone

from django_pgnotify import Event, Topic, consumers, publish, publish_many
from django_pgnotify.backoff import Backoff
from django_pgnotify.conf import conf
from django_pgnotify.durable import worker
from django_pgnotify.durable.state import ConsumerState, CursorLost
from django_pgnotify.models import Consumer, LoggedEvent
from django_pgnotify.registry import Receiver, Registry, Subscription, registry
from django_pgnotify.stats import Stats
from django_pgnotify.testing import running_listener
from tests.integration.durable import (
    LEDGER,
    Picky,
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
    alias_at,
    failures,
    query,
    stats,
)
from tests.integration.redirecting import new_connections
from tests.proxy import TCPProxy
from tests.testapp.models import Order, Sku, Tag

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _registry(settings: Any) -> Iterator[Registry]:
    settings.PGNOTIFY_LEADER_POLL_INTERVAL = 0.05
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RETRY_BASE", 0.01)


# -- retries and dead letters -------------------------------------------------------------------


def test_an_event_that_fails_becomes_a_dead_letter_and_holds_nobody_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    picky = Picky([2])
    consume(picky)
    with running_listener(), failures() as told:
        publish_many(LEDGER, [1, 2, 3], key="same")
        picky.wait_for(2)
        until(lambda: stored().handled == 2)
    assert picky.data == [1, 3]
    [letter] = letters()
    assert (letter.attempts, letter.retry_at, letter.key) == (1, None, "same")
    assert "ValueError: cannot take 2" in letter.error
    assert "Traceback" in letter.error
    [failure] = told
    assert (failure["attempt"], failure["will_retry"]) == (1, False)
    assert failure["event"].data == 2
    assert stored().handled == 2
    assert f"Consumer ledger failed on event {failure['event'].id}" in caplog.text


@pytest.mark.usefixtures("_soon")
def test_retries_are_used_up_before_an_event_is_given_up() -> None:
    picky = Picky(["bad"])
    consume(picky, retries=3)
    with running_listener() as listener, failures() as told:
        publish(LEDGER, "bad", key="k")
        picky.attempts.wait_for(4)
        publish(LEDGER, "good", key="k")
        picky.wait_for(1)
        assert stats(listener)["failed"] == 1
    assert [failure["attempt"] for failure in told] == [1, 2, 3, 4]
    assert [failure["will_retry"] for failure in told] == [True, True, True, False]
    [letter] = letters()
    assert (letter.attempts, letter.retry_at) == (4, None)


@pytest.mark.usefixtures("_soon")
def test_while_an_event_waits_its_key_waits_in_order_and_other_keys_go_on() -> None:
    picky = Picky([1])
    consume(picky, retries=1000)
    with running_listener():
        publish_many(LEDGER, [1, 2, 3], key="a")
        publish_many(LEDGER, [10, 20, 30], key="b")
        picky.wait_for(3)
        assert picky.data == [10, 20, 30]
        publish(LEDGER, 4, key="a")
        publish(LEDGER, 40, key="b")
        picky.wait_for(4)
        picky.bad.clear()
        picky.wait_for(8)
        assert [event.data for event in picky.events if event.key == "a"] == [1, 2, 3, 4]
        publish(LEDGER, 5, key="a")
        picky.wait_for(9)
    assert letters() == []
    assert picky.data[-1] == 5


@pytest.mark.usefixtures("_soon")
def test_what_waits_to_be_tried_again_survives_the_process() -> None:
    picky = Picky([1])
    consume(picky, retries=1_000_000)
    with running_listener():
        publish_many(LEDGER, [1, 2], key="a")
        picky.attempts.wait_for(2)
    assert [letter.retry_at is None for letter in letters()] == [False, False]
    picky.bad.clear()
    with running_listener():
        picky.wait_for(2)
    assert picky.data == [1, 2]
    assert letters() == []


def test_pauses_between_retries_grow_with_jitter_up_to_a_limit() -> None:
    assert all(0 <= worker.retry_pause(1) <= 0.5 for _ in range(50))
    assert all(0 <= worker.retry_pause(100) <= 300 for _ in range(50))
    assert max(worker.retry_pause(8) for _ in range(200)) > 10
    assert len({worker.retry_pause(5) for _ in range(50)}) > 40


def test_requeued_letters_are_tried_again_and_discarded_ones_are_gone() -> None:
    picky = Picky([1, 2, 3])
    consume(picky)
    with running_listener():
        publish_many(LEDGER, [1, 2, 3])
        publish(LEDGER, "end")
        until(lambda: stored().handled == 1)
        picky.bad.remove(1)
        first = consumers.dead_letters("ledger").filter(body__contains='"data":1')
        assert consumers.requeue(first) == 1
        picky.wait_for(2)
        assert picky.data == ["end", 1]
    assert consumers.discard(consumers.dead_letters()) == 2
    assert letters() == []


def test_an_event_that_is_none_becomes_a_dead_letter_and_the_next_is_handled() -> None:
    heard = Recorder()
    consume(heard)
    with running_listener(), other_session() as other:
        for body in ("no json", '{"model": "no.such", "pk": 1, "action": "created"}'):
            other.execute(
                "INSERT INTO pgnotify_event_log (topic, source, body)"
                " VALUES ('ledger', 'psql', %s)",
                [body],
            )
        write(other, '"good"')
        other.commit()
        wake()
        heard.wait_for(1)
    assert heard.data == ["good"]
    assert [letter.retry_at for letter in letters()] == [None, None]
    assert "model that does not exist" in letters()[1].error


@pytest.mark.usefixtures("_soon")
def test_what_postgresql_cannot_store_of_a_failure_does_not_stop_the_consumer() -> None:
    heard = Recorder()

    def work(event: Event) -> None:
        if event.data == "bad" and len(heard.events) < 1:
            raise ValueError("NUL \x00 and a surrogate \ud800")
        heard(event)

    consume(work, retries=1_000_000)
    with running_listener():
        publish_many(LEDGER, ["bad", "behind"], key="a\x00b")
        until(lambda: len(letters()) == 2)
        assert "NUL \ufffd and" in letters()[0].error
        publish(LEDGER, "other", key="c")
        heard.wait_for(3)
    assert heard.data == ["other", "bad", "behind"]
    assert [event.key for event in heard.events] == ["c", "a\x00b", "a\x00b"]


def test_a_receiver_that_exits_is_a_receiver_that_failed() -> None:
    heard = Recorder()

    def leave(event: Event) -> None:
        if event.data == "exit":
            raise SystemExit(3)
        heard(event)

    consume(leave)
    with running_listener():
        publish_many(LEDGER, ["exit", "stay"])
        heard.wait_for(1)
    assert "SystemExit" in letters()[0].error


def test_an_async_receiver_that_takes_too_long_or_is_cancelled_has_failed() -> None:
    heard = Recorder()

    async def slow(event: Event) -> None:
        if event.data == "slow":
            await asyncio.Event().wait()  # for ever
        if event.data == "cancelled":
            raise asyncio.CancelledError
        heard(event)

    consume(slow, timeout=0.05)
    with running_listener():
        publish_many(LEDGER, ["slow", "cancelled", "quick"])
        heard.wait_for(1)
    assert [letter.error.strip().splitlines()[-1] for letter in letters()] == [
        "TimeoutError: timed out after 0.05 s",
        "asyncio.exceptions.CancelledError",
    ]


@pytest.fixture
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is due at once, and the log has a turn of one event."""
    monkeypatch.setattr(worker, "RETRY_BASE", 0.0)
    monkeypatch.setattr(worker, "SLICE", 0.0)


@pytest.mark.usefixtures("_short_turns")
@pytest.mark.parametrize("transactional", [False, True])
def test_what_is_to_be_tried_again_does_not_wait_for_the_end_of_a_backlog(
    transactional: bool,
) -> None:
    heard = Recorder()
    # Of a batch, the one that fails is handled once more, alone, before it has failed.
    bad = [3, 1050] * (2 if transactional else 1)

    def work(event: Event) -> None:
        if event.data in bad:
            bad.remove(event.data)
            raise ValueError
        heard(event)

    consume(work, transactional=transactional, retries=1)
    register()
    publish_many(LEDGER, range(1100))
    with running_listener():
        _until_handled(1100)
    assert list(dict.fromkeys(heard.data)) == list(range(1100))
    assert transactional or len(heard.data) == 1100
    assert letters() == []


def test_more_letters_than_are_read_at_once_are_tried_again_in_one_turn(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.PGNOTIFY_SWEEP_INTERVAL = 1000.0
    looks, look = Recorder(), ConsumerState.control

    def note(self: ConsumerState) -> Any:
        looks(self)  # type: ignore[arg-type]
        return look(self)

    monkeypatch.setattr("django_pgnotify.durable.letters.LETTERS_AT_ONCE", 3)
    heard = Recorder()
    publish_many(LEDGER, range(20), key="k")
    with _running_worker(Receiver("ledger", heard, (LEDGER,), start="beginning")) as one:
        heard.wait_for(20)
        _until_handled(20)
        monkeypatch.setattr(worker, "SLICE", DEADLINE)
        monkeypatch.setattr(ConsumerState, "control", note)
        consumers.replay("ledger", events=LoggedEvent.objects.values_list("id", flat=True))
        one.wake(asked=True)
        heard.wait_for(40)
        until(lambda: letters() == [])
    assert heard.data == [*range(20), *range(20)]
    assert len(looks.events) <= 3  # before, behind, and of the next turn


@pytest.mark.usefixtures("_short_turns")
def test_what_an_operator_wants_does_not_wait_for_the_end_of_a_backlog() -> None:
    heard = Recorder()

    def work(event: Event) -> None:
        heard(event)
        if event.data == 3:
            [first] = LoggedEvent.objects.order_by("id")[:1]
            consumers.replay("ledger", events=[first.pk])
            one.wake(asked=True)

    publish_many(LEDGER, range(10))
    with _running_worker(Receiver("ledger", work, (LEDGER,), start="beginning")) as one:
        heard.wait_for(11)
    assert heard.data == [0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9]


def test_an_operators_wake_up_is_told_from_news(monkeypatch: pytest.MonkeyPatch) -> None:
    consume(Recorder())
    with running_listener() as listener:
        assert listener.service is not None
        running = listener.service.durable._consumers
        until(lambda: running.held == ["ledger"])
        [one] = running._running()
        asked: list[bool] = []
        monkeypatch.setattr(one, "wake", lambda **options: asked.append(options["asked"]))
        running.wake(frozenset(["ledger"]))
        consumers.pause("ledger")
        until(lambda: len(asked) == 2)
    assert asked == [False, True]


class Awake(threading.Event):
    """Of a worker: notes how long it would wait at most."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        return super().wait(timeout)


@pytest.mark.usefixtures("_short_turns")
def test_a_paused_consumer_with_letters_that_are_due_does_not_look_all_the_time() -> None:
    picky = Picky([1])
    receiver = Receiver("ledger", picky, (LEDGER,), start="beginning", retries=1_000_000)
    publish(LEDGER, 1)
    with _running_worker(receiver) as one:
        picky.attempts.wait_for(2)
        consumers.pause("ledger")
        one._awake = awake = Awake()
        one.wake()
        until(lambda: conf.SWEEP_INTERVAL in awake.pauses)
        tries = len(picky.attempts.events)
        one.wake()
        until(lambda: awake.pauses.count(conf.SWEEP_INTERVAL) > 1)
        assert len(picky.attempts.events) == tries


# -- gaps ---------------------------------------------------------------------------------------


def _note_gap() -> None:
    Consumer.objects.update(gap_cause="of the test", gap_until=timezone.now())


@pytest.mark.usefixtures("_soon")
def test_a_receiver_that_fails_on_a_gap_is_told_again_until_it_has_taken_it_in() -> None:
    heard = Recorder()

    def work(event: Event) -> None:
        heard(event)
        if event.action == "gap" and len(heard.events) < 4:
            raise ValueError

    consume(work, on_gap=True, retries=1_000_000)
    register()
    _note_gap()
    with running_listener(), failures() as told:
        heard.wait_for(4)
        publish(LEDGER, 1)
        heard.wait_for(5)
        until(lambda: stored().gap_cause == "")
    assert [event.action for event in heard.events] == ["gap"] * 4 + ["published"]
    assert [(one["attempt"], one["will_retry"]) for one in told] == [(n, True) for n in (1, 2, 3)]


@pytest.mark.usefixtures("_soon")
def test_a_receiver_that_fails_on_a_gap_for_as_often_as_it_has_retries_has_been_told() -> None:
    heard = Recorder()

    def work(event: Event) -> None:
        heard(event)
        if event.action == "gap":
            raise ValueError

    consume(work, source=[LEDGER, Topic("second", "durable")], on_gap=True, retries=1)
    register()
    _note_gap()
    with running_listener(), failures() as told:
        until(lambda: stored().gap_cause == "")
    assert [event.topic for event in heard.events] == ["ledger", "second"] * 2
    assert [(one["attempt"], one["will_retry"]) for one in told] == [
        *((1, True), (1, True)),
        *((2, False), (2, False)),
    ]


# -- the database goes away -----------------------------------------------------------------------


@pytest.mark.parametrize("own", [nullcontext, transaction.atomic], ids=["autocommit", "atomic"])
def test_an_event_whose_connection_was_ended_is_handled_again_and_not_given_up(own: Any) -> None:
    heard, killed = Recorder(), Recorder()

    def work(event: Event) -> None:
        if event.data == "broken" and not killed.events:
            killed(event)
            with own():
                [(pid,)] = query("SELECT pg_backend_pid()")
                _end([pid])
                query("SELECT 1")
        heard(event)

    consume(work)
    with running_listener():
        publish_many(LEDGER, ["first", "broken", "last"])
        heard.wait_until(lambda events: any(event.data == "last" for event in events))
    assert letters() == []
    assert [data for data in heard.data if data != "first"] == ["broken", "last"]


def _end(pids: Iterable[int]) -> None:
    with other_session() as other:
        for pid in pids:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def _until_handled(count: int) -> None:
    until(lambda: stored().handled == count)


def _backend(event: Event) -> int:
    """The backend that a receiver uses; of the second database, where the event says so."""
    with connections[event.data].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize(
    ("kind", "alias", "options"),
    [
        ("sync", "default", {"concurrency": 2}),
        ("sync", "other", {}),
        ("sync", "other", {"transactional": True}),
        ("async", "default", {}),
        ("async", "default", {"concurrency": 4}),
    ],
)
def test_connections_of_receivers_that_were_ended_are_replaced_and_no_event_is_to_blame(
    kind: str, alias: str, options: dict[str, Any]
) -> None:
    heard, backends = Recorder(), set()

    def work(event: Event) -> None:
        backends.add(_backend(event))
        heard(event)

    async def awork(event: Event) -> None:
        await sync_to_async(work)(event)

    consume(work if kind == "sync" else awork, **options)
    with running_listener(), failures() as told:
        for count in (20, 40, 60):
            publish_many(LEDGER, [alias] * 20)
            _until_handled(count)
            _end(backends)
            backends.clear()
    assert told == []
    assert letters() == []
    assert len({event.id for event in heard.events}) == 60


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_receiver_that_keeps_database_errors_to_itself_gets_a_new_connection() -> None:
    backends: list[int | None] = []

    def work(event: Event) -> None:
        try:
            backends.append(_backend(event))
        except DatabaseError:
            backends.append(None)

    consume(work)
    with running_listener():
        for handled in range(1, 4):
            publish(LEDGER, "other")
            _until_handled(handled)
            if handled == 1:
                _end(filter(None, backends))
    first, second, third = backends
    assert second is None
    assert third not in (None, first)


# -- transactional --------------------------------------------------------------------------------


def test_the_work_of_a_transactional_consumer_and_its_cursor_are_one_transaction() -> None:
    def count(event: Event) -> None:
        Sku.objects.create(code=event.data)
        assert connection.in_atomic_block

    consume(count, transactional=True)
    register()
    publish_many(LEDGER, [f"sku {n}" for n in range(250)])
    done = Recorder()
    consume(done, "done")
    with running_listener():
        publish(LEDGER, "the end")
        done.wait_for(1)
        until(lambda: Sku.objects.count() == 251)
    rows = query("SELECT count(*), count(DISTINCT xmin::text) FROM testapp_sku")
    [(count_of_rows, transactions)] = rows
    assert count_of_rows == 251
    assert 3 <= transactions <= 60  # several events share one, none is torn apart


def test_what_a_transactional_consumer_did_before_it_failed_is_undone_and_the_rest_kept() -> None:
    def work(event: Event) -> None:
        Tag.objects.create(name=str(event.data))
        if event.data == 3:
            raise ValueError("after the work")

    consume(work, transactional=True)
    with running_listener(), failures() as told:
        publish_many(LEDGER, range(6))
        until(lambda: Tag.objects.count() == 5)
    assert sorted(Tag.objects.values_list("name", flat=True)) == ["0", "1", "2", "4", "5"]
    assert [failure["event"].data for failure in told] == [3]
    assert [letter.error.strip().endswith("after the work") for letter in letters()] == [True]


@pytest.mark.usefixtures("_soon")
def test_a_transactional_consumer_tries_again_and_keeps_the_order_of_the_key() -> None:
    bad = {2}

    def work(event: Event) -> None:
        Tag.objects.create(name=f"{event.key} {event.data}")
        if event.data in bad:
            raise ValueError

    consume(work, transactional=True, retries=1_000_000)
    with running_listener():
        publish_many(LEDGER, [1, 2, 3], key="a")
        publish_many(LEDGER, [4, 5], key="b")
        until(lambda: Tag.objects.filter(name="b 5").exists())
        until(lambda: len(letters()) == 2)
        bad.clear()
        until(lambda: Tag.objects.count() == 5)
    order = list(Tag.objects.order_by("id").values_list("name", flat=True))
    assert [name for name in order if name[0] == "a"] == ["a 1", "a 2", "a 3"]
    assert letters() == []


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("transactional", [False, True])
def test_an_event_that_waited_behind_another_is_not_for_a_receiver_that_excludes_it(
    settings: Any, transactional: bool
) -> None:
    settings.PGNOTIFY_DELIVERY = "durable"
    calls, bad = Recorder(), {"created"}

    def work(event: Event) -> None:
        calls(event)
        if event.action in bad:
            raise ValueError

    actions = ["created"]
    consume(work, source=Order, actions=actions, transactional=transactional, retries=1_000_000)
    with running_listener():
        order = Order.objects.create()
        until(lambda: len(letters()) == 1)
        order.save()
        until(lambda: len(letters()) == 2)  # the change of the same row, behind the failure
        bad.clear()
        until(lambda: letters() == [])
        assert consumers.replay("ledger", events=LoggedEvent.objects.values_list("id", flat=True))
        until(lambda: letters() == [])
    assert {event.action for event in calls.events} == {"created"}


def test_a_swallowed_database_error_in_a_transaction_is_a_failure_of_that_event_alone() -> None:
    def work(event: Event) -> None:
        Tag.objects.create(name=str(event.data))
        if event.data == 1:
            try:
                Tag.objects.create(name="1")
            except Exception:  # noqa: BLE001, S110 - what users do
                pass

    consume(work, transactional=True)
    with running_listener():
        publish_many(LEDGER, range(4))
        until(lambda: Tag.objects.count() == 3)
    assert [letter.body.count('"data":1') for letter in letters()] == [1]


def test_a_commit_hook_that_fails_does_not_have_its_event_handled_twice() -> None:
    calls = Recorder()

    def work(event: Event) -> None:
        calls(event)
        if event.data == 1:
            transaction.on_commit(_fail)

    consume(work, transactional=True)
    with running_listener():
        publish_many(LEDGER, range(3))
        calls.wait_until(lambda events: any(event.data == 2 for event in events))
        until(lambda: stored().handled == 3)
    assert sorted(calls.data) == [0, 1, 2]
    assert letters() == []


def _fail() -> None:
    raise RuntimeError("in a commit hook")


def test_a_deadlock_is_tried_again_at_once() -> None:
    attempts = Recorder()

    def work(event: Event) -> None:
        attempts(event)
        Tag.objects.create(name=f"{event.data} {len(attempts.events)}")
        if len(attempts.events) < 4:
            with connection.cursor() as cursor:
                cursor.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$")

    consume(work, transactional=True)
    with running_listener(), failures() as told:
        publish(LEDGER, "x")
        until(lambda: stored().handled == 1)
    assert told == []
    assert letters() == []
    assert Tag.objects.count() == 1


HELD = 471100
"""Number of an advisory lock."""


@pytest.fixture
def _commits_wait() -> Iterator[None]:
    """A COMMIT of new tags waits while somebody has the lock ``HELD``."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION wait_before_commit() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM pg_advisory_xact_lock({HELD}); RETURN NULL; END $$;"
            " CREATE CONSTRAINT TRIGGER wait_before_commit AFTER INSERT ON testapp_tag"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_before_commit()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION wait_before_commit CASCADE")


@pytest.mark.usefixtures("_commits_wait", "_soon")
@pytest.mark.parametrize("failed", [0, 1, 2], ids=["in a batch", "alone", "tried again"])
def test_a_commit_whose_answer_is_lost_has_nothing_done_twice(
    failed: int, proxy: TCPProxy, settings: Any
) -> None:
    calls = Recorder()

    def work(event: Event) -> None:
        calls(event)
        if len(calls.events) <= failed:
            raise ValueError
        Tag.objects.create(name=f"{event.data} {len(calls.events)}")

    waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
    consume(work, transactional=True, retries=1)
    with alias_at("direct") as direct, other_session() as other:
        settings.PGNOTIFY_LISTEN_DATABASE = direct
        other.execute("SELECT pg_advisory_lock(%s)", [HELD])
        with new_connections(HOST=proxy.host, PORT=str(proxy.port)), running_listener():
            publish(LEDGER, "x")
            until(lambda: len(query(waiting, HELD)) == 1)
            proxy.swallow()
            other.execute("SELECT pg_advisory_unlock(%s)", [HELD])
            until(Tag.objects.exists)
            proxy.end_swallowing(reset=True)
            publish(LEDGER, "y")
            until(Tag.objects.filter(name__startswith="y").exists)
    names = list(Tag.objects.order_by("id").values_list("name", flat=True))
    assert names == [f"x {failed + 1}", f"y {failed + 2}"]
    assert letters() == []
    assert stored().handled == 2


# -- whoever lost the consumer must not write -----------------------------------------------------


def test_a_process_that_was_replaced_cannot_move_the_cursor() -> None:
    consume(Recorder())
    register()
    old, new = ConsumerState("ledger", "default"), ConsumerState("ledger", "default")
    place = old.claim("old:1").cursor
    old.move(place, 0)
    new.claim("new:1")
    with pytest.raises(CursorLost):
        old.move(place, 0)
    with pytest.raises(CursorLost):
        old.control()
    with pytest.raises(CursorLost):
        old.settle([1])
    new.move(place, 1)
    assert stored().handled == 1
    assert stored().holder == "new:1"


def test_work_done_by_a_transactional_consumer_that_was_replaced_meanwhile_is_undone() -> None:
    with Gate() as gate:

        def work(event: Event) -> None:
            Tag.objects.create(name=f"{event.data} {gate.inside}")
            gate.pass_through()

        consume(work, transactional=True)
        with running_listener():
            publish(LEDGER, "x")
            gate.wait_for(1)
            ConsumerState("ledger", "default").claim("somebody else:1")
            gate.open()
            until(lambda: stored().handled == 1)
    assert Tag.objects.count() == 1


@contextmanager
def _running_worker(receiver: Receiver) -> Iterator[worker.Worker]:
    """A consumer's worker, without anybody who holds the lock for it."""
    loop = asyncio.new_event_loop()
    streams = [Subscription(LEDGER.name)]
    one = worker.Worker(receiver, streams, using="default", loop=loop, stats=Stats())
    one.start()
    try:
        yield one
    finally:
        one.stop()
        one.join()
        loop.close()


def test_who_was_replaced_without_noticing_ends_and_does_not_take_the_consumer_back() -> None:
    with _running_worker(Receiver("ledger", Recorder(), (LEDGER,))) as one:
        until(lambda: Consumer.objects.exclude(holder="").exists())
        ConsumerState("ledger", "default").claim("somebody else:1")
        one.wake()
        until(lambda: not one.alive)
    assert stored().holder == "somebody else:1"
    assert stored().claim == 2


def test_who_was_set_anew_by_an_operator_goes_on_from_there() -> None:
    heard = Recorder()
    with _running_worker(Receiver("ledger", heard, (LEDGER,))) as one:
        until(lambda: Consumer.objects.exclude(holder="").exists())
        publish_many(LEDGER, [1, 2])
        one.wake()
        heard.wait_for(2)
        consumers.reset("ledger", "beginning")
        one.wake()
        heard.wait_for(4)
        assert one.alive


# -- trouble ----------------------------------------------------------------------------------


class Stop(threading.Event):
    """Of a worker: notes how long it would have waited, and lets it end instead."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        self.set()
        return True


def test_news_do_not_cut_the_pause_short_while_the_database_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a consumer asks as fast as it can once it has been woken, until there is no trouble."""
    attempts = []

    def consume_in_vain(one: worker.Worker, pauses: Backoff) -> None:
        attempts.append(one)
        if len(attempts) == 10:
            one.stop()
        raise ProgrammingError("permission denied for table pgnotify_consumer")

    monkeypatch.setattr(worker.Worker, "_consume", consume_in_vain)
    loop = asyncio.new_event_loop()
    one = worker.Worker(
        Receiver("ledger", print, (LEDGER,)), [], using="default", loop=loop, stats=Stats()
    )
    one._stop = stop = Stop()
    one.wake()
    one.start()
    one.join()
    loop.close()
    assert attempts == [one]
    assert len(stop.pauses) == 1
