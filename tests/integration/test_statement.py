"""The statement that NOTIFYs: past Django's cursor or through it, it says the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DataError, Error, OperationalError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import SimpleTestCase
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_pgnotify import apublish, publish
from django_pgnotify.publishing import riding, statement
from django_pgnotify.publishing.statement import (
    FRAMES_PER_STATEMENT,
    Frame,
    commit_and_notify,
    notify,
)
from django_pgnotify.stats import publishing_stats
from tests.integration.hearing import Ear, full_queue, hearing, statements, terminate_own_backend
from tests.integration.recording import DEADLINE, query
from tests.integration.redirecting import default_reached
from tests.integration.test_probe import PGBOUNCER, start_pooler
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with hearing("jobs", "others") as one:
        yield one


class Ways:
    """Which way each statement took, and how many frames it had."""

    def __init__(self) -> None:
        self.direct: list[int] = []
        self.cursor: list[int] = []


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    taken = Ways()

    def watched(original: Callable[..., None], noted: list[int]) -> Callable[..., None]:
        def execute(frames: Sequence[Frame], connection: BaseDatabaseWrapper) -> None:
            noted.append(len(frames))
            original(frames, connection)

        return execute

    monkeypatch.setattr(statement, "_directly", watched(statement._directly, taken.direct))
    monkeypatch.setattr(
        statement, "_through_cursor", watched(statement._through_cursor, taken.cursor)
    )
    return taken


def direct(frames: Sequence[Frame]) -> None:
    notify(frames, connection)


def through_cursor(frames: Sequence[Frame]) -> None:
    with statements():
        notify(frames, connection)


both_ways = pytest.mark.parametrize("send", [direct, through_cursor], ids=["direct", "cursor"])


def heard(ear: Ear) -> list[Frame]:
    return [(one.channel, one.payload) for one in ear.frames()]


# -- the same frames -------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 200])
def test_every_frame_arrives_once_and_in_order(
    ear: Ear, ways: Ways, send: Callable[[Sequence[Frame]], None], count: int
) -> None:
    frames = [(("jobs", "others")[number % 2], f"{number}") for number in range(count)]
    send(frames)
    assert heard(ear) == frames
    assert bool(ways.direct) is (send is direct)
    assert bool(ways.cursor) is (send is through_cursor)


@both_ways
def test_many_frames_leave_in_statements_of_a_bounded_size(
    ear: Ear, ways: Ways, send: Callable[[Sequence[Frame]], None]
) -> None:
    send([("jobs", str(number)) for number in range(2 * FRAMES_PER_STATEMENT + 3)])
    assert ways.direct + ways.cursor == [FRAMES_PER_STATEMENT, FRAMES_PER_STATEMENT, 3]


@both_ways
def test_no_frame_is_no_statement(
    ear: Ear, ways: Ways, send: Callable[[Sequence[Frame]], None]
) -> None:
    send([])
    assert heard(ear) == []
    assert ways.direct == ways.cursor == []


@both_ways
@pytest.mark.parametrize(
    "payload",
    [
        "",
        "é☃\U0001f600",
        "quo'te and \"double\" and ''two''",
        "back\\slash \\n \\\\ \\'",
        "100 % sure: %s %(name)s %%",
        "$1 $2 $$ $tag$",
        "line\nbreak\r\n\ttab\x01\x7f",
        "'; DROP TABLE testapp_order; --",
        "\ufeff\u2028\u200b",
        "x" * 7999,
        "é" * 3999 + "x",
        "\U0001f600" * 1999 + "é'\\"[:2],
        "'" * 7999,
        "\\" * 7999,
    ],
    ids=lambda payload: repr(payload)[:24],
)
def test_a_payload_arrives_to_the_letter(
    ear: Ear, send: Callable[[Sequence[Frame]], None], payload: str
) -> None:
    assert len(payload.encode()) <= 7999
    send([("jobs", payload)])
    assert heard(ear) == [("jobs", payload)]


@both_ways
@pytest.mark.parametrize("channel", ["Ünï ☃", "quo\"te's", "back\\slash", "%s", "$1", "x" * 63])
def test_a_channel_is_named_to_the_letter(
    send: Callable[[Sequence[Frame]], None], channel: str
) -> None:
    with hearing(channel) as ear:
        send([(channel, "1")])
        assert heard(ear) == [(channel, "1")]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["jobs", "others"]),
            st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])),
        ),
        max_size=80,
        unique=True,  # PostgreSQL folds equal ones of one transaction
    )
)
def test_whatever_the_frames_both_ways_say_the_same(ear: Ear, frames: list[Frame]) -> None:
    direct(frames)
    past_the_cursor = heard(ear)
    through_cursor(frames)
    assert past_the_cursor == heard(ear) == frames


@both_ways
def test_what_is_equal_in_one_statement_is_folded_by_the_server(
    ear: Ear, send: Callable[[Sequence[Frame]], None]
) -> None:
    send([("jobs", "same"), ("jobs", "same"), ("others", "same")])
    assert heard(ear) == [("jobs", "same"), ("others", "same")]


@pytest.mark.parametrize("name", ["LATIN1", "UTF8"])
def test_a_connection_with_an_encoding_of_its_own_still_sends_every_letter(
    ear: Ear, name: str
) -> None:
    options = {**connection.settings_dict["OPTIONS"], "client_encoding": name}
    with default_reached(OPTIONS=options):
        publish("jobs", "é ÿ")
    assert ear.data() == ["é ÿ"]


def test_an_encoding_set_by_hand_still_sends_every_letter(ear: Ear) -> None:
    with default_reached():
        with connection.cursor() as cursor:
            cursor.execute("SET client_encoding TO 'LATIN1'")
        publish("jobs", "é ÿ")
    assert ear.data() == ["é ÿ"]


# -- which way -------------------------------------------------------------------------------


def test_with_nobody_looking_it_goes_past_the_cursor(ear: Ear, ways: Ways) -> None:
    publish("jobs", 1)
    assert (ways.direct, ways.cursor) == ([1], [])
    assert ear.data() == [1]


def test_after_a_commit_it_goes_past_the_cursor(ear: Ear, ways: Ways) -> None:
    with transaction.atomic():
        publish("jobs", 1)
        publish("jobs", 2)
    assert (ways.direct, ways.cursor) == ([1], [])
    assert ear.data() == [1, 2]


def test_on_a_connection_that_is_not_open_yet_it_goes_past_the_cursor(ear: Ear, ways: Ways) -> None:
    connection.close()
    publish("jobs", 1)
    assert (ways.direct, ways.cursor) == ([1], [])
    assert ear.data() == [1]


def test_in_an_atomic_block_it_goes_through_the_cursor_and_with_the_transaction(
    ear: Ear, ways: Ways
) -> None:
    with transaction.atomic():
        publish("jobs", 1, delivery="atomic")
        assert ear.events() == []
    assert (ways.direct, ways.cursor) == ([], [1])
    assert ear.data() == [1]


def test_without_autocommit_it_goes_through_the_cursor_and_with_the_commit_by_hand(
    ear: Ear, ways: Ways
) -> None:
    transaction.set_autocommit(False)
    try:
        publish("jobs", 1)
        assert ear.events() == []
        transaction.commit()
        publish("jobs", 2)
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    assert (ways.direct, ways.cursor) == ([], [1, 1])
    assert ear.data() == [1]


@pytest.mark.parametrize(("end", "arrive"), [("COMMIT", [1]), ("ROLLBACK", [])])
def test_a_transaction_begun_by_a_statement_is_joined(
    ear: Ear, ways: Ways, end: str, arrive: list[int]
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        publish("jobs", 1)
        assert ear.events() == []
        cursor.execute(end)
    assert (ways.direct, ways.cursor) == ([], [1])
    assert ear.data() == arrive
    publish("jobs", 2)
    assert ways.direct == [1]
    assert ear.data() == [2]


def test_a_transaction_of_psycopg_s_own_is_joined(ear: Ear, ways: Ways) -> None:
    connection.ensure_connection()
    raw: Any = connection.connection
    with raw.transaction():
        publish("jobs", 1)
        assert ear.events() == []
    assert (ways.direct, ways.cursor) == ([], [1])
    assert ear.data() == [1]


@pytest.mark.parametrize("in_transaction", [False, True])
def test_a_pipeline_of_psycopg_s_own_is_joined(ear: Ear, in_transaction: bool) -> None:
    """In one, no result comes before it is asked for: who waits for it waits for ever."""
    failed = publishing_stats["publish_failed"]
    backends: list[int] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            connection.ensure_connection()
            raw: Any = connection.connection
            backends.append(raw.info.backend_pid)
            with raw.pipeline(), transaction.atomic() if in_transaction else nullcontext():
                Order.objects.exists()
                publish("jobs", 1)
                publish("jobs", 2)
        except Exception as exc:  # noqa: BLE001 - told to the test, which fails
            errors.append(exc)
        finally:
            connection.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if thread.is_alive():
        ear.execute("SELECT pg_terminate_backend(%s, 10000)", *backends)
        thread.join(DEADLINE)
        pytest.fail("it waits for a result that nothing asked for")
    assert errors == []
    assert publishing_stats["publish_failed"] == failed
    assert ear.data() == [1, 2]


def test_an_execute_wrapper_sees_every_notify(ear: Ear, ways: Ways) -> None:
    seen: list[str] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(wrapper):
        publish("jobs", 1)
        with transaction.atomic():
            publish("jobs", 2)
    publish("jobs", 3)
    assert (ways.direct, ways.cursor) == ([1], [1, 1])
    assert len([sql for sql in seen if "pg_notify(" in sql]) == 2
    assert ear.data() == [1, 2, 3]


def test_an_execute_wrapper_that_refuses_is_obeyed(ear: Ear) -> None:
    def refuse(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        raise Error("no queries here")

    with connection.execute_wrapper(refuse), pytest.raises(Error, match="no queries here"):
        notify([("jobs", "1")], connection)
    assert heard(ear) == []


def test_captured_queries_hold_every_notify_with_its_parameters(ear: Ear, ways: Ways) -> None:
    with CaptureQueriesContext(connection) as captured:
        publish("jobs", "é'")
        publish("others", 2)
    publish("jobs", 3)
    notifies = [one["sql"] for one in captured if "pg_notify(" in one["sql"]]
    assert len(notifies) == len(captured) == 2
    assert "jobs" in notifies[0]
    assert "others" in notifies[1]
    assert (ways.direct, ways.cursor) == ([1], [1, 1])
    assert ear.data() == ["é'", 2, 3]


def test_with_debug_every_notify_is_in_the_log_of_queries(
    ear: Ear, ways: Ways, settings: Any
) -> None:
    settings.DEBUG = True
    connection.queries_log.clear()
    publish("jobs", 1)
    assert (ways.direct, ways.cursor) == ([], [1])
    assert len([one for one in connection.queries if "pg_notify(" in one["sql"]]) == 1
    assert ear.data() == [1]


def test_where_a_test_case_forbids_queries_none_is_made_past_it(ear: Ear) -> None:
    """Django's test cases forbid by replacing ``connection.cursor``, open connection or not."""

    class Forbidding(SimpleTestCase):
        pass

    connection.ensure_connection()
    Forbidding.setUpClass()
    try:
        with pytest.raises(AssertionError, match="Database queries"):
            notify([("jobs", "1")], connection)
    finally:
        Forbidding.doClassCleanups()
    assert heard(ear) == []


