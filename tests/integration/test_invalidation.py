"""``invalidates()``: keys of a shared cache go when a source changes, and all after a gap."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.core.cache.backends.filebased import FileBasedCache
from django.core.management import call_command
from django.db import connection, transaction

from django_pgnotify import Event, Topic, invalidates, publish
from django_pgnotify.exceptions import (
    DuplicateReceiver,
    InvalidAction,
    InvalidArgument,
    InvalidReceiver,
    InvalidTemplate,
    InvalidTopic,
)
from django_pgnotify.registry import Registry, registry
from django_pgnotify.signals import cache_invalidated, receiver_failed
from django_pgnotify.testing import InMemoryBus, running_listener
from tests.testapp.models import Document, Membership, Order, Shipment

DEADLINE = 30.0

pytestmark = pytest.mark.django_db(transaction=True)


class PatternCache(FileBasedCache):
    """A cache that can delete by pattern, as django-redis' does: on disk, with an index of keys."""

    def __init__(self, folder: str, params: dict[str, Any]) -> None:
        super().__init__(folder, params)
        self._index = Path(folder) / "index"
        self.patterns: list[tuple[str, int | None]] = []

    def set(self, key: Any, value: Any, *args: Any, version: int | None = None, **kw: Any) -> None:
        super().set(key, value, *args, **kw, version=version)  # type: ignore[misc]
        with self._index.open("a") as index:
            index.write(f"{self.make_key(key, version)}\n")

    def delete_pattern(self, pattern: str, version: int | None = None) -> int:
        self.patterns.append((pattern, version))
        wanted = self.make_key(pattern, version)
        known = self._index.read_text().splitlines() if self._index.exists() else []
        found = [key for key in known if fnmatch.fnmatchcase(key, wanted)]
        for key in found:
            _prefix, of_version, name = key.split(":", 2)
            self.delete(name, version=int(of_version))
        return len(found)


@pytest.fixture(autouse=True)
def receivers() -> Iterator[Registry]:
    """No receivers but those of the test."""
    with registry.isolated() as isolated:
        yield isolated


@pytest.fixture
def bus() -> Iterator[InMemoryBus]:
    with InMemoryBus() as bus:
        yield bus


@pytest.fixture(autouse=True)
def cache_aliases(settings: Any, tmp_path: Path) -> Iterator[None]:
    """Caches that processes share; ``default`` is on disk, ``database`` in the database."""
    file_based = "django.core.cache.backends.filebased.FileBasedCache"
    settings.CACHES = {
        "default": {"BACKEND": file_based, "LOCATION": str(tmp_path / "default")},
        "second": {"BACKEND": file_based, "LOCATION": str(tmp_path / "second")},
        "prefixed": {
            "BACKEND": file_based,
            "LOCATION": str(tmp_path / "prefixed"),
            "KEY_PREFIX": "shop",
            "VERSION": 3,
        },
        "pattern": {
            "BACKEND": f"{__name__}.PatternCache",
            "LOCATION": str(tmp_path / "pattern"),
        },
        "database": {
            "BACKEND": "django.core.cache.backends.db.DatabaseCache",
            "LOCATION": "test_invalidation_cache",
        },
    }
    yield
    for alias in settings.CACHES:
        if alias != "database":
            caches[alias].clear()


@pytest.fixture
def database_cache(settings: Any) -> Iterator[None]:
    settings.DATABASE_ROUTERS = []  # that of the tests knows real models only
    call_command("createcachetable", "test_invalidation_cache", verbosity=0)
    yield
    with connection.cursor() as cursor:
        cursor.execute("drop table test_invalidation_cache")


