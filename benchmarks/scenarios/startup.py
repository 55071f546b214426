"""Time until a listener is ready, and what it uses while nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.frame import Case, Measure, Metric, Scenario, Variant

READY = Metric("ready after", "s")
RSS = Metric("RSS when ready", "MB")
CPU = Metric("idle", "CPU ms a minute")

VARIANTS: dict[str, listeners.Listen] = {
    "pglisten": listeners.pglisten,
    "naive": listeners.naive,
    "django-pgpubsub": listeners.pgpubsub,
}


@contextmanager
def starting(listen: listeners.Listen) -> Iterator[Measure]:
    with database() as alias:

        def measure() -> dict[str, float]:
            with listen(alias) as listener:
                return {READY.name: listener.ready_after, RSS.name: listener.rss()}

        yield measure


@contextmanager
def idling(listen: listeners.Listen, seconds: float) -> Iterator[Measure]:
    """All of them idle together: a round lasts until the same listener's turn comes again."""
    with database() as alias, listen(alias) as listener:
        used, since = listener.cpu_seconds(), time.monotonic()

        def measure() -> dict[str, float]:
            nonlocal used, since
            time.sleep(seconds)
            before, begun = used, since
            used, since = listener.cpu_seconds(), time.monotonic()
            return {CPU.name: (used - before) / (since - begun) * 60_000}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    yield Case(
        "start",
        metrics=(READY, RSS),
        variants=tuple(Variant(name, partial(starting, how)) for name, how in VARIANTS.items()),
        reference=None,
        rounds=2 if quick else 9,
    )
    # Three of these make a round, which has a heartbeat or more of pglisten: one in ten seconds.
    seconds = 3.5 if quick else 20
    yield Case(
        "idle",
        metrics=(CPU,),
        variants=tuple(
            Variant(name, partial(idling, how, seconds)) for name, how in VARIANTS.items()
        ),
        reference=None,
        rounds=1 if quick else 3,
    )


SCENARIO = Scenario(
    name="startup",
    title="Start, and idling",
    group="footprint",
    text=(
        "From the start of the process until it hears: *pglisten* has then proven that it does. "
        "CPU time while nobody publishes, the heartbeat included."
    ),
    cases=cases,
)
