"""From save() to the receiver."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from django.db import transaction

from benchmarks import ways
from benchmarks.databases import database
from benchmarks.figures import percentile
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.load import load

PAUSE = 0.001, 0.003
"""Seconds between two saves, at random, so that nothing falls into step with anything."""

AFTER = {percent: Metric(f"p{percent}", "µs") for percent in (50, 95, 99)}
WHOLE = Metric("p50 from before save()", "µs")

OURS, NAIVE, PUBSUB = "ours, sync receiver", "naive", "django-pgpubsub"
INSIDE = "naive, NOTIFY inside the transaction"

VARIANTS = {
    OURS: ways.OURS,
    "ours, async receiver": ways.OURS_ASYNC,
    NAIVE: ways.NAIVE,
    PUBSUB: ways.PUBSUB,
    "django-pgpubsub, stored": ways.PUBSUB_STORED,
}
IN_TRANSACTION = {**VARIANTS, INSIDE: ways.NAIVE_INSIDE}


@contextmanager
def measured(way: ways.Way, rate: int, saves: int, in_transaction: bool) -> Iterator[Measure]:
    assert way.listen is not None
    with database() as alias, way.listen(alias) as listener:
        model = way.model()

        def measure() -> dict[str, float]:
            begun, returned, called = [], [], []
            with load(alias, way, rate) if rate else nullcontext():
                for number in range(saves):
                    time.sleep(random.uniform(*PAUSE))
                    row = model(number=number)
                    begun.append(time.monotonic_ns())
                    with transaction.atomic(alias) if in_transaction else nullcontext():
                        row.save(using=alias)
                    returned.append(time.monotonic_ns())
                    called += listener.take(1)
            after = [(call - end) / 1e3 for call, end in zip(called, returned, strict=True)]
            whole = [(call - start) / 1e3 for call, start in zip(called, begun, strict=True)]
            return {
                **{metric.name: percentile(after, percent) for percent, metric in AFTER.items()},
                WHOLE.name: percentile(whole, 50),
            }

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    saves = 50 if quick else 200
    for name, rate, variants, reference, targets in (
        (
            "idle",
            0,
            VARIANTS,
            NAIVE,
            (
                Target("after save(), idle, p50, × naive", "p50", OURS, NAIVE, at_most=1.5),
                Target(
                    "the same from before save(), × naive", WHOLE.name, OURS, NAIVE, at_most=1.5
                ),
                Target(
                    "after save(), idle, p50, × django-pgpubsub", "p50", OURS, PUBSUB, at_most=0.5
                ),
            ),
        ),
        (
            "idle, in a transaction",
            0,
            IN_TRANSACTION,
            INSIDE,
            (
                Target("after COMMIT, idle, p50, × naive inside", "p50", OURS, INSIDE, at_most=1.5),
                Target(
                    "after COMMIT, idle, p50, × django-pgpubsub", "p50", OURS, PUBSUB, at_most=0.5
                ),
            ),
        ),
        *([] if quick else [("under a load of 200 events/s", 200, VARIANTS, NAIVE, ())]),
    ):
        yield Case(
            name,
            metrics=(*AFTER.values(), WHOLE),
            variants=tuple(
                Variant(variant, partial(measured, way, rate, saves, name.endswith("transaction")))
                for variant, way in variants.items()
            ),
            reference=reference,
            rounds=2 if quick else 15,
            targets=targets,
        )


SCENARIO = Scenario(
    name="latency",
    title="From save() to the receiver",
    group="latency",
    text=(
        "One save() at a time, in autocommit or in an atomic block of its own, from when it was "
        "done to when the receiver was called; below 0 where the receiver was quicker than the "
        "return. The load is saved by another process, and heard by the same listener."
    ),
    cases=cases,
)