# -- failures --------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    ("frame", "says"),
    [(("jobs", "x" * 8000), "payload string too long"), (("x" * 64, ""), "channel name too long")],
)
def test_what_the_server_refuses_is_django_s_error_and_the_connection_goes_on(
    ear: Ear, send: Callable[[Sequence[Frame]], None], frame: Frame, says: str
) -> None:
    kinds = []
    for _ in range(2):
        with pytest.raises(Error, match=says) as caught:
            send([frame])
        kinds.append(type(caught.value))
        assert isinstance(caught.value.__cause__, psycopg.Error)
        assert caught.value.__cause__.sqlstate == "22023"  # invalid_parameter_value
    assert kinds == [DataError, DataError]
    send([("jobs", "next")])
    assert heard(ear) == [("jobs", "next")]


@both_ways
@pytest.mark.parametrize("at", ["the call", "the commit"])
def test_a_full_queue_is_django_s_error_and_the_connection_goes_on(
    ear: Ear, send: Callable[[Sequence[Frame]], None], at: Literal["the call", "the commit"]
) -> None:
    with full_queue(at):
        for _ in range(2):
            with pytest.raises(Error, match="too many notifications") as caught:
                send([("jobs", "lost"), ("jobs", "lost too")])
            assert isinstance(caught.value.__cause__, psycopg.Error)
        assert query("SELECT %s::int", 7) == [(7,)]
    send([("jobs", "next")])
    assert heard(ear) == [("jobs", "next")]


