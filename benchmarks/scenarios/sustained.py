"""Events a second, for longer: publishers, listeners, topics, receivers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psycopg

from benchmarks import listeners
from benchmarks.clients import HUNDRED, clients
from benchmarks.databases import database, dsn
from benchmarks.frame import Case, Measure, Metric, Scenario, Variant

RATE = Metric("", "events/s", more_is_better=True)
SECONDS = 30.0
"""No round should take this long; its length is given in events."""

OURS, NAIVE = "ours, one by one", "naive, one by one"


@dataclass(frozen=True, slots=True)
class Shape:
    publishers: int = 1
    idle: int = 0
    """Sessions that listen to something else; the server wakes them for each NOTIFY."""
    topics: int = 1
    receivers: int = 1


@dataclass(frozen=True, slots=True)
class Way:
    work: str
    listener: str
    together: int = 1
    """Events in one transaction."""

    def listen(
        self, alias: str, shape: Shape
    ) -> contextlib.AbstractContextManager[listeners.Listener]:
        if self.listener == "naive":
            return listeners.naive(alias, shape.topics)
        environ = {
            "BENCHMARK_TOPICS": str(shape.topics),
            "BENCHMARK_RECEIVERS": str(shape.receivers),
        }
        return listeners.pglisten(alias, self.listener, environ)


VARIANTS = {
    OURS: Way("publish-one", "sync"),
    "ours, 100 in a transaction": Way("publish-hundred", "sync", HUNDRED),
    "ours, async receiver, 100 in a transaction": Way("publish-hundred", "async", HUNDRED),
    NAIVE: Way("notify-one", "naive"),
}

SHAPES = {
    "1 publisher": Shape(),
    "4 publishers": Shape(publishers=4),
    "10 listeners": Shape(idle=9),
    "100 listeners": Shape(idle=99),
    "100 topics": Shape(topics=100),
    "10,000 topics": Shape(topics=10_000),
    "100 receivers": Shape(receivers=100),
}


@contextmanager
def idle_listeners(alias: str, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(psycopg.connect(dsn(alias), autocommit=True))
            connection.execute("LISTEN something_else")
        yield


@contextmanager
def measured(way: Way, shape: Shape, events: int) -> Iterator[Measure]:
    """Args:
    events: of each publisher.
    """
    with (
        database() as alias,
        way.listen(alias, shape) as listener,
        idle_listeners(alias, shape.idle),
        clients(alias, shape.publishers, way.work, str(shape.topics), {}) as publishers,
    ):

        def measure() -> dict[str, float]:
            done = publishers.run(SECONDS, events // way.together)
            sent = done.calls * way.together
            heard = 1 if way.listener == "naive" else shape.receivers
            last = max(listener.take(sent * heard))
            return {RATE.name: sent / (last - done.begun) * 1e9}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    for name, shape in SHAPES.items():
        if quick and shape not in (Shape(), Shape(publishers=4)):
            continue
        # The ring of times holds every call of every receiver of a round.
        events = 1_000 if shape.receivers > 1 or quick else 5_000
        yield Case(
            name,
            metrics=(RATE,),
            variants=tuple(
                Variant(variant, partial(measured, way, shape, events))
                for variant, way in VARIANTS.items()
            ),
            reference=NAIVE,
            rounds=3 if quick else 7,
        )


SCENARIO = Scenario(
    name="sustained",
    title="Sustained rate",
    group="listening",
    text=(
        "Publishers, each a process, publish as fast as they can; from when they begin to the "
        "last call of a receiver. One publisher, listener, topic and receiver, unless said. *10 "
        "listeners* are one that is measured and nine sessions that listen to another channel. "
        "With 100 receivers each event is handed to every one of them; naive has one."
    ),
    cases=cases,
)
