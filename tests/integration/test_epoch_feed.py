"""The listener and the epoch table: what is heard is stale, the heartbeat never says too much."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.cache import caches
from django.core.management import CommandError, call_command
from django.db import DatabaseError, transaction

from django_pgnotify import Event, invalidates, publish, receiver, signing
from django_pgnotify.caching import NearCache, invalidate_keys, invalidate_tags, model_tag
from django_pgnotify.caching.shelf import name_of_key
from django_pgnotify.epochs import use
from django_pgnotify.epochs.clock import node_clock
from django_pgnotify.epochs.names import INVALIDATIONS, key_name, tag_name
from django_pgnotify.epochs.node import node_table
from django_pgnotify.epochs.table import EpochTable, Snapshot
from django_pgnotify.listening.feed import EpochFeed
from django_pgnotify.publishing.announcer import announcer
from django_pgnotify.registry import Registry
from django_pgnotify.testing import RunningListener, running_listener
from django_pgnotify.wire import FramePacker, Outgoing
from tests.integration.caching import DEADLINE, near_caches, until
from tests.integration.recording import dsn, notify, rolled_back, terminate
from tests.integration.redirecting import default_reached
from tests.proxy import TCPProxy
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    settings.PGNOTIFY_MAX_STALENESS = 30.0
    with near_caches(settings, tmp_path, MAX_STALENESS=None):
        yield


@pytest.fixture
def listener() -> Iterator[RunningListener]:
    with running_listener() as running:
        until(lambda: node_table().heartbeat)
        yield running


class Node:
    """Another node: its table, and the listener that keeps it."""

    def __init__(self, table: EpochTable, listener: RunningListener) -> None:
        self.table = table
        self.listener = listener

    def captured(self, *tags: str) -> Snapshot:
        return self.table.capture([tag_name(tag) for tag in tags])

    def settle(self) -> None:
        """Wait until everything that was published so far has been heard."""
        snapshot = self.captured("settled")
        invalidate_tags("settled")
        self.until_stale(snapshot)

    def until_stale(self, snapshot: Snapshot) -> None:
        until(lambda: not self.table.is_current(snapshot))


@pytest.fixture
def elsewhere(settings: Any, tmp_path: Path) -> Iterator[Node]:
    """Its own table only hears of changes by what a listener hears."""
    here = settings.PGNOTIFY_EPOCH_TABLE
    settings.PGNOTIFY_EPOCH_TABLE = str(tmp_path / "elsewhere")
    with running_listener() as running:
        table = node_table()
        until(lambda: table.heartbeat)
        settings.PGNOTIFY_EPOCH_TABLE = here
        assert node_table() is not table
        yield Node(table, running)


# -- what is heard ---------------------------------------------------------------------------------


def test_a_change_is_stale_on_another_node_and_nothing_else_is(elsewhere: Node) -> None:
    order = Order.objects.create()
    elsewhere.settle()
    rows = elsewhere.captured(model_tag(Order))
    row = elsewhere.captured(model_tag(Order, order.pk))
    others = elsewhere.captured(model_tag(Order, order.pk + 1), "shelf")
    order.save()
    elsewhere.until_stale(row)
    assert not elsewhere.table.is_current(rows)
    row = elsewhere.captured(model_tag(Order, order.pk))
    order.delete()
    elsewhere.until_stale(row)
    assert elsewhere.table.is_current(others)


def test_tags_and_keys_are_stale_on_another_node(elsewhere: Node) -> None:
    shelf, top = elsewhere.captured("shelf"), elsewhere.captured("top")
    key = elsewhere.table.capture([name_of_key("files", "a")])
    with transaction.atomic():
        with rolled_back():
            invalidate_tags("shelf")
        invalidate_tags("top")
    elsewhere.until_stale(top)
    assert elsewhere.table.is_current(shelf), "that was rolled back"
    invalidate_tags("shelf")
    elsewhere.until_stale(shelf)
    assert elsewhere.table.is_current(key)
    invalidate_keys("a", cache="files")
    elsewhere.until_stale(key)


def test_a_durable_topic_is_heard_live_for_the_caches_though_only_a_consumer_reads_it(
    settings: Any, tmp_path: Path, pgnotify_registry: Registry
) -> None:
    settings.PGNOTIFY_DELIVERY = "durable"
    handled: list[Any] = []

    @receiver(Order, dispatch_uid="feed-consumer")
    def consume(event: Event) -> None:
        handled.append(event)

    with running_listener() as running:
        table = node_table()
        until(lambda: table.heartbeat)
        snapshot = table.capture([tag_name(model_tag(Order))])
        # As another process of the node would: not through this one's table.
        Order.objects.create()
        until(lambda: not table.is_current(snapshot))
        running.wait_for(1)
        until(lambda: handled)
    assert [event.action for event in handled] == ["created"]
    assert len(running.events) == 1


def test_whoever_has_no_receiver_for_a_topic_does_not_see_its_events(
    listener: RunningListener,
) -> None:
    """The feed's topics are its own affair: nothing is dispatched, observed or logged of them."""
    assert listener.service is not None
    assert "testapp.order" not in listener.service.topics
    Order.objects.create()
    invalidate_tags("shelf")
    assert listener.service.feed is not None
    before = listener.service.feed.table.heartbeat
    until(lambda: listener.service.stats["received"] >= 2)  # type: ignore[union-attr]
    listener.settle()
    assert listener.events == []
    assert before


