"""What a scenario is made of.

A module of ``benchmarks/scenarios/`` has a ``SCENARIO``; its cases each have variants that do the
same thing in different ways, and the figures are compared within a case::

    Scenario            burst
      Case              1,000 events
        Variant         ours, naive, django-pgpubsub, ...    measured in turn, A B A B
        Metric          events/s
        Target          ours at least 1.5 x naive
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

Measure = Callable[[], Mapping[str, float]]
"""Does one round and returns the value of each metric."""


class CannotRun(Exception):
    """A variant cannot be measured here; the message is the reason, and stands in the table."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of doing it.

    ``open()`` starts what is measured (its listener, its clients) and gives the function that
    measures one round; it raises :class:`CannotRun` where something is missing.
    """

    name: str
    open: Callable[[], AbstractContextManager[Measure]]


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str
    more_is_better: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.name else self.unit


@dataclass(frozen=True, slots=True)
class Target:
    """What ``variant`` has to reach, as a ratio to ``against`` or, without it, by itself."""

    says: str
    metric: str
    variant: str
    against: str | None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) is (self.at_most is None):
            raise ValueError("a target has one limit: at_least or at_most")

    def met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most

    @property
    def limit(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Case:
    """Variants that are measured in turn, and compared with ``reference`` if there is one."""

    name: str
    metrics: tuple[Metric, ...]
    variants: tuple[Variant, ...]
    reference: str | None
    rounds: int
    warmups: int = 1
    targets: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        metrics = {metric.name for metric in self.metrics}
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name!r}: two variants have one name")
        if not {self.reference} <= {None, *names}:
            raise ValueError(f"{self.name!r}: the reference {self.reference!r} is no variant")
        for target in self.targets:
            if not {target.variant, target.against} <= {None, *names}:
                raise ValueError(f"{self.name!r}: {target.says!r} is about no variant")
            if target.metric not in metrics:
                raise ValueError(f"{self.name!r}: {target.says!r} is about no metric")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Args:
    name: what ``--only`` takes.
    group: scenarios of one group share a chart.
    text: what is measured, for whoever reads the table.
    cases: makes the cases; told whether it has to be quick.
    """

    name: str
    title: str
    group: str
    text: str
    cases: Callable[[bool], Iterable[Case]]


Rounds = Mapping[str, list[float]]
"""Of each metric, the values of all rounds, in order."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    case: Case
    measured: dict[str, dict[str, list[float]]]
    """By variant, by metric: the values of the rounds."""
    missing: dict[str, str]
    """By variant: why there are none."""
