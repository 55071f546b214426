"""Processes that read caches, and one that writes: what a node of a deployment is made of.

python -m benchmarks.caching hit KIND VALUE     reads COUNT from its standard input, prints ns
python -m benchmarks.caching watch KIND FOLDER  forks WATCHERS, which record each new value
python -m benchmarks.caching write LABEL        saves a row for each line, prints when
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recording import SLOTS, VARIABLE, recorder

CONTEXT = multiprocessing.get_context("fork")
WATCHERS = 8
POLL = 0.0005
KEY = "watched"

VALUES: dict[str, Any] = {
    "text": "a short text",
    "dict": {f"field {number}": number * 1.5 for number in range(20)},
    "large": "x" * 10_000,
}


# -- hits ------------------------------------------------------------------------------------------


def of_cache(alias: str) -> Callable[[Any], Callable[[], Any]]:
    """``get()`` of a cache, called as a view calls it."""

    def prepare(value: Any) -> Callable[[], Any]:
        from django.core.cache import caches

        cache, key = caches[alias], f"got-from-{alias}"
        cache.set(key, value, None)
        return lambda: cache.get(key)

    return prepare


def of_cached(alias: str) -> Callable[[Any], Callable[[], Any]]:
    """A function with ``cached`` that depends on a model."""

    def prepare(value: Any) -> Callable[[], Any]:
        from benchmarks.shop.models import AfterCommit
        from django_pgnotify.caching import cached

        @cached(key=f"cached-in-{alias}", timeout=None, depends_on=[AfterCommit], cache=alias)
        def look_up() -> Any:
            return value

        look_up()
        return look_up

    return prepare


def of_dict(value: Any) -> Callable[[], Any]:
    """A dict with pickled values, validated by nothing: less cannot be done."""
    pickled = {KEY: pickle.dumps(value, pickle.HIGHEST_PROTOCOL)}
    loads = pickle.loads
    return lambda: loads(pickled[KEY])


HITS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "near": of_cache("near"),
    "locmem": of_cache("default"),
    "redis": of_cache("redis"),
    "dict": of_dict,
    "cached-near": of_cached("near"),
    "cached-locmem": of_cached("default"),
}


def hit(kind: str, value: str) -> None:
    """Time hits; the loop around them is part of it, for all alike."""
    import django

    django.setup()
    call = HITS[kind](VALUES[value])
    for line in sys.stdin:
        if call() != VALUES[value]:
            raise SystemExit(f"{kind} gives {call()!r}")
        times = itertools.repeat(None, int(line))
        begun = time.perf_counter_ns()
        for _ in times:
            call()
        print(time.perf_counter_ns() - begun, flush=True)


# -- watchers --------------------------------------------------------------------------------------


def watch(kind: str, folder: str) -> None:
    """Fork WATCHERS that ask for a value again and again; each notes when it has a new one."""
    import django

    django.setup()
    from django.db import connections

    processes = []
    for number in range(WATCHERS):
        path = Path(folder) / str(number)
        path.write_bytes(bytes(SLOTS * 8))
        processes.append(CONTEXT.Process(target=_watch, args=(kind, path), daemon=True))
    connections.close_all()
    for process in processes:
        process.start()
    print("watching", flush=True)
    sys.stdin.read()


def _watch(kind: str, path: Path) -> None:
    os.environ[VARIABLE] = str(path)
    record = recorder()
    look_up = WATCHED[kind]()
    last = look_up()
    record(None)
    while True:
        time.sleep(POLL)
        if (value := look_up()) != last:
            last = value
            record(None)


def latest() -> int:
    """What is cached: the number of the last row."""
    from benchmarks.shop.models import AfterCommit

    return (
        AfterCommit._default_manager.order_by("-pk").values_list("number", flat=True).first() or 0
    )


def watched_near() -> Callable[[], int]:
    from benchmarks.shop.models import AfterCommit
    from django_pgnotify.caching import cached

    return cached(key=KEY, timeout=None, depends_on=[AfterCommit], cache="near")(latest)


def watched_redis() -> Callable[[], int]:
    """The everyday idiom, on a key that ``pglisten`` deletes."""
    from django.core.cache import caches

    redis = caches["redis"]

    def look_up() -> int:
        value = redis.get(KEY)
        if value is None:
            value = latest()
            redis.set(KEY, value, None)
        return int(value)

    return look_up


WATCHED: dict[str, Callable[[], Callable[[], int]]] = {
    "near": watched_near,
    "redis": watched_redis,
}


# -- a writer --------------------------------------------------------------------------------------


def write() -> None:
    """A process of the node that saves rows."""
    import django

    django.setup()
    from benchmarks.shop.models import AfterCommit

    AfterCommit(number=0).save()
    print("writing", flush=True)
    for line in sys.stdin:
        row = AfterCommit(number=int(line))
        before = time.monotonic_ns()
        row.save()
        print(before, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {"hit": hit, "watch": watch, "write": write}
    programs[sys.argv[1]](*sys.argv[2:])
