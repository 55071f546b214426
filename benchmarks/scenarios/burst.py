"""A burst in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from django.db import connections, transaction

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.shop.models import AfterCommit
from benchmarks.shop.naive import BURST, notify, payload
from django_pgnotify import publish

Emit = Callable[[str, int], None]
"""Causes so many events in the transaction that is open on the alias."""
Open = Callable[[str], AbstractContextManager[listeners.Listener]]

RATE = Metric("", "events/s", more_is_better=True)
LISTENER = Metric("listener alone", "events/s", more_is_better=True)

OURS, NAIVE = "ours, sync receiver", "naive, one statement"


def data(number: int) -> dict[str, object]:
    return {"number": number, "status": "new"}


def publish_each(alias: str, count: int) -> None:
    for number in range(count):
        publish(BURST, data(number), using=alias)


def save_each(alias: str, count: int) -> None:
    for number in range(count):
        AfterCommit(number=number).save(using=alias)


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


@contextmanager
def measured(listen: Open, emit: Emit, count: int) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:

        def measure() -> dict[str, float]:
            with transaction.atomic(using=alias):
                emit(alias, count)
                begun = time.monotonic_ns()
            calls = listener.recording.take(count)
            first, last = min(calls), max(calls)
            return {
                RATE.name: count / (last - begun) * 1e9,
                LISTENER.name: (count - 1) / (last - first) * 1e9,
            }

        yield measure


VARIANTS: dict[str, tuple[Open, Emit]] = {
    OURS: (listeners.pglisten, publish_each),
    "ours, async receiver": (partial(listeners.pglisten, receiver="async"), publish_each),
    "ours, save() of models": (listeners.pglisten, save_each),
    NAIVE: (listeners.naive, notify_in_one_statement),
    "naive, on_commit each": (listeners.naive, notify_each_on_commit),
}


def cases(quick: bool) -> Iterable[Case]:
    for count in (1_000, 10_000):
        yield Case(
            f"{count:,} events",
            metrics=(RATE, LISTENER),
            variants=tuple(
                Variant(name, partial(measured, listen, emit, count))
                for name, (listen, emit) in VARIANTS.items()
            ),
            reference=NAIVE,
            rounds=5 if quick else 15,
            targets=(
                Target(f"burst of {count:,}, against naive", RATE.name, OURS, NAIVE, at_least=1.5),
            ),
        )


SCENARIO = Scenario(
    name="burst",
    title="A burst in one transaction",
    group="listening",
    text=(
        "So many events in one transaction, drained to calls of the receiver. Counted from before "
        "COMMIT to the last call; *listener alone* from the first call to the last."
    ),
    cases=cases,
)
