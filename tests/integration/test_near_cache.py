"""NearCache: what other processes and nodes have made stale is never taken.

Another process of the node is a second store over the same table here, another node a second table;
``tests/process/test_near_cache_processes.py`` has real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.cache import caches
from django.core.cache.backends.base import (
    CacheKeyWarning,
    InvalidCacheKey,
    memcache_key_warnings,
)
from django.core.cache.backends.filebased import FileBasedCache

from django_pgnotify.caching import NearCache, get_or_set, invalidate_tags
from django_pgnotify.caching.frozen import freeze
from django_pgnotify.caching.store import NEVER, Store
from django_pgnotify.epochs.clock import NANOSECONDS, node_clock
from django_pgnotify.epochs.names import tag_name
from django_pgnotify.epochs.node import node_table, table_path
from django_pgnotify.exceptions import InvalidSetting
from tests.integration.caching import near_caches

# Changes under a second level are announced to other nodes, by a thread of their own.
ANNOUNCES = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path) -> Iterator[None]:
    """Without a listener: here nothing but other processes makes anything stale."""
    with near_caches(settings, tmp_path, MAX_STALENESS=None):
        yield


def cache(alias: str = "near") -> NearCache:
    backend = caches[alias]
    assert isinstance(backend, NearCache)
    return backend


@pytest.fixture
def other_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NearCache]:
    """Makes the cache that another process of this node has: with memory of its own."""

    def make(alias: str = "near", **options: Any) -> NearCache:
        mine = cache(alias)
        second = mine.level.options.second_level
        extra = {"SECOND_LEVEL": second} if second else {}
        other = NearCache(
            mine.level.space, {"OPTIONS": {"MAX_STALENESS": None, **extra, **options}}
        )
        other.level.store = Store(mine.level.space)
        other._entries = other.level.store.entries
        return other

    return make


@contextlib.contextmanager
def other_node(settings: Any, tmp_path: Path, name: str = "elsewhere") -> Iterator[NearCache]:
    """The layered cache as another node has it: its own table and memory, the same second level."""
    here = settings.PGNOTIFY_EPOCH_TABLE
    settings.PGNOTIFY_EPOCH_TABLE = str(tmp_path / name)
    mine = cache("layered")
    store, entries = mine.level.store, mine._entries
    mine.level.store = Store(mine.level.space)
    mine._entries = mine.level.store.entries
    try:
        yield mine
    finally:
        mine.level.store, mine._entries = store, entries
        settings.PGNOTIFY_EPOCH_TABLE = here


def in_new_context(func: Callable[[], Any]) -> Any:
    """As another request would: without the leases of this one."""
    return contextvars.Context().run(func)


# -- what is stored ----------------------------------------------------------------------------


def test_what_is_set_is_got_until_it_is_deleted() -> None:
    near = cache()
    near.set("a", {"b": [1]})
    assert near.get("a") == {"b": [1]}
    assert near.get("a") is not near.get("a"), "what a caller changes stays the caller's"
    assert near.delete("a") is True
    assert near.delete("a") is False
    assert near.get("a") is None


def test_threads_share_their_entries() -> None:
    cache().set("a", 1)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(cache().get("a")))
    thread.start()
    thread.join()
    assert found == [1]


def test_a_timeout_ends_an_entry_and_jitter_takes_some_of_it_off() -> None:
    near = cache()
    near.set("a", 1, 1000)
    entry = near.level.store.entries[near.make_key("a")]
    assert 990 < (entry.until - node_clock()) / NANOSECONDS <= 1000
    entry.until = entry.expires = node_clock()
    assert near.get("a") is None
    jittered = NearCache("jittered", {"OPTIONS": {"JITTER": 0.5, "MAX_STALENESS": None}})
    rests = set()
    for number in range(50):
        jittered.set(f"k{number}", 1, 1000)
        entry = jittered.level.store.entries[jittered.make_key(f"k{number}")]
        rests.add((entry.until - node_clock()) // NANOSECONDS)
    assert len(rests) > 5
    assert min(rests) >= 499
    assert max(rests) < 1000
    jittered.set("for-ever", 1, None)
    jittered.set("gone", 1, 0)
    assert jittered.get("for-ever") == 1
    assert jittered.get("gone") is None


def test_the_oldest_go_first_and_the_expired_before_them() -> None:
    small = NearCache(
        "small", {"OPTIONS": {"MAX_ENTRIES": 6, "CULL_FREQUENCY": 3, "MAX_STALENESS": None}}
    )
    for number in range(6):
        small.set(f"k{number}", number)
    gone = small.level.store.entries[small.make_key("k5")]
    gone.until = gone.expires = node_clock()
    small.set("k0", "again")  # the youngest now
    small.set("k6", 6)
    left = [key for key in (f"k{number}" for number in range(7)) if key in small]
    assert left == ["k0", "k2", "k3", "k4", "k6"]


def test_an_odd_key_is_warned_of_at_each_use_and_works() -> None:
    near = cache()
    with pytest.warns(CacheKeyWarning):
        near.set("with space", 1)
    for _ in range(2):
        with pytest.warns(CacheKeyWarning):
            assert near.get("with space") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"MAX_STALENESS": 0}, {"MAX_STALENESS": "30"}, {"MAX_STALENESS": True}, {"JITTER": 1},
        {"JITTER": -0.1}, {"JITTER": "some"}, {"SECOND_LEVEL": ""}, {"SECOND_LEVEL": 7},
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(options))):
        NearCache("", {"OPTIONS": options})


# -- other processes of the node -----------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda other: other.set("a", "new"),
        lambda other: other.set_many({"a": "new"}),
        lambda other: other.delete("a"),
        lambda other: other.delete_many(["a", "b"]),
        lambda other: other.clear(),
        lambda other: other.set("a", "gone", 0),
        lambda other: other.add("a", "new"),
    ],
    ids=["set", "set_many", "delete", "delete_many", "clear", "timeout 0", "add"],
)
def test_what_one_process_changes_no_other_takes_any_more(
    other_process: Callable[..., NearCache], change: Callable[[NearCache], Any]
) -> None:
    mine, other = cache(), other_process()
    mine.set("a", "old")
    assert mine.get("a") == "old"
    change(other)
    assert mine.get("a") is None


@pytest.mark.parametrize("change", ["incr", "touch"])
def test_what_one_process_makes_of_a_value_ends_the_copies_of_the_others(
    other_process: Callable[..., NearCache], change: str
) -> None:
    mine, other = cache(), other_process()
    mine.set("a", 1)
    full = mine.make_key("a")
    snapshot = mine.level.store.entries[full].snapshot
    other.level._put(full, freeze(1), NEVER, snapshot)  # as it may have got it from the source
    assert other.get("a") == 1
    assert getattr(other, change)("a")
    assert mine.get("a") is None
    assert other.get("a") == (2 if change == "incr" else 1)


def test_a_value_made_of_one_that_is_invalidated_meanwhile_is_stale(
    other_process: Callable[..., NearCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """incr and touch must not put an epoch of after the invalidation under a value of before."""
    mine, other = cache(), other_process()
    for change in (lambda: mine.incr("a"), lambda: mine.touch("a", 100)):
        mine.set("a", 1)
        derive = mine.level.derive

        def invalidated_first(*args: Any, derive: Any = derive) -> Any:
            other.delete("a")
            return derive(*args)

        with monkeypatch.context() as patched:
            patched.setattr(mine.level, "derive", invalidated_first)
            change()
        assert mine.get("a") is None


def test_fills_of_several_processes_leave_each_others_copies_alone(
    other_process: Callable[..., NearCache],
) -> None:
    """Or each fill would make the others miss, whose fill makes this one miss, for ever."""
    processes = [cache(), *(other_process() for _ in range(3))]
    for process in processes:
        assert process.get("a") is None
        process.set("a", "of the database")
    assert [process.get("a") for process in processes] == ["of the database"] * 4
    for process in processes:
        assert process.get_or_set("b", lambda: "made") == "made"
    assert [process.get("b") for process in processes] == ["made"] * 4


def test_a_value_that_was_loaded_before_a_change_is_not_stored_after_it(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache(), other_process()
    assert mine.get("a") is None
    in_new_context(lambda: other.delete("a"))  # the row changes between the miss and the fill
    mine.set("a", "read before")
    assert mine.get("a") is None
    assert mine.stats()["refused"] == 1


def test_the_fill_of_a_miss_keeps_the_tags_epochs_of_before_the_miss() -> None:
    mine = cache()
    assert mine.get("a") is None
    node_table().bump([tag_name("shelf")])
    mine.set("a", "read before", tags=["shelf"])
    assert mine.get("a") is None
    mine.set("a", "read after", tags=["shelf"])
    assert mine.get("a") == "read after"
    node_table().bump([tag_name("shelf")])
    assert mine.get("a") is None


@pytest.mark.parametrize("alias", ["near", pytest.param("layered", marks=ANNOUNCES)])
def test_however_many_keys_are_missed_at_once_what_was_read_before_a_change_is_not_stored(
    alias: str,
) -> None:
    mine, keys = cache(alias), [f"k{number}" for number in range(100)]
    assert mine.get_many(keys) == {}
    node_table().bump([tag_name("shelf")])
    mine.set_many(dict.fromkeys(keys, "read before"), tags=["shelf"])
    assert mine.get_many(keys) == {}
    mine.set_many(dict.fromkeys(keys, "read after"), tags=["shelf"])
    assert mine.get_many(keys) == dict.fromkeys(keys, "read after")


@ANNOUNCES
async def test_nor_by_the_async_half() -> None:
    mine, keys = cache("layered"), [f"k{number}" for number in range(100)]
    assert await mine.aget_many(keys) == {}
    node_table().bump([tag_name("shelf")])
    await mine.aset_many(dict.fromkeys(keys, "read before"), tags=["shelf"])
    assert await mine.aget_many(keys) == {}


@pytest.mark.parametrize("many", [True, False])
def test_however_many_are_missed_one_by_one_neither(many: bool) -> None:
    mine, keys = cache(), [f"k{number}" for number in range(300)]
    for key in keys:
        assert mine.get(key) is None
    node_table().bump([tag_name("shelf")])
    if many:
        mine.set_many(dict.fromkeys(keys, "read before"), tags=["shelf"])
    else:
        for key in keys:
            mine.set(key, "read before", tags=["shelf"])
    assert mine.get_many(keys) == {}


def test_the_fills_of_many_leave_the_copies_of_others_alone(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache(), other_process()
    values = {f"k{number}": number for number in range(300)}
    for near in (mine, other):
        assert near.get_many(values) == {}
        near.set_many(values)
    assert mine.get_many(values) == other.get_many(values) == values


@ANNOUNCES
def test_a_miss_of_many_that_the_second_level_had_is_used_up(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache("layered"), other_process("layered")
    mine.set("a", 1)
    assert other.get_many(["a", "b"]) == {"a": 1}
    node_table().bump([tag_name("shelf")])
    other.set("a", "said now", tags=["shelf"])
    assert mine.get("a") == "said now"


def test_a_miss_within_a_load_does_not_use_up_the_lease_of_the_load() -> None:
    """outer: get, load (inner: get, load, set), set — with a change before the inner get."""
    mine = cache()
    assert mine.get("a") is None
    node_table().bump_all()
    assert mine.get("a") is None
    mine.set("a", "inner")
    assert mine.get("a") == "inner"
    mine.delete("a")
    assert mine.get("a") is None
    node_table().bump_all()
    assert mine.get("a") is None
    mine.set("a", "inner")
    mine.set("a", "outer, read before")
    assert mine.get("a") != "outer, read before"


def test_a_miss_of_somebody_elses_request_is_no_lease_for_this_one() -> None:
    mine = cache()
    assert in_new_context(lambda: mine.get("a")) is None
    node_table().bump_all()
    mine.set("a", "said now")
    assert mine.get("a") == "said now"


async def test_each_task_has_the_leases_of_its_own_misses() -> None:
    mine = cache()
    ready = asyncio.Barrier(2)

    async def load(value: str, *, late: bool) -> None:
        if late:
            await ready.wait()
        assert await mine.aget("a") is None
        if not late:
            await ready.wait()
            await ready.wait()
        else:
            node_table().bump_all()
            await ready.wait()
            return
        await mine.aset("a", value)

    await asyncio.gather(load("read before", late=False), load("", late=True))
    assert await mine.aget("a") is None


def test_a_set_behind_ones_own_delete_is_no_fill() -> None:
    mine = cache()
    assert mine.get("a") is None
    mine.delete("a")
    mine.set("a", 1)
    assert mine.get("a") == 1
    assert mine.get("b") is None
    mine.clear()
    mine.set("b", 1)
    assert mine.get("b") == 1


def test_a_set_long_after_a_miss_tells_the_other_processes(
    other_process: Callable[..., NearCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that misses now and stores something else an hour later does not fill."""
    mine, other = cache(), other_process()
    assert mine.get("a") is None
    other.set("a", "old")
    mine.close()  # the end of the request
    mine.set("a", "new")
    assert other.get("a") is None
    assert mine.get("b") is None
    assert other.get_or_set("b", lambda: "old") == "old"
    monkeypatch.setattr("django_pgnotify.caching.leases.FILL_WITHIN", -1)
    mine.set("b", "new")
    assert other.get("b") is None
    assert mine.get("b") == "new"


