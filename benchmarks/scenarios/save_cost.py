"""What events add to save()."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.db import models, transaction
from django.test import override_settings

from benchmarks import listeners
from benchmarks.databases import database
from benchmarks.frame import CannotRun, Case, Measure, Metric, Scenario, Target, Variant
from benchmarks.shop.models import AfterCommit, Atomic, Background, Naive, Silent, SilentToo
from django_pgnotify.conf import SETTINGS

COST = Metric("", "µs each")
BACKGROUND = "PGNOTIFY_BACKGROUND_SENDER"

SILENT, OURS, SENDER = "no events", "ours, after_commit", "ours, background sender"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to save rows, and who listens meanwhile."""

    model: type[models.Model]
    listen: Callable[[str], AbstractContextManager[listeners.Listener]] | None = None
    settings: tuple[str, ...] = ()


WAYS = {
    SILENT: Way(Silent),
    "no events, once more": Way(SilentToo),
    OURS: Way(AfterCommit, listeners.pglisten),
    SENDER: Way(Background, listeners.pglisten, (BACKGROUND,)),
    "ours, atomic": Way(Atomic, listeners.pglisten),
    "naive, on_commit each": Way(Naive, listeners.naive),
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
def measured(way: Way, save: Callable[[str, Any, int], None], count: int) -> Iterator[Measure]:
    unknown = set(way.settings) - set(SETTINGS)
    if unknown:
        raise CannotRun(f"there is no setting {min(unknown)}")
    with (
        database() as alias,
        way.listen(alias) if way.listen is not None else nullcontext() as listener,
    ):

        def measure() -> dict[str, float]:
            with override_settings(**dict.fromkeys(way.settings, True)):
                begun = time.monotonic_ns()
                save(alias, way.model, count)
                took = time.monotonic_ns() - begun
                if listener is not None:
                    listener.recording.take(count)
            return {COST.name: took / count / 1e3}

        yield measure


def cases(quick: bool) -> Iterable[Case]:
    shapes: list[tuple[str, Callable[[str, Any, int], None], int, tuple[Target, ...]]] = [
        (
            "save() in autocommit",
            in_autocommit,
            100,
            (
                Target("save() in autocommit", "", OURS, SILENT, at_most=1.35),
                Target("the same, background sender", "", SENDER, SILENT, at_most=1.10),
            ),
        ),
        (
            "save() in atomic blocks of 100",
            partial(in_blocks, 100),
            200,
            (Target("save() in atomic blocks of 100", "", OURS, SILENT, at_most=1.08),),
        ),
    ]
    for name, save, count, targets in shapes:
        yield Case(
            name,
            metrics=(COST,),
            variants=tuple(
                Variant(variant, partial(measured, way, save, count))
                for variant, way in WAYS.items()
            ),
            reference=SILENT,
            rounds=30 if quick else 150,
            warmups=3,
            targets=targets,
        )


SCENARIO = Scenario(
    name="save-cost",
    title="What events add to save()",
    group="publishing",
    text=(
        "Rows are inserted by save() while a listener is connected. *No events, once more* is the "
        "same as the reference, to show what the measurement is worth."
    ),
    cases=cases,
)
