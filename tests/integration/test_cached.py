"""``cached`` and ``get_or_set``: keys, dependencies, single flight, transactions, any backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.core.cache import caches
from django.db import connection, transaction

from django_pgnotify import Event, invalidates, publish
from django_pgnotify.caching import (
    NearCache,
    aget_or_set,
    ainvalidate_tags,
    cache_counts,
    cached,
    get_or_set,
    invalidate_keys,
    invalidate_tags,
    lookup,
    model_tag,
    reporting,
    take_lease,
)
from django_pgnotify.caching.level import MISSING
from django_pgnotify.epochs.names import tag_name
from django_pgnotify.epochs.node import node_table
from django_pgnotify.exceptions import InvalidArgument, InvalidTemplate
from django_pgnotify.registry import Registry
from django_pgnotify.testing import InMemoryBus
from tests.integration.caching import DEADLINE, near_caches
from tests.integration.recording import rolled_back
from tests.testapp.models import Order, Restaurant, Sportscar, Vehicle

pytestmark = pytest.mark.django_db(transaction=True)

ALIASES = ["near", "layered", "memory", "files"]


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    """Without a listener: the writer's own process makes stale what it has committed."""
    settings.PGNOTIFY_MAX_STALENESS = None
    with near_caches(settings, tmp_path):
        yield