@both_ways
def test_a_statement_is_refused_whole(ear: Ear, send: Callable[[Sequence[Frame]], None]) -> None:
    with pytest.raises(DataError):
        send([("jobs", "good"), ("jobs", "x" * 8000), ("jobs", "good too")])
    assert heard(ear) == []


@both_ways
def test_an_error_says_nothing_of_the_payload(send: Callable[[Sequence[Frame]], None]) -> None:
    with pytest.raises(DataError) as caught:
        send([("jobs", "s3cret" + "x" * 8000)])
    assert "s3cret" not in str(caught.value)


@both_ways
def test_a_terminated_backend_is_django_s_error_and_a_fresh_connection_sends_on(
    ear: Ear, send: Callable[[Sequence[Frame]], None]
) -> None:
    send([("jobs", "before")])
    terminate_own_backend()
    with pytest.raises(OperationalError) as caught:
        send([("jobs", "lost")])
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert connection.errors_occurred
    connection.close_if_unusable_or_obsolete()  # as at the end of a request
    assert connection.connection is None
    send([("jobs", "after")])
    assert heard(ear) == [("jobs", "before"), ("jobs", "after")]


def test_a_statement_of_the_connection_after_a_refused_notify_is_answered_with_its_own_answer(
    ear: Ear,
) -> None:
    for number in range(5):
        with pytest.raises(DataError):
            direct([("jobs", "x" * 8000)])
        assert query("SELECT %s::int", number) == [(number,)]


