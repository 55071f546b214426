"""Channel layers: messages a second and latency, beside those that need Redis."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

from benchmarks.channel_layers import SENDERS, driven
from benchmarks.databases import database
from benchmarks.frame import CannotRun, Case, Measure, Metric, Scenario, Target, Variant
from tests.redis_server import MISSING, redis_server

ONE = Metric("one sender", "messages/s", more_is_better=True)
MANY = Metric(f"{SENDERS} senders at once", "messages/s", more_is_better=True)
P50 = Metric("latency p50", "µs")
P99 = Metric("latency p99", "µs")

OURS = "ours"
PUBSUB = "channels_redis pubsub"
MEMORY = "in-memory"
Environ = Callable[[], AbstractContextManager[dict[str, str]]]


def nothing() -> AbstractContextManager[dict[str, str]]:
    return nullcontext({})


@contextmanager
def on_redis() -> Iterator[dict[str, str]]:
    if importlib.util.find_spec("channels_redis") is None:
        raise CannotRun("channels_redis is not installed (make bench installs it)")
    with ExitStack() as stack:
        try:
            url = stack.enter_context(redis_server())
        except FileNotFoundError:
            raise CannotRun(MISSING) from None
        yield {"BENCHMARK_REDIS": url}


@contextmanager
def on_database(peer: str = "") -> Iterator[dict[str, str]]:
    if peer and importlib.util.find_spec(peer) is None:
        raise CannotRun(f"{peer} is not installed (make bench installs it)")
    with database() as alias:
        yield {"BENCHMARK_DATABASE": alias, "BENCHMARK_PEER": peer}


LAYERS: dict[str, tuple[str, Environ]] = {
    OURS: ("ours", on_database),
    PUBSUB: ("redis-pubsub", on_redis),
    "channels_redis core": ("redis-core", on_redis),
    "channels_postgres": ("channels-postgres", partial(on_database, "channels_postgres")),
    MEMORY: ("memory", nothing),
}


@contextmanager
def measured(
    layer: str, needs: Environ, consumers: int, separate: bool, messages: int
) -> Iterator[Measure]:
    if separate and layer == "memory":
        raise CannotRun("it does not leave its process")
    with needs() as environ, driven(layer, consumers, separate=separate, environ=environ) as layers:

        def measure() -> dict[str, float]:
            p50, p99 = layers.latencies(messages // 4)
            one, many = layers.rate(messages, "one"), layers.rate(messages, "many")
            return {ONE.name: one, MANY.name: many, P50.name: p50, P99.name: p99}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    for separate in (False, True):
        for consumers, messages in ((1, 2_000), (50, 400)):
            where = "separate processes" if separate else "same process"
            name = f"{consumers} consumer{'s' * (consumers > 1)}, {where}"
            count = messages // 4 if quick else messages
            yield Case(
                name,
                metrics=(ONE, MANY, P50, P99),
                variants=tuple(
                    Variant(variant, partial(measured, layer, needs, consumers, separate, count))
                    for variant, (layer, needs) in LAYERS.items()
                ),
                reference=PUBSUB,
                rounds=2 if quick else 7,
                targets=(
                    Target(f"{name}, one sender", ONE.name, OURS, PUBSUB, at_least=1),
                    Target(f"{name}, {SENDERS} senders", MANY.name, OURS, PUBSUB, at_least=1),
                    Target(f"{name}, latency p50", P50.name, OURS, PUBSUB, at_most=0.6),
                ),
            )


SCENARIO = Scenario(
    name="layers",
    title="Channel layers",
    group="layers",
    text=(
        "group_send() of a message with a body of 100 bytes, from before the first is sent until "
        "the last consumer has the last one; with 50 consumers each message is delivered 50 times. "
        "*One sender* awaits each send before the next, as a management command does; *at once* is "
        "as many tasks of one loop. Latency is from before group_send() to the return of "
        "receive(), of each delivery, each message being sent when the one before has arrived "
        "everywhere. Consumers and sender share a process and its loop, or have one each."
    ),
    cases=cases,
)