class Counter:
    """A loader that counts its calls, and does something in the middle of the next one."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self.load = load
        self.calls = 0
        self.meanwhile: Callable[[], Any] | None = None

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        value = self.load(*args)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return value


@pytest.fixture(params=ALIASES)
def alias(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def count() -> Counter:
    return Counter(Order.objects.count)


def cached_count(count: Counter, alias: str) -> Callable[[], int]:
    """The number of orders, cached in ``alias`` until an order changes."""

    @cached(key="orders", depends_on=[Order], cache=alias)
    def orders() -> int:
        number: int = count()
        return number

    return orders


# -- what is cached, and until when ----------------------------------------------------------------


def test_a_result_is_cached_until_a_model_that_it_depends_on_changes(
    alias: str, count: Counter
) -> None:
    orders = cached_count(count, alias)
    assert [orders(), orders()] == [0, 0]
    assert count.calls == 1
    order = Order.objects.create()
    assert [orders(), orders()] == [1, 1]
    order.save()
    assert orders() == 1
    order.delete()
    assert [orders(), orders()] == [0, 0]
    assert count.calls == 4


def test_a_row_that_changes_while_the_value_is_loaded_makes_it_stale_before_it_is_stored(
    alias: str, count: Counter
) -> None:
    """The fill race, on every backend: read, change, invalidation, store."""
    orders = cached_count(count, alias)
    count.meanwhile = Order.objects.create
    assert orders() == 0, "the caller asked before the change"
    assert orders() == 1
    assert orders() == 1
    assert count.calls == 2


def test_none_is_a_value_and_an_exception_is_not(alias: str) -> None:
    calls: list[int] = []

    @cached(key="nothing:{number}", cache=alias)
    def nothing(number: int) -> None:
        calls.append(number)
        if number < 0:
            raise LookupError(number)

    for _ in range(2):
        assert nothing(1) is None
        with pytest.raises(LookupError):
            nothing(-1)
    assert calls == [1, -1, -1]


def test_tags_are_templates_over_the_arguments(alias: str) -> None:
    loaded: list[int] = []

    @cached(key="customer:{pk}", tags=["customer:{pk}", "customers"], cache=alias, timeout=None)
    def customer(pk: int) -> int:
        loaded.append(pk)
        return pk

    def load_both() -> list[int]:
        loaded.clear()
        assert [customer(1), customer(pk=2)] == [1, 2]
        return loaded

    assert load_both() == [1, 2]
    assert load_both() == []
    invalidate_tags("customer:1")
    assert load_both() == [1]
    invalidate_tags("customers", "others")
    assert load_both() == [1, 2]
    customer.invalidate(2)
    assert load_both() == [2]
    invalidate_keys("customer:1", cache=alias)
    assert load_both() == [1]
    assert customer.key(7) == "customer:7"
    assert customer.tags(7) == ("customer:7", "customers")
    assert customer.__wrapped__(9) == 9
    assert customer.__name__ == "customer"


def test_one_row_is_a_dependency_of_its_own(alias: str) -> None:
    one, other = Order.objects.create(), Order.objects.create()
    loads = Counter(lambda pk: pk)

    @cached(key="s:{pk}", tags=[model_tag(Order, "{pk}")], cache=alias)
    def status(pk: int) -> Any:
        return loads(pk)

    status(one.pk)
    status(other.pk)
    one.save()
    status(one.pk)
    status(other.pk)
    assert loads.calls == 3
    for _ in range(2):
        get_or_set("row", lambda: loads(0), depends_on=other, cache=alias)
    assert loads.calls == 4
    other.save()
    get_or_set("row", lambda: loads(0), depends_on=other, cache=alias)
    assert loads.calls == 5


def test_a_multi_table_child_is_changed_by_a_save_of_its_parent(alias: str) -> None:
    one, other = (Sportscar.objects.create(name=name) for name in ("one", "other"))
    partial = Sportscar.objects.only("seats").get(pk=one.pk)
    names = Counter(lambda: [car.name for car in Sportscar.objects.order_by("pk")])

    def load(key: str, source: Any) -> Any:
        return get_or_set(key, names, depends_on=source, cache=alias)

    for _ in range(2):
        for key, source in [("all", Sportscar), ("one", partial), ("other", other)]:
            assert load(key, source) == ["one", "other"]
    assert names.calls == 3
    vehicle = Vehicle.objects.get(pk=one.pk)
    vehicle.name = "renamed"
    vehicle.save()
    assert load("all", Sportscar) == load("one", partial) == ["renamed", "other"]
    assert load("other", other) == ["one", "other"], "a row depends on its own parent alone"


def test_a_multi_table_child_whose_parent_publishes_nothing_cannot_be_depended_on() -> None:
    words = r"testapp\.Restaurant, whose rows lie in the table of testapp\.Place too, .*decorate"
    with pytest.raises(InvalidArgument, match=words):
        get_or_set("stars", Restaurant.objects.count, depends_on=[Restaurant])


def test_what_another_cached_value_depends_on_the_outer_one_does_too(
    alias: str, count: Counter
) -> None:
    inner = cached_count(count, alias)
    outer = cached(key="outer", cache=alias)(lambda: f"<{inner()}>")
    assert outer() == "<0>"
    Order.objects.create()
    assert outer() == "<1>"
    inner()  # a hit, this time, for the next outer one
    outer.invalidate()
    assert outer() == "<1>"
    assert count.calls == 2
    Order.objects.create()
    assert outer() == "<2>"


def test_what_a_near_cache_had_is_a_dependency_of_what_is_made_of_it() -> None:
    near = caches["near"]
    assert isinstance(near, NearCache)
    near.set("part", 1, tags=["part"])
    whole = cached(key="whole", cache="memory")(lambda: near.get("part"))
    assert whole() == 1
    invalidate_tags("part")
    assert whole() is None


def fill_part(near: NearCache) -> Any:
    found = near.get("part")
    if found is None:
        found = Order.objects.count()
        near.set("part", found, tags=["part"])
    return found


def fill_many_parts(near: NearCache) -> Any:
    found = near.get_many(["part"])
    if not found:
        found = {"part": Order.objects.count()}
        near.set_many(found, tags=["part"])
    return found["part"]


def add_part(near: NearCache) -> Any:
    found = near.get("part")
    if found is None:
        found = Order.objects.count()
        near.add("part", found, tags=["part"])
    return found


def afill_part(near: NearCache) -> Any:
    async def fill() -> Any:
        found = await near.aget("part")
        if found is None:
            found = await Order.objects.acount()
            await near.aset("part", found, tags=["part"])
        return found

    return async_to_sync(fill)()


@pytest.mark.parametrize("fill", [fill_part, fill_many_parts, add_part, afill_part])
@pytest.mark.parametrize("name", ["near", "layered"])
@pytest.mark.parametrize("written", [False, True])
def test_what_a_near_cache_was_filled_with_is_a_dependency_of_what_is_made_of_it(
    name: str, fill: Callable[[NearCache], Any], written: bool
) -> None:
    near = caches[name]
    assert isinstance(near, NearCache)
    whole = cached(key="whole", cache="memory")(lambda: fill(near))
    with transaction.atomic():
        if written:
            Order.objects.bulk_create([Order()])
        before = whole()
    assert lookup("memory", "whole") == lookup(name, "part") == before
    Order.objects.bulk_create([Order()])
    invalidate_tags("part")
    assert whole() == before + 1


def test_what_a_near_cache_did_not_have_is_a_dependency_of_what_is_made_without_it() -> None:
    near = caches["near"]
    whole = cached(key="whole", cache="memory")(lambda: near.get("part", "nothing"))
    assert whole() == whole() == "nothing"
    in_threads(1, lambda: near.set("part", "something"))
    assert whole() == "something"


def test_methods_are_cached_with_a_key_of_theirs() -> None:
    class Shop:
        def __init__(self, number: int) -> None:
            self.number = number

        @cached(key="total:{self.number}", cache="memory")
        def total(self) -> object:
            return object()

    one, same, other = Shop(1), Shop(1), Shop(2)
    first = one.total()
    assert one.total.key() == "total:1"
    assert one.total.tags() == ()
    one.total.invalidate()
    assert type(first) is object
    assert Shop.total.key(other) == "total:2"
    assert same.total.__name__ == "total"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tags": "shelf"}, InvalidArgument, "list"),
        ({"tags": ["{nowhere}"]}, InvalidTemplate, "nowhere"),
        ({"tags": [7]}, InvalidTemplate, "non-empty"),
        ({"key": "{nowhere}"}, InvalidTemplate, "nowhere"),
        ({"depends_on": "Order"}, InvalidArgument, "depends_on"),
        ({"depends_on": [7]}, InvalidArgument, "depends_on"),
        ({"depends_on": None}, InvalidArgument, "depends_on"),
        ({"cache": ""}, InvalidArgument, "CACHES"),
    ],
)
def test_what_could_never_work_is_refused_where_it_is_written(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    def loader(pk: int) -> int:
        return pk

    with pytest.raises(error, match=words):
        cached(**arguments)(loader)


def test_what_a_factory_makes_needs_a_key_that_tells_its_functions_apart() -> None:
    def total_of(name: str, **arguments: Any) -> Callable[[], str]:
        @cached(cache="memory", **arguments)
        def total() -> str:
            return f"total of {name}"

        return total

    with pytest.raises(InvalidArgument, match=r"total is made anew with each name .*Give key="):
        total_of("A")
    one, other = (total_of(name, key=f"total:{name}") for name in "AB")
    assert [one(), other(), one(), other()] == ["total of A", "total of B"] * 2


def test_a_decorator_without_parentheses_or_names_says_what_to_write() -> None:
    def books() -> None: ...

    anything: Any = cached
    for given, words in [
        (books, r"above books\(\).*write @cached\(\)"),
        (300, "write timeout=300"),
        (Order, r"write depends_on=\[Order\]"),
        ("testapp.Order", "named arguments only .*got 'testapp.Order'"),
    ]:
        with pytest.raises(InvalidArgument, match=words):
            anything(given)
    with pytest.raises(InvalidArgument, match="timeout=60"):
        anything(60, depends_on=[Order])


def test_stale_values_are_counted_by_tag(alias: str, count: Counter) -> None:
    orders = cached_count(count, alias)
    orders()
    Order.objects.create()
    reporting._forked()  # counts begin anew, as those of a NearCache did
    orders()
    assert cache_counts()[alias]["tags"][model_tag(Order)]["stale"] == 1


def test_a_model_that_publishes_nothing_cannot_be_depended_on() -> None:
    from django.contrib.auth.models import Group

    with pytest.raises(InvalidArgument, match=r"auth\.Group.*notify_changes"):
        get_or_set("groups", Group.objects.count, depends_on=[Group])
    with pytest.raises(InvalidArgument, match=r"nowhere\.Model"):
        get_or_set("groups", Group.objects.count, depends_on="nowhere.Model")
    near = r"^depends_on= 'testapp\.Ordr': there is no model .* did you mean 'testapp\.Order'\?$"
    with pytest.raises(InvalidArgument, match=near):
        get_or_set("groups", Group.objects.count, depends_on="testapp.Ordr")
    with pytest.raises(InvalidArgument, match="not been saved"):
        get_or_set("groups", Group.objects.count, depends_on=Order())
    with pytest.raises(InvalidArgument, match="without arguments"):
        get_or_set("groups", 7)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="key="):
        get_or_set("", int)


# -- invalidates(tags=), and keys of stock backends ------------------------------------------------


def test_invalidates_bumps_tags_and_keys_with_the_commit(alias: str) -> None:
    invalidates(Order, keys=["order:{pk}"], tags=["orders-of:{action}"], cache=alias)
    invalidates("rooms", tags=["room:{data[name]}"])
    loads = Counter(lambda: None)
    order = Order.objects.create()

    def reloaded(key: str, *tags: str) -> bool:
        before = loads.calls
        get_or_set(key, loads, tags=tags, cache=alias)
        return loads.calls > before

    assert reloaded(f"order:{order.pk}")
    assert reloaded("deleted", "orders-of:deleted")
    assert reloaded("updated", "orders-of:updated")
    assert reloaded("lobby", "room:lobby")
    order.save()
    assert reloaded(f"order:{order.pk}")
    assert reloaded("updated", "orders-of:updated")
    assert not reloaded("deleted", "orders-of:deleted")
    assert not reloaded("lobby", "room:lobby")
    publish("rooms", {"name": "lobby"})
    assert reloaded("lobby", "room:lobby")
    publish("rooms", {"name": "attic"})
    assert not reloaded("lobby", "room:lobby")


def test_a_value_that_was_read_before_a_keys_function_named_its_key_is_not_stored_after(
    alias: str, count: Counter
) -> None:
    def orders_key(event: Event) -> str:
        return "orders"

    invalidates(Order, keys=orders_key, cache=alias)
    count.meanwhile = Order.objects.create
    with InMemoryBus() as bus:
        assert get_or_set("orders", count, cache=alias) == 0
        assert [event.action for event in bus.events] == ["created"]
        assert get_or_set("orders", count, cache=alias) == 1
        assert get_or_set("orders", count, cache=alias) == 1
    assert count.calls == 2


def test_an_event_whose_template_cannot_be_filled_invalidates_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    invalidates("rooms", tags=["room:{data[name]}"])
    get_or_set("a", lambda: 1)
    publish("rooms", {"number": 7})
    assert lookup("default", "a") is MISSING
    assert "cannot be told" in caplog.text


def test_a_value_of_somebody_elses_under_the_key_is_a_miss(alias: str) -> None:
    if alias in ("memory", "files"):
        caches[alias].set("a", "a plain value")
        assert lookup(alias, "a") is MISSING
        assert get_or_set("a", lambda: "ours", cache=alias) == "ours"
        assert lookup(alias, "a") == "ours"


# -- single flight ---------------------------------------------------------------------------------


def in_threads(number: int, func: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(func())
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return found


def test_of_threads_that_miss_at_once_one_loads(alias: str) -> None:
    barrier, gate = threading.Barrier(5), threading.Event()
    calls: list[int] = []

    def load() -> str:
        calls.append(1)
        assert gate.wait(DEADLINE)
        return "loaded"

    def ask() -> str:
        barrier.wait()
        return get_or_set("slow", load, cache=alias)

    opener = threading.Timer(0.2, gate.set)
    opener.start()
    try:
        assert in_threads(5, ask) == ["loaded"] * 5
    finally:
        opener.join()
    assert len(calls) == 1


def test_who_waited_does_not_get_what_was_loaded_before_a_change() -> None:
    """It asked after the change; the one who loads had asked before."""
    inside, gate = threading.Event(), threading.Event()
    calls: list[int] = []

    def load() -> int:
        calls.append(1)
        if len(calls) == 1:
            inside.set()
            assert gate.wait(DEADLINE)
            return 0
        return 1

    def ask() -> int:
        return get_or_set("slow", load, tags=["shelf"], cache="near")

    first = threading.Thread(target=ask)
    first.start()
    assert inside.wait(DEADLINE)
    node_table().bump([tag_name("shelf")])
    found: list[int] = []
    second = threading.Thread(target=lambda: found.append(ask()))
    second.start()
    gate.set()
    first.join(DEADLINE)
    second.join(DEADLINE)
    assert found == [1]


def test_a_loader_that_fails_fails_for_itself_alone() -> None:
    barrier = threading.Barrier(3)
    calls: list[int] = []

    def load() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise LookupError
        return "loaded"

    def ask() -> str:
        barrier.wait()
        try:
            return get_or_set("failing", load, cache="near")
        except LookupError:
            return "failed"

    assert sorted(in_threads(3, ask)) == ["failed", "loaded", "loaded"]


def test_a_loader_that_asks_for_its_own_key_does_not_wait_for_itself() -> None:
    depth: list[int] = []

    def load() -> int:
        depth.append(1)
        return 7 if len(depth) > 1 else get_or_set("self", load, cache="near")

    assert get_or_set("self", load, cache="near") == 7


def test_two_that_load_each_others_keys_do_not_wait_for_each_other() -> None:
    barrier = threading.Barrier(2)

    def ask(mine: str, other: str) -> str:
        def load() -> str:
            barrier.wait(DEADLINE)
            return mine + get_or_set(other, lambda: other, cache="near")

        return get_or_set(mine, load, cache="near")

    found: list[str] = []
    threads = [
        threading.Thread(target=lambda a=a, b=b: found.append(ask(a, b)))
        for a, b in (("x", "y"), ("y", "x"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(found) == 2


# -- transactions ----------------------------------------------------------------------------------


def seen_by_others(alias: str, key: str) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(lookup(alias, key)))
    thread.start()
    thread.join()
    return found[0]


def test_what_a_transaction_has_written_nobody_else_sees_before_its_commit(alias: str) -> None:
    Order.objects.bulk_create([Order()])  # no event: raw SQL and bulk operations count as well
    with transaction.atomic():
        Order.objects.bulk_create([Order()])
        assert get_or_set("orders", Order.objects.count, cache=alias) == 2
        assert seen_by_others(alias, "orders") is MISSING
    assert seen_by_others(alias, "orders") == 2


def test_what_was_rolled_back_is_never_seen(alias: str) -> None:
    with rolled_back():
        Order.objects.bulk_create([Order()])
        assert get_or_set("orders", Order.objects.count, cache=alias) == 1
    assert lookup(alias, "orders") is MISSING
    with transaction.atomic():
        with rolled_back():
            Order.objects.bulk_create([Order()])
            assert get_or_set("orders", Order.objects.count, cache=alias) == 1
        Order.objects.bulk_create([Order()])
    assert lookup(alias, "orders") is MISSING


def test_what_the_caller_changes_before_the_commit_nobody_else_gets(alias: str) -> None:
    def load() -> dict[str, Any]:
        return {"a": [1]}

    async def aload() -> dict[str, Any]:
        return load()

    loaded = {}
    with transaction.atomic():
        Order.objects.bulk_create([Order()])
        loaded["decorated"] = cached(key="decorated", cache=alias)(load)()
        loaded["sync"] = get_or_set("sync", load, cache=alias)
        loaded["async"] = async_to_sync(aget_or_set)("async", aload, cache=alias)
        loaded["lease"] = load()
        take_lease(alias).store("lease", loaded["lease"])
        for value in loaded.values():
            value["a"].append("private")
            value["user"] = "alice"
    for key in loaded:
        assert seen_by_others(alias, key) == {"a": [1]}, key


def test_a_transaction_that_only_reads_stores_at_once(alias: str) -> None:
    with transaction.atomic():
        assert get_or_set("orders", Order.objects.count, cache=alias) == 0
        assert seen_by_others(alias, "orders") == 0


def fill_with_set(backend: NearCache) -> Any:
    """The everyday idiom."""
    found = backend.get("orders")
    if found is None:
        found = Order.objects.count()
        backend.set("orders", found)
    return found


def fill_with_add(backend: NearCache) -> Any:
    found = backend.get("orders")
    if found is None:
        found = Order.objects.count()
        assert backend.add("orders", found)
    return found


def fill_with_set_many(backend: NearCache) -> Any:
    found = backend.get_many(["orders"])
    if not found:
        found = {"orders": Order.objects.count()}
        backend.set_many(found)
    return found["orders"]


def fill_with_aset(backend: NearCache) -> Any:
    async def fill() -> Any:
        found = await backend.aget("orders")
        if found is None:
            found = await Order.objects.acount()
            await backend.aset("orders", found)
        return found

    return async_to_sync(fill)()


@pytest.mark.parametrize("fill", [fill_with_set, fill_with_add, fill_with_set_many, fill_with_aset])
@pytest.mark.parametrize("name", ["near", "layered"])
def test_a_fill_by_hand_in_a_transaction_is_seen_with_its_commit_and_not_without(
    name: str, fill: Callable[[NearCache], Any]
) -> None:
    backend = caches[name]
    assert isinstance(backend, NearCache)
    with rolled_back():
        Order.objects.bulk_create([Order()])
        assert fill(backend) == 1
        assert seen_by_others(name, "orders") is MISSING
    assert lookup(name, "orders") is MISSING
    with transaction.atomic():
        Order.objects.bulk_create([Order()])
        assert fill(backend) == 1
        assert seen_by_others(name, "orders") is MISSING
    assert seen_by_others(name, "orders") == 1
    backend.clear()
    with transaction.atomic():
        assert fill(backend) == 1
        assert seen_by_others(name, "orders") == 1, "it has only read"
    backend.clear()
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT count(*) FROM testapp_order")
        in_threads(1, Order.objects.create)
        assert fill(backend) == 1
    assert fill(backend) == 2


def test_a_set_that_is_a_change_is_made_at_once_in_a_transaction_too() -> None:
    near = caches["near"]
    with rolled_back():
        Order.objects.bulk_create([Order()])
        near.set("progress", 50)
        assert seen_by_others("near", "progress") == 50
    assert near.get("progress") == 50


def test_what_was_read_from_a_snapshot_is_not_stored(alias: str) -> None:
    """Its first statement fixed what it sees: changes since then are behind no lease."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT count(*) FROM testapp_order")
        in_threads(1, Order.objects.create)
        orders = get_or_set("orders", Order.objects.count, depends_on=[Order], cache=alias)
        assert orders == 0
    assert get_or_set("orders", Order.objects.count, depends_on=[Order], cache=alias) == 1


