"""The pure parts of durable topics: snapshots, shares, epochs, and who is a consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import django.db
import psycopg
import pytest

from django_pgnotify import Event, Topic, forward, invalidates, receiver
from django_pgnotify.dispatching.durable import DurableSide
from django_pgnotify.dispatching.service import routes_of
from django_pgnotify.durable.calls import by_key
from django_pgnotify.durable.cursor import BEGINNING, Cursor, Logged, Page, Snapshot
from django_pgnotify.durable.epoch import Epoch
from django_pgnotify.durable.losses import is_loss
from django_pgnotify.durable.shares import PATIENCE, decide
from django_pgnotify.exceptions import InvalidArgument, InvalidReceiver
from django_pgnotify.publishing.model_signals import notify_changes
from django_pgnotify.registry import Publication, Registry, registry
from django_pgnotify.stats import Stats
from tests.testapp.models import Order
from tests.unit.test_docs import django_now

DURABLE = Topic("ledger", delivery="durable")


@pytest.fixture(autouse=True)
def _registry() -> Iterator[Registry]:
    with registry.isolated() as isolated:
        yield isolated


def handle(event: Event) -> None:
    pass


async def ahandle(event: Event) -> None:
    pass


# -- snapshots and pages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [("10:10:", (10, 10, ())), ("10:20:10,14", (10, 20, (10, 14))), (BEGINNING, (3, 3, ()))],
)
def test_a_snapshot_is_read_as_postgresql_writes_it(text: str, parts: object) -> None:
    assert tuple(Snapshot.parse(text)) == parts


def test_what_a_snapshot_does_not_see_is_asked_for_as_text() -> None:
    assert Snapshot.parse("10:20:10,14").params == {"xmax": "20", "xip": ["10", "14"]}


def test_the_cursor_behind_an_event_is_its_id_and_behind_the_last_one_the_end_of_the_page() -> None:
    rows = [Logged(n, "t", "here:1", django_now(), "{}") for n in (4, 9)]
    page = Page(rows, Cursor("1:1:", "2:2:", 0), Cursor("2:2:"))
    assert page.after(rows[0]) == Cursor("1:1:", "2:2:", 4)
    assert page.after(rows[1]) == Cursor("2:2:")


def test_events_of_a_key_stay_together_and_those_without_one_stand_alone() -> None:
    event = Event("1", "t", "published", None, None, None, None, "here:1", django_now())
    events = [replace(event, key=key) for key in ("a", None, "b", "a", None)]
    assert by_key(events) == [[0, 3], [1], [2], [4]]


# -- shares -------------------------------------------------------------------------------------


def test_a_process_alone_takes_all_and_lets_nothing_go() -> None:
    assert decide({"a": 1, "b": 1}, [], {}) == (["a", "b"], [])
    assert decide({"a": 1, "b": 1}, ["a", "b"], {}) == ([], [])


def test_of_two_processes_each_takes_half() -> None:
    wanted = dict.fromkeys("abcd", 2)
    assert decide(wanted, [], {}).take == ["a", "b"]
    assert decide(wanted, ["a", "b", "c", "d"], {}).let_go == ["a"]
    assert decide(wanted, ["c", "d"], {}) == ([], [])


def test_an_odd_one_belongs_to_somebody() -> None:
    assert decide(dict.fromkeys("abc", 2), ["a"], {}).take == ["b"]
    assert decide(dict.fromkeys("abc", 2), ["a", "b"], {}) == ([], [])


def test_what_nobody_else_could_run_comes_on_top_of_the_share_and_is_never_let_go() -> None:
    wanted = {"shared": 2, "mine": 1, "mine too": 1}
    assert decide(wanted, [], {}).take == ["mine", "mine too", "shared"]
    assert decide(wanted, list(wanted), {}).let_go == []
    assert decide({**wanted, "other": 2}, [*wanted, "other"], {}).let_go == ["shared"]


def test_one_that_stays_free_is_taken_beyond_the_share() -> None:
    wanted = dict.fromkeys("abcd", 2)
    assert decide(wanted, ["a", "b"], {"c": PATIENCE - 1}).take == []
    assert decide(wanted, ["a", "b"], {"c": PATIENCE}).take == ["c"]


# -- epochs -------------------------------------------------------------------------------------

HERE = Epoch("7711", "16384", "00000001")


@pytest.mark.parametrize(
    ("now", "cause"),
    [
        (HERE, None),
        (HERE._replace(timeline="00000002"), None),
        (HERE._replace(system="1"), "restored into, or upgraded"),
        (HERE._replace(database="2"), "was copied"),
        (HERE._replace(system="?"), None),
    ],
)
def test_a_cursor_is_foreign_to_another_server_and_another_database(
    now: Epoch, cause: str | None
) -> None:
    found = Epoch.parse(str(HERE)).foreign_to(now)
    assert found is None if cause is None else cause in str(found)


def test_a_timeline_that_is_not_known_has_not_changed() -> None:
    assert HERE.timeline_changed(HERE._replace(timeline="00000002"))
    assert not HERE.timeline_changed(HERE)
    assert not HERE.timeline_changed(HERE._replace(timeline="?"))


# -- who is a consumer --------------------------------------------------------------------------


def topics_of(default: str = "after_commit") -> tuple[str, ...]:
    [one] = registry.receivers
    return registry.durable_topics(one, default)  # type: ignore[arg-type]


def test_a_receiver_of_a_durable_topic_is_a_consumer_and_one_of_a_name_is_not() -> None:
    receiver([DURABLE, "plain", Topic("loose")])(handle)
    assert topics_of() == ("ledger",)
    assert topics_of("durable") == ("ledger", "plain", "loose")


def test_a_model_is_as_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver(Order)(handle)
    assert topics_of() == ()
    assert topics_of("durable") == ("testapp.order",)
    publication = replace(registry.publications["testapp.order"], delivery="durable")
    monkeypatch.setitem(registry.publications, "testapp.order", publication)
    assert topics_of() == ("testapp.order",)


def test_a_model_that_publishes_elsewhere_is_durable_under_no_default() -> None:
    elsewhere = Publication(Order, "testapp.order", "orders", using="other")
    assert elsewhere.tier("durable") == "after_commit"
    assert elsewhere.tier("atomic") == "atomic"


def test_what_is_said_counts_more_than_the_source() -> None:
    receiver("plain", durable=True)(handle)
    assert topics_of() == ("plain",)
    registry.remove(handle)
    receiver(DURABLE, durable=False)(handle)
    assert topics_of("durable") == ()
    registry.remove(handle)
    receiver(DURABLE, every_node=True)(handle)
    assert topics_of("durable") == ()
    registry.remove(handle)
    receiver("plain", transactional=True)(handle)
    assert topics_of() == ("plain",)


def test_forwarding_and_invalidation_stay_live() -> None:
    forward(DURABLE, group="ledger", type="ledger.changed")
    invalidates(DURABLE, keys=["ledger"])
    assert [registry.durable_topics(one, "durable") for one in registry.receivers] == [(), ()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "yesterday"}, "'now' or 'beginning'; got 'yesterday'"),
        ({"every_node": True, "durable": True}, "every_node=True"),
        ({"every_node": True, "transactional": True}, "every_node=True"),
        ({"durable": False, "transactional": True}, "durable is False"),
        ({"transactional": True, "concurrency": 2}, "concurrency is 2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, object], says: str
) -> None:
    with pytest.raises(InvalidReceiver, match=says):
        receiver(DURABLE, **options)(handle)  # type: ignore[arg-type]


def test_an_async_receiver_cannot_be_transactional() -> None:
    with pytest.raises(InvalidReceiver, match="is async"):
        receiver(DURABLE, transactional=True)(ahandle)


def test_a_durable_model_cannot_publish_in_another_database() -> None:
    with pytest.raises(InvalidArgument, match="using='other'"):
        notify_changes(delivery="durable", using="other")(_unpublished())


def _unpublished() -> type:
    from django.contrib.auth.models import Group

    return Group


# -- the loop and the worker ----------------------------------------------------------------------


class ClosesMeanwhile(asyncio.SelectorEventLoop):
    """Between a look whether it is closed and the call, it is closed."""

    looked_too_soon = False

    def is_closed(self) -> bool:
        return super().is_closed() and not self.looked_too_soon


def test_a_worker_does_not_stumble_over_a_loop_that_is_closed_meanwhile() -> None:
    receiver(DURABLE)(handle)
    side = DurableSide(routes_of(registry), registry, using="default", stats=Stats(), observe=print)
    side._loop = loop = ClosesMeanwhile()
    loop.close()
    loop.looked_too_soon = True
    side._handled([Event("1", "ledger", "published", None, None, None, None, "a:1", django_now())])
    loop.looked_too_soon = False


# -- lost connections -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exc", "lost"),
    [
        (psycopg.OperationalError("the connection is closed"), True),
        (psycopg.errors.AdminShutdown("terminating connection"), True),
        (psycopg.errors.ConnectionFailure("08006"), True),
        (psycopg.errors.DeadlockDetected("deadlock"), False),
        (psycopg.errors.QueryCanceled("statement timeout"), False),
        (psycopg.errors.UniqueViolation("duplicate key"), False),
        (ValueError("no database in it"), False),
    ],
)
def test_what_comes_from_a_lost_connection_is_told_from_other_failures(
    exc: Exception, lost: bool
) -> None:
    assert is_loss(exc) is lost
    wrapped = RuntimeError("of the receiver's own")
    wrapped.__cause__ = django.db.DatabaseError()
    wrapped.__cause__.__cause__ = exc
    assert is_loss(wrapped) is lost


def test_failures_that_are_tied_into_a_ring_are_looked_through_once() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert not is_loss(first)
