"""Memory of the listener over a million events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from django.db import transaction

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.scenarios.burst import Emit, notify_in_one_statement, publish_each

EARLY = 10_000
BATCH = 1_000

FIRST = Metric("RSS after 10,000", "MB")
LAST = Metric("at the end", "MB")
GROWTH = Metric("growth", "MB")

OURS = "ours, sync receiver"
VARIANTS: dict[str, tuple[listeners.Listen, Emit]] = {
    OURS: (listeners.pglisten, publish_each),
    "ours, async receiver": (partial(listeners.pglisten, receiver="async"), publish_each),
    "naive": (listeners.naive, notify_in_one_statement),
}


@contextmanager
def measured(listen: listeners.Listen, emit: Emit, events: int) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:

        def send(count: int) -> None:
            for _ in range(count // BATCH):
                with transaction.atomic(using=alias):
                    emit(alias, BATCH)

        def measure() -> dict[str, float]:
            send(EARLY)
            listener.take(EARLY)
            first = listener.rss()
            for _ in range((events - EARLY) // EARLY):
                send(EARLY)
                listener.take(EARLY)
            last = listener.rss()
            return {FIRST.name: first, LAST.name: last, GROWTH.name: last - first}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    events = 100_000 if quick else 1_000_000
    yield Case(
        f"{events:,} events",
        metrics=(FIRST, LAST, GROWTH),
        variants=tuple(
            Variant(name, partial(measured, listen, emit, events))
            for name, (listen, emit) in VARIANTS.items()
        ),
        reference=None,
        rounds=1,
        warmups=0,
        targets=(
            Target(f"growth over {events:,} events, MB", GROWTH.name, OURS, None, at_most=10),
        ),
    )


SCENARIO = Scenario(
    name="memory",
    title="Memory of the listener",
    group="footprint",
    text=(
        "Resident memory of the listening process: after 10,000 events, and after the last. The "
        "publisher waits for the receiver every 10,000 events."
    ),
    cases=cases,
)
