"""Medians, ranges, percentiles, and ratios of figures measured in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(values: Sequence[float], to: Sequence[float]) -> Spread:
    """Of each round, the value over the other's value in that same round.

    What slows the machine down for a second slows both, which a ratio of medians would not see.
    """
    return spread([value / other for value, other in zip(values, to, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that is not below ``percent`` of them (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
