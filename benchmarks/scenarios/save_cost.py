"""What events add to save()."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from django.db import transaction

from benchmarks import ways
from benchmarks.databases import Disk, database
from benchmarks.frame import Case, Measure, Metric, Scenario, Target, Variant

Save = Callable[[str, Any, int], None]
"""Saves so many rows of a model on an alias."""

COST = Metric("", "µs each")
SILENT, OURS, BACKGROUND = "no events", "ours, after_commit", "ours, background sender"

VARIANTS = {
    SILENT: ways.SILENT,
    "no events, once more": ways.SILENT_TOO,
    OURS: ways.OURS,
    "ours, nobody listens": ways.OURS_UNHEARD,
    BACKGROUND: ways.OURS_BACKGROUND,
    "ours, atomic": ways.OURS_ATOMIC,
    "ours, durable": ways.OURS_DURABLE,
    "naive, on_commit each": ways.NAIVE,
    "django-pgpubsub": ways.PUBSUB,
    "django-pgpubsub, stored": ways.PUBSUB_STORED,
}


def in_autocommit(alias: str, model: Any, count: int) -> None:
    for number in range(count):
        model(number=number).save(using=alias)


def in_blocks(size: int, alias: str, model: Any, count: int) -> None:
    for start in range(0, count, size):
        with transaction.atomic(using=alias):
            for number in range(start, start + size):
                model(number=number).save(using=alias)


@contextmanager
def measured(way: ways.Way, save: Save, count: int, disk: Disk) -> Iterator[Measure]:
    way.check()
    with (
        database(disk) as alias,
        nullcontext() if way.listen is None else way.listen(alias) as listener,
    ):
        model = way.model()

        def measure() -> dict[str, float]:
            with way.switched_on():
                begun = time.monotonic_ns()
                save(alias, model, count)
                took = time.monotonic_ns() - begun
                if listener is not None:
                    listener.take(count)
            return {COST.name: took / count / 1e3}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    disks: dict[Disk, str] = {"none": "fsync off", **({} if quick else {"real": "fsync on"})}
    for disk, fsync in disks.items():
        autocommit = (
            Target(f"save() in autocommit, {fsync}, × no events", "", OURS, SILENT, at_most=1.35),
            Target("the same, background sender", "", BACKGROUND, SILENT, at_most=1.10),
        )
        yield _case(f"autocommit, {fsync}", in_autocommit, 100, disk, quick, autocommit)
    blocks = (Target("save() in blocks of 100, × no events", "", OURS, SILENT, at_most=1.08),)
    yield _case("atomic blocks of 100", partial(in_blocks, 100), 200, "none", quick, blocks)


def _case(
    name: str, save: Save, count: int, disk: Disk, quick: bool, targets: tuple[Target, ...]
) -> Case:
    return Case(
        name,
        metrics=(COST,),
        variants=tuple(
            Variant(variant, partial(measured, way, save, count, disk))
            for variant, way in VARIANTS.items()
        ),
        reference=SILENT,
        rounds=6 if quick else 150,
        warmups=2,
        targets=targets,
    )


SCENARIO = Scenario(
    name="save-cost",
    title="What events add to save()",
    group="publishing",
    text=(
        "Rows are inserted by save() while a listener is connected; µs for each row, events and "
        "all. *No events, once more* is the same as the reference, to show what the measurement "
        "is worth; *nobody listens* shows what of the cost is the listener's, on the same cores."
    ),
    cases=cases,
)