def test_a_transaction_sees_what_it_has_changed_itself(alias: str, count: Counter) -> None:
    orders = cached_count(count, alias)
    assert orders() == 0
    with transaction.atomic():
        Order.objects.create()
        assert orders() == 1
        assert seen_by_others(alias, "orders") == 0, "the others see what is committed"
    assert orders() == 1
    with rolled_back():
        Order.objects.create()
        assert orders() == 2
    assert orders() == 1
    with transaction.atomic():
        get_or_set("customers", lambda: 5, cache=alias)
        Order.objects.create()
        assert lookup(alias, "customers") == 5, "that depends on nothing which has changed"


def test_a_rollback_makes_nothing_stale(alias: str, count: Counter) -> None:
    orders = cached_count(count, alias)
    assert orders() == 0
    with rolled_back():
        Order.objects.create()
        invalidate_tags("customers")
    with transaction.atomic(), rolled_back():
        Order.objects.create()
    assert orders() == 0
    assert count.calls == 1


def test_nothing_is_stale_before_the_commit_nor_fresh_before_others_hooks(alias: str) -> None:
    get_or_set("orders", Order.objects.count, depends_on=[Order], cache=alias)
    seen: list[Any] = []
    with transaction.atomic():
        transaction.on_commit(lambda: seen.append(lookup(alias, "orders")))
        Order.objects.create()
        assert seen_by_others(alias, "orders") == 0
    assert seen == [MISSING]


