"""Durable topics: a burst through the log, and what a sweep costs when the log is large."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from django.db import connections, transaction

from benchmarks import listeners, ways
from benchmarks.databases import database
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.scenarios.burst import data, insert_for
from benchmarks.shop.receivers import LOG
from django_pgnotify import publish_many
from django_pgnotify.durable.cursor import Cursor, LogReader
from django_pgnotify.durable.state import current_snapshot

Emit = Callable[[str, int], None]

RATE = Metric("", "events/s", more_is_better=True)
SWEEP = Metric("a sweep that finds one event", "µs")
EMPTY = Metric("one that finds none", "µs")

OURS = "ours, one consumer"
STORED = "django-pgpubsub, stored"
CONSUMERS = 10
SWEEPS = 50

_FILL = """
    INSERT INTO pgnotify_event_log (topic, source, body, created_at)
    SELECT (ARRAY[%s, 'one', 'two', 'three'])[1 + number %% 4], 'web1:4711',
           '{"id":"0123456789abcdef-1","action":"published","at":1735689600.0,"data":{"number":1}}',
           now() - interval '1 day'
    FROM generate_series(1, %s) AS number
"""


def publish_all(alias: str, count: int) -> None:
    publish_many(LOG, map(data, range(count)), using=alias)


@contextmanager
def burst(
    listen: listeners.Listen, emit: Emit, count: int, consumers: int = 1
) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:

        def measure() -> dict[str, float]:
            with transaction.atomic(using=alias):
                emit(alias, count)
                begun = time.monotonic_ns()
            calls = listener.take(count * consumers)
            return {RATE.name: count / (max(calls) - begun) * 1e9}

        yield measure


def pglisten(kind: str, consumers: int = 1) -> listeners.Listen:
    environ = {"BENCHMARK_RECEIVERS": str(consumers)}
    return partial(listeners.pglisten, receiver=kind, environ=environ)


@contextmanager
def sweeps(size: int, long_transaction: bool) -> Iterator[Measure]:
    """Read what is new beside ``size`` old rows, without any listener."""
    with database() as alias:
        with connections[alias].cursor() as cursor:
            for _ in range(max(1, size // 1_000_000)):
                cursor.execute(_FILL, [LOG.name, min(size, 1_000_000)])
            cursor.execute("VACUUM ANALYZE pgnotify_event_log")
        other = connections[alias].copy("long")
        if long_transaction:
            with other.cursor() as cursor:
                other.set_autocommit(False)
                cursor.execute("SELECT pg_current_xact_id()")

        def measure() -> dict[str, float]:
            reader, place = LogReader(alias, (LOG.name,)), Cursor(current_snapshot(alias))
            full = empty = 0
            for _ in range(SWEEPS):
                publish_all(alias, 1)
                begun = time.monotonic_ns()
                page = reader.next_page(place)
                read = time.monotonic_ns()
                assert len(page.events) == 1
                place = reader.next_page(page.end).end
                full += read - begun
                empty += time.monotonic_ns() - read
            return {SWEEP.name: full / SWEEPS / 1e3, EMPTY.name: empty / SWEEPS / 1e3}

        try:
            yield measure
        finally:
            if long_transaction:
                other.rollback()
            other.close()


def cases(quick: bool) -> Iterable[Case]:
    stored = partial(burst, listeners.pgpubsub, partial(insert_for, ways.PUBSUB_STORED))
    for count, rounds in ((1_000, 9), *([] if quick else [(10_000, 5)])):
        variants = [
            Variant(OURS, partial(burst, pglisten("durable"), publish_all, count)),
            Variant(
                "ours, transactional", partial(burst, pglisten("transactional"), publish_all, count)
            ),
            Variant(
                f"ours, {CONSUMERS} consumers, each",
                partial(burst, pglisten("durable", CONSUMERS), publish_all, count, CONSUMERS),
            ),
            Variant(STORED, partial(stored, count)),
        ]
        yield Case(
            f"{count:,} events",
            metrics=(RATE,),
            variants=tuple(variants),
            reference=STORED,
            rounds=3 if quick else rounds,
            targets=(
                Target(
                    f"{count:,} events, × its stored mode", RATE.name, OURS, STORED, at_least=20
                ),
            ),
        )
    yield _sweep_case(quick)


def _sweep_case(quick: bool) -> Case:
    sizes = [10_000, 100_000, *([] if quick else [1_000_000, 10_000_000])]
    names = {size: f"{size:,} rows" for size in sizes}
    largest = sizes[-1]
    variants = [Variant(names[size], partial(sweeps, size, False)) for size in sizes]
    held = f"{largest:,} rows, a long transaction open"
    variants.append(Variant(held, partial(sweeps, largest, True)))
    return Case(
        "time of a sweep",
        metrics=(SWEEP, EMPTY),
        variants=tuple(variants),
        reference=names[sizes[0]],
        rounds=3 if quick else 9,
        targets=tuple(
            Target(f"a sweep beside {name}", SWEEP.name, name, names[sizes[0]], at_most=1.5)
            for name in (names[largest], held)
        ),
    )


SCENARIO = Scenario(
    name="durable",
    title="Durable topics",
    group="durable",
    text=(
        "Events written to the log in one transaction, from before COMMIT to the last call of a "
        "consumer; with ten consumers each gets all of them. django-pgpubsub's stored mode is what "
        "it has that outlives a listener. A sweep is one look into the log for what is new."
    ),
    cases=cases,
)
