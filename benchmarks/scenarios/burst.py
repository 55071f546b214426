"""A burst in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

from django.db import connections, transaction

from benchmarks import listeners, ways
from benchmarks.databases import database
from benchmarks.frame import CannotRun, Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.shop.naive import BURST, notify, payload
from django_pgnotify import publish

Emit = Callable[[str, int], None]
"""Causes so many events in the transaction that is open on the alias."""

RATE = Metric("", "events/s", more_is_better=True)
LISTENER = Metric("listener alone", "events/s", more_is_better=True)

OURS, NAIVE = "ours, sync receiver", "naive, one statement"
PUBSUB, STORED = "django-pgpubsub", "django-pgpubsub, stored"


def data(number: int) -> dict[str, object]:
    return {"number": number, "status": "new"}


def publish_each(alias: str, count: int) -> None:
    for number in range(count):
        publish(BURST, data(number), using=alias)


def save_each(alias: str, count: int) -> None:
    model = ways.OURS.model()
    for number in range(count):
        model(number=number).save(using=alias)


def notify_in_one_statement(alias: str, count: int) -> None:
    payloads = [payload(BURST, number, data(number)) for number in range(count)]
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT pg_notify(%s, text) FROM unnest(%s::text[]) AS text", (BURST, payloads)
        )


def notify_each_on_commit(alias: str, count: int) -> None:
    for number in range(count):
        text = payload(BURST, number, data(number))
        transaction.on_commit(partial(notify, alias, BURST, text), using=alias)


def insert_for(way: ways.Way, alias: str, count: int) -> None:
    """Triggers fire for rows inserted in bulk too."""
    model = way.model()
    model.objects.using(alias).bulk_create(model(number=number) for number in range(count))


def not_when_quick(alias: str) -> NoReturn:
    raise CannotRun("takes half a minute each round: not in a quick run")


@contextmanager
def measured(listen: listeners.Listen, emit: Emit, count: int) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:

        def measure() -> dict[str, float]:
            with transaction.atomic(using=alias):
                emit(alias, count)
                begun = time.monotonic_ns()
            calls = listener.take(count)
            first, last = min(calls), max(calls)
            return {
                RATE.name: count / (last - begun) * 1e9,
                LISTENER.name: (count - 1) / (last - first) * 1e9,
            }

        yield measure


VARIANTS: dict[str, tuple[listeners.Listen, Emit]] = {
    OURS: (listeners.pglisten, publish_each),
    "ours, async receiver": (partial(listeners.pglisten, receiver="async"), publish_each),
    "ours, extra fast": (partial(listeners.pglisten, environ=listeners.FAST), publish_each),
    "ours, async, extra fast": (
        partial(listeners.pglisten, receiver="async", environ=listeners.FAST),
        publish_each,
    ),
    "ours, save() of models": (listeners.pglisten, save_each),
    NAIVE: (listeners.naive, notify_in_one_statement),
    "naive, on_commit each": (listeners.naive, notify_each_on_commit),
    PUBSUB: (listeners.pgpubsub, partial(insert_for, ways.PUBSUB)),
    STORED: (listeners.pgpubsub, partial(insert_for, ways.PUBSUB_STORED)),
    "libpq in C": (listeners.libpq, notify_in_one_statement),
}


def cases(quick: bool) -> Iterable[Case]:
    for count, rounds, quickly in ((1_000, 9, 2), (10_000, 5, 1)):
        hurried = {STORED: (not_when_quick, VARIANTS[STORED][1])} if quick and count > 1_000 else {}
        yield Case(
            f"{count:,} events",
            metrics=(RATE, LISTENER),
            variants=tuple(
                Variant(name, partial(measured, listen, emit, count))
                for name, (listen, emit) in {**VARIANTS, **hurried}.items()
            ),
            reference=NAIVE,
            rounds=quickly if quick else rounds,
            targets=(
                Target(f"{count:,} events, × naive", RATE.name, OURS, NAIVE, at_least=1.5),
                Target(
                    f"{count:,} events, × django-pgpubsub", RATE.name, OURS, PUBSUB, at_least=60
                ),
            ),
        )


SCENARIO = Scenario(
    name="burst",
    title="A burst in one transaction",
    group="listening",
    text=(
        "So many events in one transaction, drained to calls of the receiver. Counted from before "
        "COMMIT to the last call; *listener alone* from the first call to the last. *naive, one "
        "statement* issues its NOTIFYs in the transaction, before the clock starts."
    ),
    cases=cases,
)