def test_two_who_set_at_once_do_not_both_keep_their_value(
    other_process: Callable[..., NearCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = cache(), other_process()
    bump = mine.level._bump

    def overtaken(names: list[str]) -> int:
        stamp = bump(names)
        other.set("a", "theirs")
        return stamp

    with monkeypatch.context() as patched:
        patched.setattr(mine.level, "_bump", overtaken)
        mine.set("a", "mine")
    assert mine.get("a") is None
    assert other.get("a") == "theirs"


def test_increments_of_threads_are_all_counted() -> None:
    mine = cache()
    mine.set("n", 0)

    def count() -> None:
        for _ in range(200):
            mine.incr("n")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mine.get("n") == 800


def test_of_threads_that_add_a_key_at_once_one_does() -> None:
    mine, added = cache(), []
    barrier = threading.Barrier(4)

    def add(number: int) -> None:
        barrier.wait()
        if mine.add("lock", number):
            added.append(number)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1
    assert mine.get("lock") == added[0]


def test_an_add_that_stores_nothing_says_so() -> None:
    mine = cache()
    assert mine.get("a") is None
    node_table().bump([tag_name("shelf")])
    assert mine.add("a", "read before", tags=["shelf"]) is False
    assert mine.add("a", "read after", tags=["shelf"]) is True
    assert mine.add("b", "gone at once", 0) is True


# -- the heartbeat -------------------------------------------------------------------------------


def test_without_a_heartbeat_nothing_is_taken_and_with_one_again_it_is(settings: Any) -> None:
    strict = NearCache("strict", {"OPTIONS": {"MAX_STALENESS": 30}})
    table = node_table()
    strict.set("a", 1)
    assert strict.get("a") is None, "there never was one"
    table.beat(node_clock())
    assert strict.get("a") == 1
    table.words[8] = node_clock() - 31 * NANOSECONDS
    assert strict.get("a", "nothing") == "nothing"
    assert strict.get_many(["a"]) == {}
    assert "a" not in strict
    assert strict.add("a", 2) is True
    counts = strict.stats()
    assert counts["bypassed"] >= 4
    table.beat(node_clock())
    assert strict.get("a") == 2
    table.words[8] = node_clock() - 29 * NANOSECONDS
    assert strict.get("a") == 2


def test_a_table_that_cannot_be_used_is_an_empty_cache_and_one_error(
    settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken").write_bytes(b"no table")
    settings.PGNOTIFY_EPOCH_TABLE = str(tmp_path / "broken")
    with caplog.at_level(logging.ERROR, "django_pgnotify"):
        strict = NearCache("broken", {"OPTIONS": {"MAX_STALENESS": 30}})
        strict.set("a", 1)
        assert strict.get("a") is None
        assert strict.get_or_set("a", lambda: 2) == 2
        careless = NearCache("broken", {"OPTIONS": {"MAX_STALENESS": None}})
        careless.set("a", 1)
        assert careless.get("a") is None, "nobody could tell this process of a change"
        assert careless.level.store.entries == {}, "nor whoever looks when the next table dies"
        assert node_table().bump(["a"]) > 0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "broken" in caplog.text


def test_a_table_that_is_taken_away_under_a_running_process_ends_what_is_cached(
    settings: Any,
) -> None:
    mine = cache()
    mine.set("a", 1)
    os.unlink(settings.PGNOTIFY_EPOCH_TABLE)
    mine.level.table.checked_until = 0  # 50 ms later
    assert mine.get("a") is None
    mine.set("a", 2)
    assert mine.get("a") == 2
    assert os.path.exists(settings.PGNOTIFY_EPOCH_TABLE)


def test_a_table_that_dies_while_a_cache_is_asked_lets_no_stale_value_through(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PGNOTIFY_MAX_STALENESS = None
    get_or_set("a", lambda: "old", tags=["shelf"], cache="files")
    node_table().bump([tag_name("shelf")])
    backend = type(caches["files"])
    get = backend.get

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = get(self, *args, **kwargs)
        path = Path(settings.PGNOTIFY_EPOCH_TABLE)
        path.unlink()
        path.write_bytes(b"no table")
        node_table().verify(node_clock())  # as another thread does
        return found

    monkeypatch.setattr(backend, "get", dying)
    assert get_or_set("a", lambda: "new", tags=["shelf"], cache="files") == "new"


def test_who_becomes_another_user_has_that_users_table(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PGNOTIFY_EPOCH_TABLE = "auto"
    path = table_path()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert table_path() != path, "gunicorn starts as root and forks workers of another user"


# -- the second level ----------------------------------------------------------------------------


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the second level is asked for."""
    asked: list[str] = []
    backend = type(caches["files"])
    get = backend.get

    def noted(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(key)
        return get(self, key, *args, **kwargs)

    monkeypatch.setattr(backend, "get", noted)
    return asked


@ANNOUNCES
def test_a_restarted_process_finds_what_was_cached_with_one_look_up_each(
    other_process: Callable[..., NearCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = cache("layered")
    mine.set("a", {"b": [1]}, tags=["shelf"])
    mine.set("b", 2)
    restarted = other_process("layered")
    asked = looks(monkeypatch)
    assert restarted.get("a") == restarted.get("a") == {"b": [1]}
    assert restarted.get_many(["a", "b"]) == {"a": {"b": [1]}, "b": 2}
    assert len(asked) == 2
    assert restarted.stats()["second_level_hits"] == 2
    node_table().bump([tag_name("shelf")])
    assert restarted.get("a") is None
    assert restarted.get("b") == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda other: other.set("a", "new"),
        lambda other: other.delete("a"),
        lambda other: other.clear(),
        lambda other: node_table().bump([tag_name("shelf")]),
        lambda other: node_table().bump_all(),
    ],
    ids=["set", "delete", "clear", "tag", "gap"],
)
@ANNOUNCES
def test_the_second_level_is_no_way_round_an_invalidation(
    other_process: Callable[..., NearCache], change: Callable[[NearCache], Any]
) -> None:
    mine, other = cache("layered"), other_process("layered")
    mine.set("a", "old", tags=["shelf"])
    there = mine.level.second_key(mine.make_key("a"))
    stored = caches["files"].get(there)
    assert stored is not None
    change(other)
    if caches["files"].get(there) is None:
        caches["files"].set(there, stored)  # written late, by a slow process
    assert mine.get("a") in (None, "new")


def beside(settings: Any, **config: Any) -> NearCache:
    """Another NearCache over the second level of ``layered``."""
    alias = {**settings.CACHES["layered"], "LOCATION": "beside", **config}
    settings.CACHES = {**settings.CACHES, "beside": alias}
    return cache("beside")


@ANNOUNCES
def test_caches_over_one_second_level_are_told_apart_by_their_location(settings: Any) -> None:
    other = beside(settings)
    mine = cache("layered")
    mine.set("a", "mine")
    mine.set_many({"b": "mine", "c": "mine"})
    assert other.get("a") is None
    assert other.get_many(["a", "b"]) == {}
    assert other.add("b", "others'") is True
    other.set("c", "others'")
    other.delete("a")
    other.delete_many(["a"])
    for near in (mine, other):
        near.level.store.clear()
    assert mine.get_many(["a", "b", "c"]) == {"a": "mine", "b": "mine", "c": "mine"}
    assert other.get_many(["a", "b", "c"]) == {"b": "others'", "c": "others'"}


@ANNOUNCES
async def test_the_async_half_tells_them_apart_too(settings: Any) -> None:
    other = beside(settings)
    mine = cache("layered")
    await mine.aset("a", "mine")
    await mine.aset_many({"b": "mine", "c": "mine"})
    assert await other.aget("a") is None
    assert await other.aget_many(["a", "b"]) == {}
    assert await other.aadd("b", "others'") is True
    await other.aset("c", "others'")
    await other.adelete("a")
    await other.adelete_many(["a"])
    for near in (mine, other):
        near.level.store.clear()
    assert await mine.aget_many(["a", "b", "c"]) == {"a": "mine", "b": "mine", "c": "mine"}
    assert await other.aget_many(["a", "b", "c"]) == {"b": "others'", "c": "others'"}


@ANNOUNCES
def test_what_another_cache_has_stored_under_a_key_is_not_taken(settings: Any) -> None:
    other = beside(settings)
    mine = cache("layered")
    mine.set("a", "mine")
    full = mine.make_key("a")
    caches["files"].set(
        other.level.second_key(full), caches["files"].get(mine.level.second_key(full))
    )
    assert other.get("a") is None


class Choosy(FileBasedCache):
    """Refuses the keys that memcached refuses."""

    def validate_key(self, key: str) -> None:
        for warning in memcache_key_warnings(key):
            raise InvalidCacheKey(warning)


@ANNOUNCES
def test_every_key_that_memcached_takes_can_be_in_a_second_level_of_its(settings: Any) -> None:
    files = {**settings.CACHES["files"], "BACKEND": f"{__name__}.Choosy", "KEY_PREFIX": "x" * 40}
    settings.CACHES = {**settings.CACHES, "files": files}
    mine = beside(settings, LOCATION="a place, of some name " * 20)
    keys = ["k" * 247, "k" * 246 + "l"]
    for key in keys:
        mine.set(key, key)
    mine.level.store.clear()
    assert mine.get_many(keys) == dict(zip(keys, keys, strict=True))
    assert mine.delete(keys[0]) is True
    mine.level.store.clear()
    assert mine.get_many(keys) == {keys[1]: keys[1]}


@ANNOUNCES
def test_a_fill_that_was_overtaken_is_not_in_the_second_level_either(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache("layered"), other_process("layered")
    assert mine.get("a") is None
    in_new_context(lambda: other.delete("a"))
    mine.set("a", "read before")
    assert other.get("a") is None


@ANNOUNCES
def test_another_node_takes_what_was_loaded_after_its_last_invalidation_only(
    settings: Any, tmp_path: Path
) -> None:
    settings.PGNOTIFY_CLOCK_SKEW = 0.001
    with other_node(settings, tmp_path) as there:
        node_table()  # begins now
    time.sleep(0.01)  # more than the skew: what the clocks may be apart
    mine = cache("layered")
    mine.set("a", "loaded here", tags=["shelf"])
    with other_node(settings, tmp_path) as there:
        assert there.get("a") == "loaded here"
        node_table().bump([tag_name("shelf")])
        assert there.get("a") is None
    assert mine.get("a") == "loaded here", "this node has not heard of it yet"


def say(near: NearCache) -> None:
    near.set("a", "of here")


def fill(near: NearCache) -> None:
    near.get_or_set("a", "of here")


def fill_by_hand(near: NearCache) -> None:
    assert near.get("a") is None
    near.set("a", "of here")


def add_it(near: NearCache) -> None:
    assert near.add("a", "of here") is True


@pytest.mark.parametrize(
    ("store", "reaches"), [(fill, True), (fill_by_hand, True), (add_it, True), (say, False)]
)
@ANNOUNCES
def test_what_was_filled_reaches_a_node_that_has_heard_of_all_and_what_was_said_does_not(
    settings: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: Callable[[NearCache], None],
    reaches: bool,
) -> None:
    """As the documentation says of values that other nodes are to share."""
    settings.PGNOTIFY_CLOCK_SKEW = 0.001
    with other_node(settings, tmp_path):
        node_table()  # begins now
    time.sleep(0.01)  # more than the skew: what the clocks may be apart
    announced: list[str] = []
    monkeypatch.setattr("django_pgnotify.caching.level.announce", announced.extend)
    store(cache("layered"))
    with other_node(settings, tmp_path) as there:
        if announced:
            node_table().bump(announced)
        assert there.get("a") == ("of here" if reaches else None)
        assert there.get_or_set("a", "of there") == ("of here" if reaches else "of there")


@ANNOUNCES
def test_within_the_clock_skew_of_an_invalidation_another_nodes_value_is_not_taken(
    settings: Any, tmp_path: Path
) -> None:
    settings.PGNOTIFY_CLOCK_SKEW = 3600.0
    with other_node(settings, tmp_path) as there:
        node_table()
    cache("layered").set("a", "loaded here")
    with other_node(settings, tmp_path) as there:
        assert there.get("a") is None


@ANNOUNCES
def test_what_comes_from_the_second_level_expires_when_it_should_have(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache("layered"), other_process("layered")
    mine.set("a", 1, 100)
    assert other.get("a") == 1
    entry = other.level.store.entries[other.make_key("a")]
    assert 90 < (entry.until - node_clock()) / NANOSECONDS <= 100
    assert mine.touch("a", 1000)
    assert other.get("a") == 1
    entry = other.level.store.entries[other.make_key("a")]
    assert 900 < (entry.until - node_clock()) / NANOSECONDS <= 1000


@ANNOUNCES
def test_add_and_incr_work_across_processes_with_a_second_level(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache("layered"), other_process("layered")
    assert mine.add("lock", 1) is True
    assert other.add("lock", 2) is False
    assert other.incr("lock") == 2
    assert mine.incr("lock") == 3
    assert other.get("lock") == 3
    node_table().bump_all()
    assert other.add("lock", 5) is True, "what is there does not count"
    assert mine.get("lock") == 5


class Slow:
    """Has another process do something, once, behind the look of an add() into the second level."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.meanwhile: Callable[[], Any] | None = None
        backend = type(caches["files"])
        get = backend.get

        def slow(this: Any, *args: Any, **kwargs: Any) -> Any:
            found = get(this, *args, **kwargs)
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                in_new_context(meanwhile)
            return found

        monkeypatch.setattr(backend, "get", slow)


def add(near: NearCache, value: str) -> bool:
    return near.add("lock", value)


def aadd(near: NearCache, value: str) -> bool:
    return async_to_sync(near.aadd)("lock", value)


@pytest.mark.parametrize("add", [add, aadd], ids=["sync", "async"])
@pytest.mark.parametrize("before", ["nothing", "what does not count", "something else's"])
@pytest.mark.parametrize("missed", [False, True], ids=["", "after a get"])
@ANNOUNCES
def test_of_processes_that_add_a_key_at_once_one_does(
    other_process: Callable[..., NearCache],
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[NearCache, str], bool],
    before: str,
    missed: bool,
) -> None:
    mine, other, third = cache("layered"), other_process("layered"), other_process("layered")
    if before == "what does not count":
        other.set("lock", "stale")
        node_table().bump_all()
    elif before != "nothing":
        caches["files"].set(mine.level.second_key(mine.make_key("lock")), "no value of ours")
    if missed:
        assert mine.get("lock") is None
    slow, added = Slow(monkeypatch), []
    slow.meanwhile = lambda: added.append(add(other, "theirs"))
    assert add(mine, "mine") is False
    assert added == [True]
    assert mine.level.store.entries == {}, "nobody in this process was to see it"
    assert [near.get("lock") for near in (other, mine, third)] == ["theirs"] * 3
    assert add(third, "a third") is False


@ANNOUNCES
def test_after_each_gap_a_key_can_be_added_again(other_process: Callable[..., NearCache]) -> None:
    mine, other = cache("layered"), other_process("layered")
    for near in (mine, other, mine):
        assert near.add("lock", 1) is True
        assert mine.add("lock", 2) is other.add("lock", 2) is False
        node_table().bump_all()


@ANNOUNCES
def test_an_add_of_what_was_changed_meanwhile_adds_nothing_and_says_so(
    other_process: Callable[..., NearCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = cache("layered"), other_process("layered")
    slow = Slow(monkeypatch)
    slow.meanwhile = lambda: other.delete("lock")
    assert mine.add("lock", "mine") is False
    assert other.add("lock", "theirs") is True


@ANNOUNCES
async def test_the_async_half_of_the_second_level(
    other_process: Callable[..., NearCache],
) -> None:
    mine, other = cache("layered"), other_process("layered")
    await mine.aset("a", 1)
    await mine.aset_many({"b": [2], "c": 3})
    assert await other.aget_many(["a", "b", "c"]) == {"a": 1, "b": [2], "c": 3}
    assert await other.aincr("a") == 2
    assert await mine.aget("a") == 2
    assert await mine.aadd("a", 9) is False
    assert await mine.atouch("a", 50) is True
    assert await other.adelete("a") is True
    assert await mine.aget("a") is None
    await other.adelete_many(["b"])
    assert await mine.ahas_key("b") is False
    await other.aclear()
    assert await mine.aget("c") is None


# -- counts --------------------------------------------------------------------------------------


def test_what_happens_is_counted_by_tag_too() -> None:
    mine = NearCache("counted", {"OPTIONS": {"MAX_STALENESS": None}})
    mine.get("a")
    mine.set("a", 1, tags=["shelf", "top"])
    for _ in range(3):
        mine.get("a")
    node_table().bump([tag_name("top")])
    mine.get("a")
    counts = mine.stats()
    assert counts["misses"] == 1
    assert counts["hits"] == 3
    assert counts["stale"] == 1
    assert counts["fills"] == 1
    assert counts["tags"]["shelf"] == {"fills": 1, "hits": 3, "stale": 1}
    assert counts["entries"] == 0


@pytest.mark.parametrize("tags", ["shelf", [""], [7], 7])
def test_tags_that_are_none_are_refused(tags: Any) -> None:
    from django_pgnotify.exceptions import InvalidArgument

    with pytest.raises(InvalidArgument, match="tag"):
        cache().set("a", 1, tags=tags)
    if isinstance(tags, list):
        with pytest.raises(InvalidArgument, match="tag"):
            invalidate_tags(*tags)
