"""From save() to the receiver."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from django.db import models

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.figures import percentile
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.load import load
from benchmarks.shop.models import AfterCommit, Load, Naive, NaiveLoad

Open = Callable[[str], AbstractContextManager[listeners.Listener]]

PAUSE = 0.001, 0.003
"""Seconds between two saves, at random, so that nothing falls into step with anything."""

AFTER = {percent: Metric(f"p{percent}", "µs") for percent in (50, 95, 99)}
WHOLE = Metric("p50 from before save()", "µs")

OURS, NAIVE = "ours, sync receiver", "naive"


@contextmanager
def measured(
    listen: Open, model: type[models.Model], loading: type[models.Model], rate: int, saves: int
) -> Iterator[Measure]:
    with database() as alias, listen(alias) as listener:

        def measure() -> dict[str, float]:
            begun, returned, called = [], [], []
            with load(alias, loading, rate) if rate else nullcontext():
                for number in range(saves):
                    time.sleep(random.uniform(*PAUSE))
                    row = model(number=number)
                    begun.append(time.monotonic_ns())
                    row.save(using=alias)
                    returned.append(time.monotonic_ns())
                    called += listener.recording.take(1)
            after = [(call - end) / 1e3 for call, end in zip(called, returned, strict=True)]
            whole = [(call - start) / 1e3 for call, start in zip(called, begun, strict=True)]
            return {
                **{metric.name: percentile(after, percent) for percent, metric in AFTER.items()},
                WHOLE.name: percentile(whole, 50),
            }

        yield measure


VARIANTS: dict[str, tuple[Open, type[models.Model], type[models.Model]]] = {
    OURS: (listeners.pglisten, AfterCommit, Load),
    "ours, async receiver": (partial(listeners.pglisten, receiver="async"), AfterCommit, Load),
    NAIVE: (listeners.naive, Naive, NaiveLoad),
}


def cases(quick: bool) -> Iterable[Case]:
    for name, rate in (("idle", 0), ("under a load of 500 events/s", 500)):
        yield Case(
            name,
            metrics=(*AFTER.values(), WHOLE),
            variants=tuple(
                Variant(variant, partial(measured, *how, rate, 60 if quick else 200))
                for variant, how in VARIANTS.items()
            ),
            reference=NAIVE,
            rounds=5 if quick else 15,
            targets=()
            if rate
            else (Target("after save(), p50, against naive", "p50", OURS, NAIVE, at_most=1.5),),
        )


SCENARIO = Scenario(
    name="latency",
    title="From save() to the receiver",
    group="latency",
    text=(
        "One save() at a time in autocommit, from when it returned to when the receiver was "
        "called; below 0 where the receiver was quicker than the return."
    ),
    cases=cases,
)