@pytest.mark.parametrize("delivery", ["after_commit", "atomic", "durable"])
def test_every_tier_is_stale_on_the_writers_node_with_its_commit(
    settings: Any, delivery: str
) -> None:
    settings.PGNOTIFY_DELIVERY = delivery
    for durable in (True, False):
        get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
        with transaction.atomic(durable=durable):
            Order.objects.create()
            assert seen_by_others("near", "orders") is not MISSING
        assert lookup("near", "orders") is MISSING
    get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
    Order.objects.create()
    assert lookup("near", "orders") is MISSING
    get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
    with transaction.atomic(), rolled_back():
        Order.objects.create()
    assert lookup("near", "orders") is not MISSING


@contextmanager
def by_hand() -> Iterator[None]:
    """Transactions that Django tells nobody of; the last one is rolled back."""
    transaction.set_autocommit(False)
    try:
        yield
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


def test_a_transaction_by_hand_is_stale_with_its_commit_too() -> None:
    get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near")
    with by_hand():
        Order.objects.create()
        assert seen_by_others("near", "orders") is not MISSING
        transaction.commit()
        assert lookup("near", "orders") is MISSING


def test_what_a_transaction_by_hand_has_written_nobody_else_sees(alias: str) -> None:
    with by_hand():
        assert get_or_set("before", Order.objects.count, cache=alias) == 0
        assert seen_by_others(alias, "before") == 0, "it has only read"
        Order.objects.bulk_create([Order()])
        assert get_or_set("orders", Order.objects.count, cache=alias) == 1
        with transaction.atomic():
            assert get_or_set("within", Order.objects.count, cache=alias) == 1
        for key in ("orders", "within"):
            assert seen_by_others(alias, key) is MISSING
    for key in ("orders", "within"):
        assert lookup(alias, key) is MISSING
    with by_hand():
        Order.objects.bulk_create([Order()])
        assert get_or_set("orders", Order.objects.count, cache=alias) == 1
        transaction.commit()
        assert get_or_set("orders", Order.objects.count, cache=alias) == 1
        assert seen_by_others(alias, "orders") == 1, "the next one has only read"