class Told(list[dict[str, Any]]):
    """What ``cache_invalidated`` told, and a wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def note(self, **kwargs: Any) -> None:
        with self._changed:
            self.append(kwargs)
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[Told], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: predicate(self), DEADLINE), list(self)

    def wait_for_gap(self) -> None:
        self.wait_for(lambda told: any(one["event"].action == "gap" for one in told))


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    cache_invalidated.connect(told.note)
    yield told
    cache_invalidated.disconnect(told.note)


def fill(alias: str, *keys: str, version: int | None = None) -> None:
    for key in keys:
        caches[alias].set(key, f"value of {key}", None, version=version)


def left(alias: str, *keys: str, version: int | None = None) -> list[str]:
    """Which of the keys are still there."""
    return [key for key in keys if caches[alias].get(key, version=version) is not None]


def break_listener(pid: int | None) -> None:
    with connection.cursor() as cursor:
        cursor.execute("select pg_terminate_backend(%s, 5000)", [pid])
        assert cursor.fetchone() == (True,)


# -- which keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["default", "database", "prefixed", "pattern"])
def test_a_change_deletes_its_keys_and_no_others(
    database_cache: None, bus: InMemoryBus, alias: str
) -> None:
    invalidates(Order, keys=["order:{pk}", "orders"], cache=alias)
    order, other = Order.objects.create(), Order.objects.create()
    keys = [f"order:{order.pk}", "orders", f"order:{other.pk}", "customers"]
    fill(alias, *keys)
    order.save()
    assert left(alias, *keys) == keys[2:]


def test_key_templates_name_fields_of_the_event(bus: InMemoryBus, told: Told) -> None:
    invalidates(
        Shipment,
        keys=["{topic}:{action}:{pk}", "{model}:{data[status]}", "order:{data[order]:05}"],
    )
    order = Order.objects.create()
    shipment = Shipment.objects.create(order=order, status="sent")
    keys = [
        f"testapp.shipment:created:{shipment.pk}",
        "testapp.shipment:sent",
        f"order:{order.pk:05}",
    ]
    assert told[0]["keys"] == keys


def test_keys_of_any_type_stand_in_the_cache_key_as_text(bus: InMemoryBus, told: Told) -> None:
    invalidates([Document, Membership], keys=["row:{pk}"])
    document, badge = Document.objects.create(), uuid.uuid4()
    Membership.objects.create(team=3, person="ann", badge=badge)
    assert [one["keys"] for one in told] == [[f"row:{document.pk}"], [f"row:3.ann.{badge}"]]


def test_a_value_is_not_escaped_in_a_cache_key(bus: InMemoryBus) -> None:
    """Whoever stores writes f"room:{name}"; the template has to come to the same key."""
    invalidates("rooms", keys=["room:{data[name]}"])
    for name in ("O'Brien", "größe/XL", "{pk}", "a:b", "x" * 150):
        fill("default", f"room:{name}")
        publish("rooms", {"name": name})
        assert left("default", f"room:{name}") == []


def test_a_function_names_keys_one_or_none(bus: InMemoryBus, told: Told) -> None:
    def keys(event: Event) -> Any:
        return event.data

    invalidates("rooms", keys=keys)
    fill("default", "a", "b", "c", "d")
    publish("rooms", ["a", "b"])
    publish("rooms", "c")
    publish("rooms", [])
    publish("rooms", None)
    assert left("default", "a", "b", "c", "d") == ["d"]
    assert [one["keys"] for one in told] == [["a", "b"], ["c"]]


def test_a_generator_names_keys_too(bus: InMemoryBus) -> None:
    invalidates("rooms", keys=lambda event: (f"room:{n}" for n in event.data))
    fill("default", "room:1", "room:2", "room:3")
    publish("rooms", [1, 2])
    assert left("default", "room:1", "room:2", "room:3") == ["room:3"]


def test_keys_of_another_version_are_deleted_where_asked(bus: InMemoryBus) -> None:
    invalidates("rooms", keys=["rooms"], version=7)
    fill("default", "rooms")
    fill("default", "rooms", version=7)
    publish("rooms", 1)
    assert left("default", "rooms", version=7) == []
    assert left("default", "rooms") == ["rooms"]


def test_only_the_chosen_actions_invalidate(bus: InMemoryBus) -> None:
    invalidates(Order, keys=["order:{pk}"], actions=["deleted"])
    order = Order.objects.create()
    key = f"order:{order.pk}"
    fill("default", key)
    order.save()
    assert left("default", key) == [key]
    order.delete()
    assert left("default", key) == []


def test_a_list_of_sources_invalidates_by_one_declaration(bus: InMemoryBus) -> None:
    invalidates([Order, "jobs", Topic("news")], keys=["{topic}"])
    topics = ["testapp.order", "jobs", "news", "other"]
    fill("default", *topics)
    Order.objects.create()
    for topic in topics[1:]:
        publish(topic, 1)
    assert left("default", *topics) == ["other"]


def test_one_alias_is_invalidated_and_the_others_are_left(bus: InMemoryBus) -> None:
    invalidates("rooms", keys=["rooms"], cache="second")
    for alias in ("default", "second"):
        fill(alias, "rooms")
    publish("rooms", 1)
    assert left("default", "rooms") == ["rooms"]
    assert left("second", "rooms") == []


def test_nothing_is_invalidated_before_the_commit_nor_after_a_rollback(bus: InMemoryBus) -> None:
    invalidates(Order, keys=["orders"])
    fill("default", "orders")
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        Order.objects.create()
        raise ZeroDivisionError
    with transaction.atomic():
        Order.objects.create()
        assert left("default", "orders") == ["orders"]
    assert left("default", "orders") == []


# -- the signal ----------------------------------------------------------------------------------


def test_the_signal_tells_source_event_keys_and_cache_once_they_are_gone(
    bus: InMemoryBus,
) -> None:
    invalidates(Order, keys=["order:{pk}", "orders"], cache="second")
    seen: list[dict[str, Any]] = []

    def look(sender: object, **kwargs: Any) -> None:
        seen.append({"sender": sender, "left": left("second", "orders"), **kwargs})

    cache_invalidated.connect(look, sender=Order)
    try:
        fill("second", "orders")
        order = Order.objects.create()
    finally:
        cache_invalidated.disconnect(look, sender=Order)
    [told] = seen
    assert told["sender"] is Order
    assert told["keys"] == [f"order:{order.pk}", "orders"]
    assert told["cache"] == "second"
    assert told["event"].pk == order.pk
    assert told["left"] == []


def test_a_listener_of_the_signal_that_raises_does_not_stop_the_invalidation(
    bus: InMemoryBus,
) -> None:
    invalidates("rooms", keys=["rooms"])

    def broken(**kwargs: Any) -> None:
        raise ZeroDivisionError

    cache_invalidated.connect(broken)
    try:
        for _ in range(2):
            fill("default", "rooms")
            publish("rooms", 1)
            assert left("default", "rooms") == []
    finally:
        cache_invalidated.disconnect(broken)


# -- a gap ---------------------------------------------------------------------------------------


def test_a_gap_clears_the_whole_alias_where_keys_cannot_be_found_by_pattern(
    bus: InMemoryBus, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    invalidates(Order, keys=["order:{pk}"], cache="default")
    fill("default", "order:1", "order:2", "customers")
    fill("second", "order:1")
    bus.gap()
    assert left("default", "order:1", "order:2", "customers") == []
    assert left("second", "order:1") == ["order:1"]
    [one] = told
    assert one["keys"] is None
    assert one["event"].action == "gap"
    assert "cleared whole" in caplog.text


def test_a_gap_clears_by_pattern_where_the_backend_can(bus: InMemoryBus, told: Told) -> None:
    invalidates(Order, keys=["order:{pk}", "orders"], cache="pattern")
    fill("pattern", "order:1", "order:2", "orders", "customers")
    bus.gap()
    assert left("pattern", "order:1", "order:2", "orders", "customers") == ["customers"]
    assert told[0]["keys"] is None
    cache: Any = caches["pattern"]
    assert cache.patterns == [("order:*", None), ("orders*", None)]


def test_a_gap_clears_by_pattern_in_the_version_of_the_keys(bus: InMemoryBus) -> None:
    invalidates(Order, keys=["order:{pk}"], cache="pattern", version=7)
    fill("pattern", "order:1")
    fill("pattern", "order:1", version=7)
    bus.gap()
    assert left("pattern", "order:1", version=7) == []
    assert left("pattern", "order:1") == ["order:1"]


@pytest.mark.parametrize("keys", [["{pk}:order"], ["order:{pk}", "{pk}"], lambda event: ["a"]])
def test_a_gap_clears_the_whole_alias_where_a_key_has_no_literal_beginning(
    bus: InMemoryBus, keys: Any
) -> None:
    invalidates(Order, keys=keys, cache="pattern")
    fill("pattern", "1:order", "order:1", "customers")
    bus.gap()
    assert left("pattern", "1:order", "order:1", "customers") == []


def test_a_gap_clears_keys_whose_template_begins_with_a_brace(bus: InMemoryBus) -> None:
    invalidates(Order, keys=["{{orders}}:{pk}"], cache="pattern")
    order = Order.objects.create()
    fill("pattern", f"{{orders}}:{order.pk}")
    bus.gap()
    assert left("pattern", f"{{orders}}:{order.pk}") == []


def test_a_gap_invalidates_whatever_actions_were_chosen(bus: InMemoryBus) -> None:
    """Deletions may have been missed as well as anything else."""
    invalidates(Order, keys=["order:{pk}"], actions=["deleted"])
    fill("default", "order:1")
    bus.gap()
    assert left("default", "order:1") == []


def test_a_listener_that_lost_its_connection_clears_the_cache_before_what_comes_after(
    told: Told,
) -> None:
    invalidates("rooms", keys=["room:{data}"])
    with running_listener() as listener:
        publish("rooms", 1)
        listener.wait_for(1)
        assert left("default", "room:1", "other") == []
        fill("default", "room:1", "other")
        break_listener(listener.backend_pid)
        publish("rooms", 1)  # nobody may have heard this one
        told.wait_for_gap()
        listener.settle()
        assert left("default", "room:1", "other") == []
        fill("default", "room:2", "other")
        publish("rooms", 2)
        told.wait_for(lambda told: told[-1]["keys"] == ["room:2"])
        assert left("default", "room:2", "other") == ["other"]
    first, *_, last = told
    assert (first["keys"], last["keys"]) == (["room:1"], ["room:2"])


def test_a_gap_is_cleared_once_for_each_topic_at_most(told: Told) -> None:
    invalidates("rooms", keys=["rooms"])
    with running_listener() as listener:
        break_listener(listener.backend_pid)
        listener.wait_until_ready(2)
        listener.settle()
    assert [one["event"].action for one in told] == ["gap"]
    data = told[0]["event"].data
    assert data["since"] < data["until"]
    assert data["cause"]


# -- through PostgreSQL --------------------------------------------------------------------------


def test_every_listener_invalidates_the_standby_too(told: Told) -> None:
    invalidates("rooms", keys=["room:{data}"])
    with running_listener() as one, running_listener() as two:
        for number in range(10):
            publish("rooms", number)
        one.wait_for(10)
        two.wait_for(10)
    assert sorted(one_["event"].data for one_ in told) == sorted([*range(10)] * 2)


def test_a_cache_that_fails_costs_one_event_and_is_reported(told: Told) -> None:
    invalidates("rooms", keys=lambda event: event.data)
    failed: list[dict[str, Any]] = []

    def note(**kwargs: Any) -> None:
        failed.append(kwargs)

    receiver_failed.connect(note)
    try:
        fill("default", "a", "b")
        with running_listener() as listener:
            for data in (["a"], 7, ["b"]):
                publish("rooms", data)
            listener.wait_for(3)
    finally:
        receiver_failed.disconnect(note)
    assert left("default", "a", "b") == []
    assert [one["event"].data for one in failed] == [7]


def test_an_alias_that_is_missing_is_reported_by_receiver_failed() -> None:
    invalidates("rooms", keys=["rooms"], cache="nowhere")
    failed: list[dict[str, Any]] = []

    def note(**kwargs: Any) -> None:
        failed.append(kwargs)

    receiver_failed.connect(note)
    try:
        with running_listener() as listener:
            publish("rooms", 1)
            listener.wait_for(1, DEADLINE)
    finally:
        receiver_failed.disconnect(note)
    [failure] = failed
    assert "nowhere" in str(failure["exception"])


# -- what can never work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        (["order:{number}"], InvalidTemplate, "'number'"),
        (["orders", "order:{pk.real}"], InvalidTemplate, "no field"),
        (["order:{pk"], InvalidTemplate, "malformed"),
        ([""], InvalidTemplate, "non-empty"),
        ([7], InvalidTemplate, "non-empty"),
        ([], InvalidTemplate, "empty"),
        ("orders", InvalidTemplate, "list of key templates"),
        (None, InvalidTemplate, "list of key templates"),
        (7, InvalidTemplate, "list of key templates"),
        (lambda: ["orders"], InvalidReceiver, "event"),
    ],
)
def test_keys_that_could_never_be_named_are_refused(
    receivers: Registry, keys: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        invalidates(Order, keys=keys)
    assert receivers.receivers == []


def test_a_bad_source_action_or_cache_is_refused(receivers: Registry) -> None:
    bad: list[Any] = ["", 7, None, []]
    for source in bad:
        with pytest.raises(InvalidTopic):
            invalidates(source, keys=["orders"])
    with pytest.raises(InvalidAction, match="'renamed'"):
        invalidates(Order, keys=["orders"], actions=["renamed"])
    for cache in ("", None, 7):
        with pytest.raises(InvalidArgument, match="CACHES"):
            invalidates(Order, keys=["orders"], cache=cache)  # type: ignore[arg-type]
    assert receivers.receivers == []


def test_keys_from_an_iterator_are_read_once_and_kept(bus: InMemoryBus) -> None:
    invalidates("rooms", keys=(key for key in ("a", "b")))
    for _ in range(2):
        fill("default", "a", "b")
        publish("rooms", 1)
        assert left("default", "a", "b") == []


def test_the_same_declaration_twice_is_refused_and_a_name_of_its_own_is_not() -> None:
    invalidates(Order, keys=["orders"])
    invalidates(Order, keys=["order:{pk}"])
    invalidates(Order, keys=["orders"], cache="second")
    invalidates(Order, keys=["orders"], dispatch_uid="again")
    taken = r"taken by django_pgnotify.invalidates\(testapp.order -> orders\)"
    with pytest.raises(DuplicateReceiver, match=taken):
        invalidates(Order, keys=["orders"])


def test_two_functions_of_the_same_name_are_two_declarations(bus: InMemoryBus) -> None:
    """Lambdas all have one name."""
    invalidates("rooms", keys=lambda event: ["first"])
    invalidates("rooms", keys=lambda event: ["second"])
    fill("default", "first", "second")
    publish("rooms", 1)
    assert left("default", "first", "second") == []
