"""Which consumers a process should run: a fair share of those that several could. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

PATIENCE = 3
"""Looks for which a consumer may stay free before a process takes it beyond its share."""


class Decision(NamedTuple):
    """What to try to take, in this order, and what to let go of."""

    take: list[str]
    let_go: list[str]


def decide(wanted: Mapping[str, int], held: Collection[str], waited: Mapping[str, int]) -> Decision:
    """Decide what to do next.

    Args:
        wanted: consumers that this process could run: how many processes could, itself included.
        held: those that it runs.
        waited: how many looks ago each of the others was last seen taken, or let go by us.
    """
    share = math.ceil(sum(1 / max(1, count) for count in wanted.values()) - 1e-9)
    free = [name for name in wanted if name not in held]
    # Those that nobody else could run come first.
    free.sort(key=lambda name: wanted[name])
    room = share - len(held)
    take = [
        name
        for place, name in enumerate(free)
        if wanted[name] <= 1 or place < room or waited.get(name, 0) >= PATIENCE
    ]
    surplus = len(held) - share
    let_go = [name for name in held if wanted.get(name, 1) > 1][: max(0, surplus)]
    return Decision(take, let_go[:1])