def test_a_fill_in_a_transaction_by_hand_that_has_written_is_not_made() -> None:
    near = caches["near"]
    assert isinstance(near, NearCache)
    with by_hand():
        Order.objects.bulk_create([Order()])
        assert fill_with_set(near) == 1
        assert seen_by_others("near", "orders") is MISSING


def test_a_transaction_by_hand_sees_what_it_has_changed_itself(alias: str, count: Counter) -> None:
    orders = cached_count(count, alias)
    assert orders() == 0
    with by_hand():
        Order.objects.create()
        assert orders() == 1
        assert seen_by_others(alias, "orders") == 0
        transaction.rollback()
        assert orders() == 0
        assert count.calls == 2
        Order.objects.count()
        assert orders() == 0, "in a transaction of its own"
    assert count.calls == 2


def test_the_publication_after_a_commit_that_changed_what_it_depends_on_is_not_made() -> None:
    """The value was read after the write, but before another one in the same transaction."""
    with transaction.atomic():
        Order.objects.create()
        assert get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near") == 1
        Order.objects.create()
    assert get_or_set("orders", Order.objects.count, depends_on=[Order], cache="near") == 2


@pytest.mark.django_db
def test_in_a_test_case_that_never_commits_values_are_cached_as_ever(count: Counter) -> None:
    orders = cached_count(count, "near")
    Order.objects.bulk_create([Order()])
    assert orders() == orders() == 1
    assert count.calls == 1