def test_an_announcement_of_this_node_leaves_what_it_stored_since_alone(
    listener: RunningListener,
) -> None:
    near = caches["layered"]
    assert isinstance(near, NearCache)
    assert listener.service is not None
    received = listener.service.stats["received"]
    near.set("a", 1)
    near.set("a", 2)
    assert announcer.flush(DEADLINE)
    until(lambda: listener.service.stats["received"] > received)  # type: ignore[union-attr]
    listener.settle()
    assert near.get("a") == 2


def test_a_change_of_a_cache_with_a_second_level_is_announced_to_other_nodes(
    elsewhere: Node,
) -> None:
    near = caches["layered"]
    assert isinstance(near, NearCache)
    full = near.make_key("a")
    for change in (
        lambda: near.set("a", 1),
        lambda: near.incr("a"),
        lambda: near.delete("a"),
    ):
        snapshot = elsewhere.table.capture(near.level.store.names(full))
        change()
        elsewhere.until_stale(snapshot)
    before = elsewhere.table.capture([key_name("", full)])
    caches["near"].set("a", 1)
    assert announcer.flush(DEADLINE)
    assert elsewhere.table.is_current(before), "its memory is nobody else's"


def test_something_that_is_no_announcement_of_ours_empties_the_caches(elsewhere: Node) -> None:
    for payload in ("hello", '{"names": "t:shelf"}', "[1]"):
        snapshot = elsewhere.captured("anything")
        notify(INVALIDATIONS, payload)
        elsewhere.until_stale(snapshot)


def test_a_frame_that_cannot_be_understood_empties_the_caches(elsewhere: Node) -> None:
    snapshot = elsewhere.captured("anything")
    notify("testapp.order", '{"pgnotify":1,"source":"x:1","events":[{"id":')
    elsewhere.until_stale(snapshot)


def test_with_signing_an_unsigned_frame_empties_nothing(settings: Any, tmp_path: Path) -> None:
    settings.PGNOTIFY_SIGNING = True
    with running_listener() as running:
        table = node_table()
        until(lambda: table.heartbeat)
        snapshot = table.capture([])
        notify("testapp.order", '{"pgnotify":1,"source":"x:1","events":[]}')
        until(lambda: running.service.stats["broken"])  # type: ignore[union-attr]
        running.settle()
        assert table.is_current(snapshot)
        # But one of ours that cannot be read does: what it was about nobody knows.
        packer = FramePacker("x:1", "", signing.sign)
        broken = Outgoing("testapp.order", None, '{"id":"x","action":7}', 21)
        for channel, payload in packer.pack([broken]):
            notify(channel, payload)
        until(lambda: not table.is_current(snapshot))


def test_an_event_that_was_stored_and_is_gone_empties_the_caches(elsewhere: Node) -> None:
    """What it was about nobody can know any more."""
    snapshot = elsewhere.captured("anything")
    notify(
        "testapp.order",
        '{"pgnotify":1,"source":"x:1","events":[{"ref":4711,"digest":"' + "0" * 32 + '"}]}',
    )
    elsewhere.until_stale(snapshot)


# -- the heartbeat ---------------------------------------------------------------------------------


def test_a_listener_that_starts_makes_everything_stale_before_its_first_heartbeat() -> None:
    table = node_table()
    before = table.capture([])
    with running_listener():
        until(lambda: table.heartbeat)
        assert not table.is_current(before)
        assert table.age() < DEADLINE