def test_a_connection_that_cannot_be_made_is_django_s_error() -> None:
    with default_reached(HOST="127.0.0.1", PORT="1"), pytest.raises(OperationalError):
        notify([("jobs", "1")], connection)


def test_a_connection_s_health_is_checked_where_django_is_told_to(ear: Ear, ways: Ways) -> None:
    with default_reached(CONN_HEALTH_CHECKS=True, CONN_MAX_AGE=None):
        publish("jobs", 1)
        terminate_own_backend()
        connection.close_if_unusable_or_obsolete()  # as at the beginning of a request
        publish("jobs", 2)
    assert len(ways.direct) == 2
    assert ear.data() == [1, 2]


def test_without_health_checks_a_dead_connection_costs_the_event_and_is_counted(
    ear: Ear,
) -> None:
    failed = publishing_stats["publish_failed"]
    with default_reached(CONN_HEALTH_CHECKS=False, CONN_MAX_AGE=None):
        publish("jobs", 1)
        terminate_own_backend()
        connection.close_if_unusable_or_obsolete()
        publish("jobs", 2)
    assert publishing_stats["publish_failed"] == failed + 1
    assert ear.data() == [1]


# -- threads and loops -----------------------------------------------------------------------


@both_ways
def test_another_thread_s_connection_is_refused_as_django_refuses_it(
    ear: Ear, send: Callable[[Sequence[Frame]], None]
) -> None:
    connection.ensure_connection()
    theirs = connections["default"]
    refused: list[BaseException] = []

    def work() -> None:
        for attempt in (lambda: notify([("jobs", "1")], theirs), theirs.cursor):
            try:
                attempt()
            except Error as exc:
                refused.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE)
    ours, django_s = refused
    assert type(ours) is type(django_s)
    assert str(ours) == str(django_s)
    assert heard(ear) == []


