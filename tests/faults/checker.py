"""Says whether anything was lost silently, told late, out of order, or handled twice. Pure.

It knows what the publisher did with each number and what each listener's receivers recorded. One
*life* is one listener process from its first proof to its end. What is required:

*every listener* (receivers with ``every_node=True``)
    A number whose NOTIFY succeeded while the life lasted was handled in it, or its publication
    falls into a gap that the receiver was told of, before it was given anything newer. What was
    still on its way when the process was ended does not count: numbers after the last it handled,
    and after the last check that it was up to date.
*the leader* (receivers with ``every_node=False``)
    A number was handled in some life, or falls into a gap told to the receiver in some life.
    A leader that is SIGKILLed takes with it what it had received and not handled (documented);
    such numbers are counted apart.
*order*
    In one life a receiver is never given a number of a key after a later one of that key, and no
    number twice; a receiver with ``concurrency=1`` gets all numbers in order.
*two leaders*
    No number is handled by two of them: who wins the lock leads from there on, by the order in
    which the server has committed.
*ghosts*
    A number whose transaction was rolled back is never handled.

Times are seconds since the epoch, all of one machine. A publication happened at some moment between
``before`` and ``after`` (taken around its transaction and NOTIFY), so it counts as inside a gap
if that interval touches the gap; no other slack is given.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["sent", "unsent", "uncommitted", "rolled back"]
Ending = Literal["killed", "terminated", "still running"]


class Published(NamedTuple):
    """What the publisher knows of one number."""

    n: int
    key: str
    seq: int
    before: float
    after: float
    status: Status


class Handled(NamedTuple):
    at: float
    receiver: str
    n: int
    key: str
    seq: int


class Gap(NamedTuple):
    at: float
    receiver: str
    since: float | None
    until: float
    cause: str

    def covers(self, number: Published) -> bool:
        begun = self.since is None or self.since <= number.after
        return begun and number.before <= self.until


class Led(NamedTuple):
    at: float
    leader: bool


class Established(NamedTuple):
    at: float


Line = Handled | Gap | Led | Established


def parse(fields: Sequence[Any]) -> Line:
    """One line of a record (see ``project/recording.py``)."""
    at, kind, *rest = fields
    match kind:
        case "event":
            return Handled(at, *rest)
        case "gap":
            return Gap(at, *rest)
        case "led":
            return Led(at, *rest)
        case "established":
            return Established(at)
    raise ValueError(f"not a line of a record: {fields!r}")


@dataclass
class Life:
    """What one listener process recorded.

    ``up_to_date`` is the last number up to which it was once seen to have handled everything.
    """

    name: str
    lines: list[Line] = field(default_factory=list)
    up_to_date: int = 0
    ending: Ending = "still running"
    ended_at: float = math.inf

    @property
    def born(self) -> float:
        """When it was first proven to hear everything; never if it was not."""
        return next((line.at for line in self.lines if isinstance(line, Established)), math.inf)


class Violation(NamedTuple):
    rule: str
    life: str
    receiver: str
    n: int
    text: str

    def __str__(self) -> str:
        return (
            f"{self.rule}: number {self.n}, receiver {self.receiver!r} in {self.life}: {self.text}"
        )


@dataclass
class Verdict:
    violations: list[Violation] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """For each receiver: handled, in a gap, ..."""
    widths: list[float] = field(default_factory=list)
    """Seconds that the gaps were wide."""

    def count(self, receiver: str, what: str, amount: int = 1) -> None:
        self.counts.setdefault(receiver, Counter())[what] += amount


class _Told:
    """What one receiver in one life was given: numbers, gaps, and how far it was at each gap."""

    def __init__(self, life: Life, receiver: str) -> None:
        self.life = life
        self.handled: dict[int, float] = {}
        self.gaps: list[tuple[Gap, int]] = []
        self.last = 0
        for line in life.lines:
            if isinstance(line, Handled) and line.receiver == receiver:
                self.handled.setdefault(line.n, line.at)
                self.last = max(self.last, line.n)
            elif isinstance(line, Gap) and line.receiver == receiver:
                self.gaps.append((line, self.last))

    def gap_for(self, number: Published) -> Literal["in time", "late", "not"]:
        """Whether it was told that it may have missed ``number``, before anything newer."""
        found: Literal["late", "not"] = "not"
        for gap, last in self.gaps:
            if gap.covers(number):
                if last < number.n:
                    return "in time"
                found = "late"
        return found


def check(
    published: Sequence[Published],
    lives: Sequence[Life],
    *,
    every_node: Iterable[str],
    leaders: Iterable[str],
) -> Verdict:
    """Judge a run. ``published`` is dense: number ``n`` is at ``n - 1``.

    Receivers in ``leaders`` have ``concurrency=1``.
    """
    verdict = Verdict()
    for receiver in every_node:
        for life in lives:
            _check_order(verdict, published, life, receiver, all_keys=False)
            _check_listener(verdict, published, life, receiver)
    for receiver in leaders:
        told = [_Told(life, receiver) for life in lives]
        for life in lives:
            _check_order(verdict, published, life, receiver, all_keys=True)
        _check_leader(verdict, published, told, receiver)
        _check_two_leaders(verdict, published, told, receiver)
    verdict.widths = sorted(
        line.until - line.since
        for life in lives
        for line in life.lines
        if isinstance(line, Gap) and line.since is not None
    )
    verdict.violations.sort(key=lambda violation: violation.n)
    return verdict


def _check_order(
    verdict: Verdict, published: Sequence[Published], life: Life, receiver: str, *, all_keys: bool
) -> None:
    newest: dict[str, int] = {}
    seen: set[int] = set()
    for line in life.lines:
        if not isinstance(line, Handled) or line.receiver != receiver:
            continue
        number = published[line.n - 1]
        if (line.key, line.seq) != (number.key, number.seq):
            text = f"came as {line.key!r} {line.seq}, left as {number.key!r} {number.seq}"
            verdict.violations.append(Violation("altered", life.name, receiver, line.n, text))
        if number.status in ("rolled back", "uncommitted"):
            text = f"its transaction was {number.status}"
            verdict.violations.append(Violation("ghost", life.name, receiver, line.n, text))
        stream = "" if all_keys else line.key
        if line.n in seen:
            text = "handled before by this process"
            verdict.violations.append(Violation("twice", life.name, receiver, line.n, text))
        elif line.n < newest.get(stream, 0):
            text = f"after number {newest[stream]}"
            verdict.violations.append(Violation("out of order", life.name, receiver, line.n, text))
        seen.add(line.n)
        newest[stream] = max(line.n, newest.get(stream, 0))


def _check_listener(
    verdict: Verdict, published: Sequence[Published], life: Life, receiver: str
) -> None:
    told = _Told(life, receiver)
    on_its_way = max(told.last, life.up_to_date)
    for number in published[bisect_left(published, life.born, key=lambda each: each.before) :]:
        if number.before > life.ended_at:
            break
        if number.status != "sent":
            continue
        if number.n in told.handled:
            verdict.count(receiver, "handled")
        elif (gap := told.gap_for(number)) == "in time":
            verdict.count(receiver, "in a gap")
        elif life.ending != "still running" and number.n > on_its_way:
            verdict.count(receiver, "on its way at the end of a process")
        else:
            verdict.violations.append(_missing(number, gap, life.name, receiver))


def _check_leader(
    verdict: Verdict, published: Sequence[Published], told: Sequence[_Told], receiver: str
) -> None:
    handled = {n for each in told for n in each.handled}
    killed = [each for each in told if each.life.ending == "killed" and _ever_led(each.life)]
    first = min(
        (line.at for each in told for line in each.life.lines if isinstance(line, Led)),
        default=0.0,
    )
    for number in published[bisect_left(published, first, key=lambda each: each.before) :]:
        if number.status != "sent":
            continue
        if number.n in handled:
            verdict.count(receiver, "handled")
            continue
        gaps = {each.gap_for(number) for each in told}
        if "in time" in gaps:
            verdict.count(receiver, "in a gap")
        elif any(
            number.n > max(each.last, each.life.up_to_date)
            and number.before <= each.life.ended_at
            and _led_at(each.life, each.life.ended_at)
            for each in killed
        ):
            verdict.count(receiver, "received by a leader that was killed before handling it")
        else:
            late: Literal["late", "not"] = "late" if "late" in gaps else "not"
            verdict.violations.append(_missing(number, late, "any listener", receiver))


def _check_two_leaders(
    verdict: Verdict,
    published: Sequence[Published],
    told: Sequence[_Told],
    receiver: str,
) -> None:
    take_overs = sorted(
        line.at
        for each in told
        for line in each.life.lines
        if isinstance(line, Led) and line.leader
    )
    by: dict[int, list[str]] = {}
    for each in told:
        for n in each.handled:
            by.setdefault(n, []).append(each.life.name)
    for n, names in by.items():
        if len(names) == 1:
            continue
        number = published[n - 1]
        at = bisect_left(take_overs, number.before)
        distance = take_overs[at] - number.after if at < len(take_overs) else math.inf
        text = f"handled by {' and '.join(names)}, {distance:.3f} s before a take-over"
        verdict.violations.append(Violation("two leaders", names[-1], receiver, n, text))
    _count_stragglers(verdict, told, receiver)


def _count_stragglers(verdict: Verdict, told: Sequence[_Told], receiver: str) -> None:
    """Numbers that a leader handled after its successor had handled newer ones."""
    everything = sorted((at, n, i) for i, each in enumerate(told) for n, at in each.handled.items())
    newest, newest_by = 0, -1
    for _, n, i in everything:
        if n > newest:
            newest, newest_by = n, i
        elif i != newest_by and n < newest:
            verdict.count(receiver, "handled late by a leader that had been replaced")


def _missing(
    number: Published, gap: Literal["in time", "late", "not"], life: str, receiver: str
) -> Violation:
    rule = "told late" if gap == "late" else "lost"
    text = f"key {number.key!r}, published between {number.before:.6f} and {number.after:.6f}"
    return Violation(rule, life, receiver, number.n, text)


def _ever_led(life: Life) -> bool:
    return any(isinstance(line, Led) and line.leader for line in life.lines)


def _led_at(life: Life, moment: float) -> bool:
    leader = False
    for line in life.lines:
        if isinstance(line, Led) and line.at <= moment:
            leader = line.leader
    return leader