def count_others() -> int:
    return Order.objects.using("other").count()


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("inner", ["default", "other"])
def test_a_rollback_of_one_of_two_databases_is_enough(alias: str, inner: str) -> None:
    """The hook of the other one runs with a COMMIT that says nothing of it."""
    outer = "other" if inner == "default" else "default"
    with transaction.atomic(outer):
        Order.objects.using(outer).bulk_create([Order()])
        with rolled_back(inner):
            Order.objects.using(inner).bulk_create([Order()])
            both = get_or_set("both", lambda: Order.objects.count() + count_others(), cache=alias)
            assert both == 2
    assert lookup(alias, "both") is MISSING


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_of_two_databases_the_last_commit_counts(alias: str, names: list[str]) -> None:
    outer, inner = names
    with transaction.atomic(outer):
        Order.objects.using(outer).bulk_create([Order()])
        with transaction.atomic(inner):
            Order.objects.using(inner).bulk_create([Order()])
            get_or_set("both", lambda: Order.objects.count() + count_others(), cache=alias)
        assert seen_by_others(alias, "both") is MISSING
    assert seen_by_others(alias, "both") == 2


# -- leases for those who know the key later -------------------------------------------------------


def test_a_lease_is_good_for_what_was_loaded_since_it_was_taken(alias: str) -> None:
    lease = take_lease(alias, depends_on=[Order])
    with lease:
        value = Order.objects.count()
    assert lease.store("page", value, 60) is True
    assert lookup(alias, "page") == 0
    lease = take_lease(alias, tags=["shelf"])
    with lease:
        get_or_set("part", lambda: 1, depends_on=[Order], cache=alias)
    Order.objects.create()
    assert lease.store("page", "old", 60) is False
    assert lookup(alias, "page") is MISSING


