"""Business transactions a second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from benchmarks import ways
from benchmarks.clients import ACCOUNTS, clients
from benchmarks.databases import SLOW_FLUSH, Disk, database
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.shop.models import Account

RATE = Metric("", "transactions/s", more_is_better=True)
EVENTS = 2
"""Of each transaction."""

SILENT, OURS, ATOMIC = "no events", "ours, after_commit", "ours, atomic"
VARIANTS = {
    SILENT: ways.SILENT,
    OURS: ways.OURS,
    "ours, background sender": ways.OURS_BACKGROUND,
    ATOMIC: ways.OURS_ATOMIC,
}
DISKS: dict[Disk, str] = {
    "none": "fsync off",
    "real": "fsync on",
    "slow": f"fsync on, a flush takes {SLOW_FLUSH / 1000:g} ms more",
}


@contextmanager
def measured(way: ways.Way, count: int, disk: Disk, seconds: float) -> Iterator[Measure]:
    way.check()
    with (
        database(disk) as alias,
        nullcontext() if way.listen is None else way.listen(alias) as listener,
    ):
        Account._default_manager.using(alias).bulk_create(Account() for _ in range(ACCOUNTS))
        with clients(alias, count, "business", way.label, way.environ) as running:

            def measure() -> dict[str, float]:
                done = running.run(seconds)
                if listener is not None:
                    listener.take(EVENTS * done.calls)
                return {RATE.name: done.calls / seconds}

            yield measure


def cases(quick: bool) -> Iterable[Case]:
    for disk, name in DISKS.items():
        for count in (1, 8, 32):
            if quick and (count != 8 or disk == "real"):
                continue
            yield Case(
                f"{count} client{'s' * (count > 1)}, {name}",
                metrics=(RATE,),
                variants=tuple(
                    Variant(variant, partial(measured, way, count, disk, 0.5 if quick else 2.0))
                    for variant, way in VARIANTS.items()
                ),
                reference=SILENT,
                rounds=2 if quick else 7,
                targets=()
                if count == 1
                else (
                    Target(
                        f"{count} clients, {name}, × no events", "", OURS, SILENT, at_least=0.85
                    ),
                    Target(f"{count} clients, {name}, × atomic", "", OURS, ATOMIC, at_least=1.5),
                ),
            )


SCENARIO = Scenario(
    name="throughput",
    title="Business transactions a second",
    group="throughput",
    text=(
        "Each client is a process that does one transaction after the other: select an account, "
        "update it, insert an order, update the order; two events. The listener hears them on the "
        "same machine."
    ),
    cases=cases,
)