def test_a_lost_connection_makes_everything_stale_before_the_next_heartbeat(
    listener: RunningListener,
) -> None:
    table = node_table()
    before, heartbeat = table.capture([]), table.heartbeat
    terminate(listener.backend_pid)
    listener.wait_until_ready(2)
    until(lambda: table.heartbeat > heartbeat)
    assert not table.is_current(before)


def test_heartbeats_come_often_enough_for_the_cache_that_is_strictest(settings: Any) -> None:
    settings.PGNOTIFY_MAX_STALENESS = 3.0
    assert use.heartbeat_interval() == 1.0
    settings.CACHES = {
        **settings.CACHES,
        "strict": {
            "BACKEND": "django_pgnotify.caching.NearCache",
            "OPTIONS": {"MAX_STALENESS": 0.3},
        },
        "lax": {
            "BACKEND": "django_pgnotify.caching.NearCache",
            "OPTIONS": {"MAX_STALENESS": None},
        },
    }
    assert use.heartbeat_interval() == pytest.approx(0.1)
    with running_listener() as running:
        assert running.service is not None
        assert running.service.listener.session.timing.heartbeat_interval == pytest.approx(0.1)
        table = node_table()
        until(lambda: table.heartbeat)
        first = table.heartbeat
        until(lambda: table.heartbeat > first)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("arguments", [{"topics": ["rooms"]}, {"using": "other"}])
def test_who_does_not_hear_all_of_it_keeps_no_table(arguments: dict[str, Any]) -> None:
    invalidates("rooms", tags=["rooms"])
    with running_listener(**arguments) as running:
        assert running.service is not None
        assert running.service.feed is None
    assert node_table().heartbeat == 0


