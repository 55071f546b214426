"""Caches: what a hit costs, when every process of a node has the new value, invalidations/s."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from django.db import transaction
from django.test import override_settings

from benchmarks import listeners
from benchmarks.caching import VALUES, WATCHERS
from benchmarks.databases import database
from benchmarks.figures import percentile
from benchmarks.frame import CannotRun, Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.recording import Recording
from benchmarks.shop.receivers import KEYED, TAGGED
from django_pgnotify import publish_many
from tests import redis_server

CACHING = {"BENCHMARK_CACHES": "1"}
"""In the environment of each process of a node."""

HIT = Metric("", "µs a hit")
P50 = Metric("p50", "ms")
P99 = Metric("p99", "ms")
RATE = Metric("", "invalidations/s", more_is_better=True)

NEAR, LOCMEM, REDIS, LIMIT = "ours, NearCache", "LocMemCache", "Redis", "dict and pickle, no more"
CACHED_NEAR, CACHED_LOCMEM = "ours, cached() on NearCache", "ours, cached() on LocMemCache"
KINDS = {
    NEAR: "near",
    CACHED_NEAR: "cached-near",
    CACHED_LOCMEM: "cached-locmem",
    LOCMEM: "locmem",
    REDIS: "redis",
    LIMIT: "dict",
}
TITLES = {"text": "a hit: a short text", "dict": "a hit: a dict of 20", "large": "a hit: 10 kB"}
OTHER_NODE, OWN_NODE = "ours, a commit on another node", "ours, a commit on this node"
REDIS_KEYS = "Redis, keys deleted by pglisten"
TAGS = "ours, tags in the epoch table"
BUMP = "bump() in one process"


class Program:
    """A process of ``benchmarks.caching`` on the node of a database: a line in, a line out."""

    def __init__(self, alias: str, *arguments: str, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.caching", *arguments],
            env={**os.environ, "BENCHMARK_DATABASE": alias, **CACHING, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def ask(self, line: str) -> list[int]:
        """The numbers that it answers with."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return [int(word) for word in self.hear().split()]

    def hear(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("it has failed")
        return line


@contextmanager
def redis_environ(wanted: bool) -> Iterator[dict[str, str]]:
    """A Redis of its own where it is wanted, and where there is one."""
    if not wanted:
        yield {}
        return
    if why := redis_server.missing():
        raise CannotRun(why)
    with redis_server.redis_server() as url:
        yield {"BENCHMARK_REDIS": url}


# -- hits ------------------------------------------------------------------------------------------


class Node:
    """A database and its ``pglisten``, from the first variant that uses them to the last.

    Its heartbeats are what caches believe in.
    """

    def __init__(self) -> None:
        self._users = 0
        self._stack = ExitStack()
        self._alias = ""

    @contextmanager
    def in_use(self) -> Iterator[str]:
        """The alias of the database."""
        if self._users == 0:
            self._alias = self._stack.enter_context(database())
            listener = listeners.pglisten(self._alias, environ=CACHING)
            self._stack.enter_context(listener)
        self._users += 1
        try:
            yield self._alias
        finally:
            self._users -= 1
            if self._users == 0:
                self._stack.close()


@contextmanager
def hits(node: Node, kind: str, value: str, count: int) -> Iterator[Measure]:
    with ExitStack() as stack:
        environ = stack.enter_context(redis_environ(kind == "redis"))
        alias = stack.enter_context(node.in_use())
        program = stack.enter_context(Program(alias, "hit", kind, value, environ=environ))
        count = count // 20 if kind == "redis" else count

        def measure() -> dict[str, float]:
            [nanoseconds] = program.ask(str(count))
            return {HIT.name: nanoseconds / count / 1e3}

        yield measure


# -- from the commit to every process --------------------------------------------------------------


@contextmanager
def seen_everywhere(kind: str, own: bool, commits: int) -> Iterator[Measure]:
    with ExitStack() as stack:
        environ = stack.enter_context(redis_environ(kind == "redis"))
        alias = stack.enter_context(database())
        caches = {**CACHING, **environ}
        stack.enter_context(listeners.pglisten(alias, environ=caches))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgnotify-bench-")))
        # A node is its epoch table: a writer elsewhere has another one.
        elsewhere = {} if own else {"BENCHMARK_FOLDER": str(folder)}
        writer = stack.enter_context(Program(alias, "write", environ={**environ, **elsewhere}))
        writer.hear()
        watchers = stack.enter_context(Program(alias, "watch", kind, str(folder), environ=environ))
        watchers.hear()
        recordings = [Recording(folder / str(number), make=False) for number in range(WATCHERS)]
        for recording in recordings:
            recording.take(1)
        number = 0

        def measure() -> dict[str, float]:
            nonlocal number
            times = []
            for _ in range(commits):
                number += 1
                _, done = writer.ask(str(number))
                seen = max(recording.take(1)[0] for recording in recordings)
                times.append((seen - done) / 1e6)
                time.sleep(random.uniform(0.0, 0.002))  # not in step with those who look
            return {P50.name: percentile(times, 50), P99.name: percentile(times, 99)}

        yield measure


# -- invalidations a second ------------------------------------------------------------------------


@contextmanager
def through_pglisten(kind: str, count: int) -> Iterator[Measure]:
    """One transaction publishes them all; until the last one has been made."""
    with ExitStack() as stack:
        environ = stack.enter_context(redis_environ(kind == "redis"))
        alias = stack.enter_context(database())
        caches = {**CACHING, **environ}
        stack.enter_context(listeners.pglisten(alias, environ=caches))
        made = stack.enter_context(LAST[kind](alias, environ))
        topic, number = (TAGGED if kind == "near" else KEYED), 0

        def measure() -> dict[str, float]:
            nonlocal number
            numbers = range(number, number + count)
            number += count
            wait = made(numbers[-1])
            with transaction.atomic(using=alias):
                publish_many(topic, [{"number": each} for each in numbers], using=alias)
                begun = time.monotonic_ns()
            wait()
            return {RATE.name: count / (time.monotonic_ns() - begun) * 1e9}

        yield measure


Made = Callable[[int], Callable[[], None]]


@contextmanager
def in_the_table(alias: str, environ: Mapping[str, str]) -> Iterator[Made]:
    from django_pgnotify.epochs.names import tag_name
    from django_pgnotify.epochs.node import node_table

    path = str(Path(os.environ["BENCHMARK_FOLDER"]) / f"epochs-of-{alias}")
    listens = override_settings(PGNOTIFY_EPOCH_TABLE=path, PGNOTIFY_LISTEN_DATABASE=alias)
    with listens:
        table = node_table()

    def made(number: int) -> Callable[[], None]:
        snapshot = table.capture([tag_name(f"number:{number}")])
        return lambda: _until(lambda: not table.is_current(snapshot))

    yield made


@contextmanager
def in_redis(alias: str, environ: Mapping[str, str]) -> Iterator[Made]:
    import redis

    with redis.Redis.from_url(environ["BENCHMARK_REDIS"]) as client:

        def made(number: int) -> Callable[[], None]:
            client.set(f":1:number:{number}", "1")
            return lambda: _until(lambda: not client.exists(f":1:number:{number}"))

        yield made


LAST = {"near": in_the_table, "redis": in_redis}


def _until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s")
        time.sleep(0.0002)


@contextmanager
def bumps(count: int) -> Iterator[Measure]:
    from django_pgnotify.caching import EpochTable

    with tempfile.TemporaryDirectory(prefix="pgnotify-bench-") as folder:
        table = EpochTable.open(Path(folder) / "epochs")
        number = 0

        def measure() -> dict[str, float]:
            nonlocal number
            names = [[f"t:number:{each}"] for each in range(number, number + count)]
            number += count
            begun = time.monotonic_ns()
            for each in names:
                table.bump(each)
            return {RATE.name: count / (time.monotonic_ns() - begun) * 1e9}

        yield measure
        table.close()


# -- the cases -------------------------------------------------------------------------------------


def cases(quick: bool) -> Iterable[Case]:
    count, rounds = (20_000, 3) if quick else (100_000, 11)
    for value in list(VALUES)[: 1 if quick else None]:
        node = Node()
        yield Case(
            TITLES[value],
            metrics=(HIT,),
            variants=tuple(
                Variant(name, partial(hits, node, kind, value, count))
                for name, kind in KINDS.items()
            ),
            reference=LOCMEM,
            rounds=rounds,
            targets=(
                Target(f"{TITLES[value]}, × LocMemCache", HIT.name, NEAR, LOCMEM, at_most=0.6),
                Target(f"{TITLES[value]}, × Redis", HIT.name, NEAR, REDIS, at_most=0.05),
            ),
        )
    commits = 30 if quick else 200
    yield Case(
        f"from save() to the new value in each of {WATCHERS} processes",
        metrics=(P50, P99),
        variants=(
            Variant(OTHER_NODE, partial(seen_everywhere, "near", False, commits)),
            Variant(OWN_NODE, partial(seen_everywhere, "near", True, commits)),
            Variant(REDIS_KEYS, partial(seen_everywhere, "redis", False, commits)),
        ),
        reference=REDIS_KEYS,
        rounds=3 if quick else 9,
    )
    invalidations = 10_000
    yield Case(
        f"{invalidations:,} invalidations",
        metrics=(RATE,),
        variants=(
            Variant(TAGS, partial(through_pglisten, "near", invalidations)),
            Variant(REDIS_KEYS, partial(through_pglisten, "redis", invalidations)),
            Variant(BUMP, partial(bumps, invalidations)),
        ),
        reference=REDIS_KEYS,
        rounds=3 if quick else 9,
    )


SCENARIO = Scenario(
    name="caches",
    title="Caches",
    group="caches",
    text=(
        "A hit is `get()` of one key, again and again, in a process of its own; `cached()` is a "
        "function that depends on a model. *dict and pickle* asks nobody whether the value still "
        f"holds. Then {WATCHERS} processes of a node look every half millisecond for a value that "
        "depends on a table, and read it from the database when it has changed: the time from the "
        "return of `save()` until the last of them has the new one. Redis stands for a cache that "
        "they share, whose keys *pglisten* deletes. At last 10,000 events of one transaction "
        "invalidate a tag or a key each, from before COMMIT to the last of them."
    ),
    cases=cases,
)