def test_a_connection_shared_with_a_thread_sends_for_it(ear: Ear) -> None:
    connection.ensure_connection()
    theirs = connections["default"]
    theirs.inc_thread_sharing()
    try:
        threads = [
            threading.Thread(target=notify, args=([("jobs", f"{number}.{turn}")], theirs))
            for number in range(4)
            for turn in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    finally:
        theirs.dec_thread_sharing()
    assert sorted(payload for _, payload in heard(ear)) == sorted(
        f"{number}.{turn}" for number in range(4) for turn in range(10)
    )
    assert query("SELECT 1") == [(1,)]


async def test_inside_a_running_loop_it_is_refused_and_apublish_is_not() -> None:
    ear = await sync_to_async(Ear)("default", ("jobs",))
    try:
        with pytest.raises(SynchronousOnlyOperation):
            notify([("jobs", "1")], connections["default"])
        await apublish("jobs", 2)
        data = await sync_to_async(ear.data)()
    finally:
        ear.close()
    assert data == [2]


def test_a_loop_is_refused_even_on_an_open_connection(ear: Ear) -> None:
    """A statement that blocks a loop is no better because it need not connect first."""
    connection.ensure_connection()

    async def work() -> None:
        notify([("jobs", "1")], connection)

    with pytest.raises(SynchronousOnlyOperation):
        asyncio.run(_on_the_same_connection(work))
    assert heard(ear) == []


async def _on_the_same_connection(work: Callable[[], Any]) -> None:
    await work()


# -- through a pooler ------------------------------------------------------------------------


@pytest.fixture
def _pooled(ear: Ear, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New connections go through PgBouncer in transaction mode; the ear's does not."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed (apt-get install pgbouncer)")
    if str(connection.settings_dict["HOST"]).startswith("/"):
        pytest.skip("the server is reached through a Unix socket")
    process, port = start_pooler("transaction", tmp_path_factory.mktemp("pgbouncer"))
    with process, default_reached(HOST="127.0.0.1", PORT=str(port)):
        yield


@pytest.mark.usefixtures("_pooled")
def test_through_a_transaction_pooler_no_statement_relies_on_one_before_it(
    ear: Ear, ways: Ways
) -> None:
    """Each may be another backend's, which knows no statement that was prepared elsewhere."""
    everything: list[Any] = []
    for number in range(40):
        publish("jobs", number)
        turns = [[number, turn] for turn in range(number % 3 + 1)]
        with transaction.atomic():
            for turn in turns:
                publish("jobs", turn)
        everything += [number, *turns]
    assert len(ways.direct) == 80
    assert ways.cursor == []
    assert ear.data() == everything
    assert query("SELECT count(*) FROM pg_prepared_statements") == [(0,)]


@pytest.mark.usefixtures("_pooled")
def test_through_a_transaction_pooler_several_clients_do_not_disturb_each_other(ear: Ear) -> None:
    failed = publishing_stats["publish_failed"]
    together = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            together.wait(DEADLINE)
            for turn in range(30):
                publish("jobs", [number, turn])
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    data = ear.data()
    assert publishing_stats["publish_failed"] == failed
    assert len(data) == 120
    for number in range(4):
        assert [one for one in data if one[0] == number] == [[number, turn] for turn in range(30)]


@pytest.mark.usefixtures("_pooled")
def test_through_a_transaction_pooler_events_ride_with_the_commit(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    rides = []

    def counted(frames: Any, connection: Any) -> Any:
        rides.append(len(frames))
        return commit_and_notify(frames, connection)

    monkeypatch.setattr(riding, "commit_and_notify", counted)

    def work(number: int) -> None:
        try:
            for turn in range(20):
                with transaction.atomic():
                    query("SELECT 1")
                    publish("jobs", [number, turn])
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    data = ear.data()
    for number in range(3):
        assert [one for one in data if one[0] == number] == [[number, turn] for turn in range(20)]
    assert rides == [1] * 60