# -- async -----------------------------------------------------------------------------------------


async def test_coroutines_are_cached_and_one_of_many_tasks_loads(alias: str) -> None:
    calls: list[int] = []

    @cached(key="orders", depends_on=[Order], cache=alias)
    async def orders() -> int:
        calls.append(1)
        await asyncio.sleep(0.05)
        return await Order.objects.acount()

    assert iscoroutinefunction(orders)
    assert await asyncio.gather(*(orders() for _ in range(5))) == [0] * 5
    assert len(calls) == 1
    await Order.objects.acreate()
    assert await orders() == 1
    await ainvalidate_tags(model_tag(Order))
    assert await aget_or_set("orders", orders.__wrapped__, cache=alias) == 1
    assert len(calls) == 3


async def test_a_change_while_a_coroutine_loads_is_not_covered_up(alias: str) -> None:
    async def load() -> int:
        found = await Order.objects.acount()
        await Order.objects.acreate()
        return found

    assert await aget_or_set("orders", load, depends_on=[Order], cache=alias) == 0
    assert await aget_or_set("orders", Order.objects.acount, depends_on=[Order], cache=alias) == 1


def test_async_code_within_a_transaction_publishes_nothing_before_the_commit(alias: str) -> None:
    with transaction.atomic():
        Order.objects.bulk_create([Order()])
        found = async_to_sync(aget_or_set)("orders", Order.objects.acount, cache=alias)
        assert found == 1
        assert seen_by_others(alias, "orders") is MISSING
    assert seen_by_others(alias, "orders") == 1
