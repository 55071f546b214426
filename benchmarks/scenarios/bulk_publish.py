"""Many publish() calls in one transaction."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from django.db import connections, transaction

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.frame import Case, Measure, Metric, Scenario, Variant
from benchmarks.scenarios.burst import Emit, data, notify_each_on_commit, publish_each
from benchmarks.shop.naive import BURST
from django_pgnotify import publish

COST = Metric("", "µs each")
NAIVE = "naive, on_commit each"


def publish_each_atomic(alias: str, count: int) -> None:
    for number in range(count):
        publish(BURST, data(number), using=alias, delivery="atomic")


VARIANTS: dict[str, tuple[listeners.Listen, Emit]] = {
    "ours, after_commit": (listeners.pglisten, publish_each),
    "ours, atomic": (listeners.pglisten, publish_each_atomic),
    NAIVE: (listeners.naive, notify_each_on_commit),
}


@contextmanager
def measured(listen: listeners.Listen, emit: Emit, count: int) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:
        connections[alias].ensure_connection()

        def measure() -> dict[str, float]:
            begun = time.monotonic_ns()
            with transaction.atomic(using=alias):
                emit(alias, count)
            took = time.monotonic_ns() - begun
            listener.take(count)
            return {COST.name: took / count / 1e3}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    for count in (100, 1_000):
        yield Case(
            f"{count:,} in one transaction",
            metrics=(COST,),
            variants=tuple(
                Variant(name, partial(measured, listen, emit, count))
                for name, (listen, emit) in VARIANTS.items()
            ),
            reference=NAIVE,
            rounds=7 if quick else 40,
            warmups=2,
        )


SCENARIO = Scenario(
    name="bulk-publish",
    title="Many publish() calls in one transaction",
    group="publishing",
    text="µs for each publish(), with its share of the transaction and of what leaves after it.",
    cases=cases,
)