@pytest.fixture
def no_use_of_it(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project in which nothing says that it will use the table."""
    monkeypatch.setattr(use, "_declared", False)
    monkeypatch.setattr(use, "_looked_at", float("-inf"))
    settings.PGNOTIFY_EPOCH_TABLE = "auto"
    settings.PGNOTIFY_EPOCH_SLOTS = 4096  # so not the table that other tests make
    settings.CACHES = {"default": settings.CACHES["memory"]}
    assert not use.is_in_use()


def test_a_project_without_such_caches_keeps_no_table(no_use_of_it: None) -> None:
    with running_listener(topics=None) as running:
        assert running.service is not None
        assert running.service.feed is None


def test_a_table_that_comes_into_use_while_a_listener_runs_is_kept_from_then_on(
    no_use_of_it: None, settings: Any
) -> None:
    """As by a template: nothing in the code of the project tells the listener beforehand."""
    settings.PGNOTIFY_MAX_STALENESS = 5.0

    @receiver("rooms")
    def hear(event: Event) -> None:
        """Heard before and after."""

    with running_listener(topics=None) as running:
        assert running.service is not None
        publish("rooms", 1)
        running.wait_for(1, DEADLINE)
        backend = running.backend_pid
        assert running.service.feed is None
        table = node_table()  # what whoever looks into a cache does
        assert not table.problem
        session = running.service.listener.session
        until(lambda: session.timing.heartbeat_interval == pytest.approx(5 / 3))
        first = table.heartbeat
        until(lambda: table.heartbeat > first)
        # Another process's announcement: on a channel that was not listened to before.
        before = table.capture([tag_name("hot")])
        notify(INVALIDATIONS, json.dumps({"names": [tag_name("hot")]}))
        until(lambda: not table.is_current(before))
        publish("rooms", 2)
        running.wait_for(2, DEADLINE)
        assert [event.data for event in running.events] == [1, 2]
        assert running.backend_pid == backend


def test_the_feed_moves_to_the_table_that_is_there(tmp_path: Path) -> None:
    """Somebody removes the file under a listener: everything in the new one is unheard of."""
    path = tmp_path / "moving"
    with EpochTable.open(path, 64) as table:
        feed = EpochFeed(table, ["a"])
        feed.proven(node_clock(), feed.channels)
        first = table.capture([])
        feed.proven(node_clock(), feed.channels)
        assert table.is_current(first), "nothing was missed in between"
        os.unlink(path)
        feed.proven(node_clock(), feed.channels)
        with EpochTable.open(path, 64) as other:
            assert other.age() < DEADLINE
            assert not other.is_current(first)
        second = table.capture([])
        feed.lost()
        feed.proven(node_clock(), frozenset())
        assert table.is_current(second)
        feed.proven(node_clock(), feed.channels)
        assert not table.is_current(second)


def test_after_a_failure_to_apply_everything_is_stale_before_the_next_heartbeat(
    tmp_path: Path,
) -> None:
    class Unreadable:
        @property
        def topic(self) -> str:
            raise RuntimeError("a mistake")

    with EpochTable.open(tmp_path / "failing", 64) as table:
        feed = EpochFeed(table, ["a"])
        feed.proven(node_clock(), feed.channels)
        before = table.capture([])
        with pytest.raises(RuntimeError, match="a mistake"):
            feed.apply([Unreadable()])  # type: ignore[list-item]
        feed.proven(node_clock(), feed.channels)
        assert not table.is_current(before)


def test_pglisten_refuses_a_table_that_it_cannot_keep(settings: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no table of ours")
    settings.PGNOTIFY_EPOCH_TABLE = str(broken)
    with pytest.raises(CommandError, match="no epoch table to use"):
        call_command("pglisten")
    assert broken.read_bytes() == b"no table of ours"


# -- a NOTIFY that never left ----------------------------------------------------------------------


def test_what_could_not_be_sent_after_its_commit_is_announced_until_it_arrives(
    elsewhere: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else is told of it: no listener has lost anything."""
    from django_pgnotify.publishing import publisher, riding

    def fail(*args: Any) -> None:
        raise DatabaseError("the NOTIFY is refused")

    snapshot = elsewhere.captured(model_tag(Order))
    with monkeypatch.context() as patched:
        patched.setattr(publisher, "send", fail)
        Order.objects.create()  # in autocommit
    elsewhere.until_stale(snapshot)
    snapshot = elsewhere.captured(model_tag(Order))
    with monkeypatch.context() as patched:
        patched.setattr(riding, "commit_and_notify", lambda frames, c: _commit_only(c))
        with transaction.atomic():
            Order.objects.create()
    assert Order.objects.count() == 2
    elsewhere.until_stale(snapshot)


def _commit_only(connection: Any) -> Exception:
    connection.connection.commit()
    return DatabaseError("the NOTIFY is refused")


def test_a_commit_whose_answer_never_came_is_stale_here_and_everywhere(
    elsewhere: Node, proxy: TCPProxy
) -> None:
    """The row is committed, and so is the NOTIFY behind it or not; the writer cannot know."""
    table, row = node_table(), Order.objects.create()
    elsewhere.settle()
    here = table.capture([tag_name(model_tag(Order))])
    there = elsewhere.captured(model_tag(Order))

    watcher = psycopg.connect(dsn(), autocommit=True)

    def cut_when_committed() -> None:
        changed = "SELECT FROM testapp_order WHERE note = 'changed'"
        try:
            until(lambda: watcher.execute(changed).fetchall())
            assert table.is_current(here), "it was not acknowledged"
        finally:
            watcher.close()
            proxy.end_swallowing()

    def write() -> None:
        with transaction.atomic():
            order = Order.objects.get(pk=row.pk)
            order.note = "changed"
            order.save()
            proxy.swallow()
            cutter.start()

    with default_reached(HOST=proxy.host, PORT=str(proxy.port)):
        cutter = threading.Thread(target=cut_when_committed)
        with pytest.raises(DatabaseError):
            write()
        cutter.join(DEADLINE)
        assert not table.is_current(here)
        elsewhere.until_stale(there)
        assert announcer.flush(DEADLINE)


def test_a_save_in_autocommit_that_was_cut_off_is_stale_here_and_everywhere(
    elsewhere: Node, proxy: TCPProxy
) -> None:
    """Django says nothing of a save that failed, and this one may have been carried out."""
    table, row = node_table(), Order.objects.create()
    elsewhere.settle()
    with default_reached(HOST=proxy.host, PORT=str(proxy.port)):
        order = Order.objects.get(pk=row.pk)
        here = table.capture([tag_name(model_tag(Order, row.pk))])
        there = elsewhere.captured(model_tag(Order, row.pk))
        proxy.disconnect()
        with pytest.raises(DatabaseError):
            order.save()
        assert not table.is_current(here)
        elsewhere.until_stale(there)
        assert announcer.flush(DEADLINE)


def test_a_save_that_the_server_refused_makes_nothing_stale() -> None:
    table = node_table()
    row = Order.objects.create()
    before = table.capture([tag_name(model_tag(Order))])
    with pytest.raises(DatabaseError):
        Order(pk=row.pk).save(force_insert=True)
    assert table.is_current(before)
