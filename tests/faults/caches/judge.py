"""Says whether a read was staler than it may be. Pure.

A row has versions: the chain of the writes of it that were committed. A version is *acknowledged*
when its writer's outermost block has returned; from then on an older value is stale. A write in
doubt that was committed all the same was acknowledged to nobody; an older value counts as stale
from when its writer had given up on it and somebody else held the row's lock. Then


``too old``
    the read began more than MAX_STALENESS after the value had become stale;
``overtaken``
    the read began after the node's table had an invalidation that was published after a newer
    version was acknowledged. Whether the listener was healthy is thereby measured, not guessed;
``own write``
    the read began after a newer version was acknowledged to a writer of the same node;
``too early``
    the read ended before the COMMIT of what it returned was sent;
``ghost``
    what it returned was rolled back, or never written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tests.faults.caches.records import COMMITTED, LOADED, ROLLED_BACK, Probe, Read, Write

NEVER = 1 << 62


class Violation(NamedTuple):
    rule: str
    way: int
    row: int
    stamp: int
    begun: int
    late: float
    """Seconds by which the read was late; 0 where the rule knows no lateness."""
    where: str


@dataclass
class Verdict:
    violations: list[Violation] = field(default_factory=list)
    reads: Counter[int] = field(default_factory=Counter)
    """By way."""
    hits: Counter[int] = field(default_factory=Counter)
    stale: Counter[int] = field(default_factory=Counter)
    """Hits that were stale, within what is allowed."""
    stalest: float = 0.0
    """The age in seconds of the stalest value that was read."""


@dataclass(frozen=True)
class Chain:
    """The committed versions of one row, in order.

    Attributes:
        place: of each stamp, its place.
        stale_from: when a value of that place became stale.
        told_from: when a newer version was acknowledged.
        stale_on: the same by node, counting its own writers only.
    """

    place: Mapping[int, int]
    stale_from: Sequence[int]
    told_from: Sequence[int]
    stale_on: Mapping[int, Sequence[int]]


def chains(
    writes: Mapping[int, Write], final: Mapping[int, int], nodes: Iterable[int]
) -> dict[int, Chain]:
    """The versions of each row, from the stamp that it ended with back to the first.

    The outcome of a write whose writer does not know it follows from the chain: it was committed
    if somebody found it.

    Raises:
        ValueError: the chain and what a writer was told contradict each other.
    """
    made = {row: _chain(writes, stamp, list(nodes)) for row, stamp in final.items()}
    for write in writes.values():
        found = write.stamp in made[write.row].place
        if (write.outcome == COMMITTED and not found) or (write.outcome == ROLLED_BACK and found):
            raise ValueError(f"{write} is {'' if found else 'not '}there")
    return made


def _chain(writes: Mapping[int, Write], last: int, nodes: Sequence[int]) -> Chain:
    stamps = [last]
    while stamps[-1]:
        stamps.append(writes[stamps[-1]].before)
    stamps.reverse()
    known, told, own = [0], [0], {node: [0] for node in nodes}
    for stamp, after in pairwise([*stamps[1:], 0]):
        write = writes[stamp]
        if write.outcome == COMMITTED:
            known.append(write.done)
        else:
            known.append(max(write.done, writes[after].locked) if after else NEVER)
        told.append(write.done if write.outcome == COMMITTED else NEVER)
        for node in nodes:
            own[node].append(told[-1] if node == write.node else NEVER)
    return Chain(
        {stamp: place for place, stamp in enumerate(stamps)},
        _soonest_after(known),
        _soonest_after(told),
        {node: _soonest_after(times) for node, times in own.items()},
    )


def _soonest_after(times: Sequence[int]) -> list[int]:
    """For each place the least of what follows it."""
    least, found = NEVER, []
    for time in reversed(times):
        found.append(least)
        least = min(least, time)
    return found[::-1]


class Applied:
    """What a node's table is known to have applied, from the probes that were seen in it."""

    def __init__(self, probes: Iterable[Probe]) -> None:
        self._seen: list[int] = []
        self._published: list[int] = []
        for probe in sorted(probes, key=lambda probe: probe.seen):
            latest = self._published[-1] if self._published else 0
            self._seen.append(probe.seen)
            self._published.append(max(latest, probe.published))

    def until(self, moment: int) -> int:
        """Everything acknowledged before this had been applied at ``moment``."""
        place = bisect_left(self._seen, moment)
        return self._published[place - 1] if place else 0


def judge(
    node: int,
    where: str,
    reads: Iterable[Read],
    writes: Mapping[int, Write],
    rows: Mapping[int, Chain],
    applied: Applied,
    max_staleness: float,
    verdict: Verdict,
) -> None:
    """Judge the reads of one process, on the given node, into ``verdict``."""
    allowed = int(max_staleness * 1e9)
    for read in reads:
        verdict.reads[read.way] += 1
        hit = not read.flags & LOADED
        verdict.hits[read.way] += hit

        def violated(rule: str, since: int = 0, read: Read = read) -> None:
            late = (read.begun - since) / 1e9 if since else 0.0
            what = (rule, read.way, read.row, read.stamp, read.begun, late, where)
            verdict.violations.append(Violation(*what))

        chain = rows[read.row]
        place = chain.place.get(read.stamp)
        if place is None:
            violated("ghost")
            continue
        if read.stamp and read.ended < writes[read.stamp].leaving:
            violated("too early")
        stale_from, own = chain.stale_from[place], chain.stale_on[node][place]
        if read.begun > own:
            violated("own write", own)
        if read.begun <= stale_from:
            continue
        verdict.stalest = max(verdict.stalest, (read.begun - stale_from) / 1e9)
        if read.begun > stale_from + allowed:
            violated("too old", stale_from)
        elif chain.told_from[place] < applied.until(read.begun):
            violated("overtaken", chain.told_from[place])
        elif hit:
            verdict.stale[read.way] += 1
