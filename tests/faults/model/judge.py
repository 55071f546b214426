"""Says whether each consumer got what the ledger names, once, and in order. Pure.

What is required of every consumer: nothing lost, nothing that was rolled back, and the events of a
key in their order (of their first handling). A transactional one has no event twice. Another one
has an event twice only if what did it first crashed in between: its process, or the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Handled(NamedTuple):
    """One call: when (nanoseconds), in which life of a process, and with what."""

    at: int
    life: str
    key: str
    seq: int


@dataclass
class Verdict:
    violations: list[str] = field(default_factory=list)
    handled: int = 0
    twice: int = 0


def judge(
    name: str,
    ledger: Mapping[str, int],
    calls: Sequence[Handled],
    *,
    exact: bool,
    killed: Mapping[str, int],
    server_crashes: Sequence[int],
) -> Verdict:
    """Judge one consumer.

    Args:
        ledger: number of the last committed event of each key; they count from 1.
        calls: in the order of their effects.
        exact: whether it is transactional.
        killed: lives that ended by a crash, and when.
        server_crashes: when the server was stopped.
    """
    verdict = Verdict()
    first: dict[tuple[str, int], Handled] = {}
    newest: dict[str, int] = dict.fromkeys(ledger, 0)
    for call in calls:
        event = (call.key, call.seq)
        if call.seq > ledger.get(call.key, 0):
            verdict.violations.append(f"{name}: {event} was never committed")
        if (before := first.get(event)) is not None:
            verdict.twice += 1
            if exact:
                verdict.violations.append(f"{name}: {event} twice")
            elif not _crashed_between(before, call, killed, server_crashes):
                verdict.violations.append(
                    f"{name}: {event} twice, by {before.life} and {call.life}, without a crash"
                )
            continue
        first[event] = call
        verdict.handled += 1
        if call.seq < newest.get(call.key, 0):
            verdict.violations.append(f"{name}: {event} after number {newest[call.key]}")
        newest[call.key] = max(call.seq, newest.get(call.key, 0))
    for key, last in ledger.items():
        missing = [seq for seq in range(1, last + 1) if (key, seq) not in first]
        verdict.violations += [f"{name}: {(key, seq)} was lost" for seq in missing]
    return verdict


def _crashed_between(
    before: Handled, again: Handled, killed: Mapping[str, int], server_crashes: Sequence[int]
) -> bool:
    ended = killed.get(before.life)
    if ended is not None and before.life != again.life:
        return True
    # The cursor is stored a moment after the event: the crash that kept it from that may have
    # been under way.
    return any(before.at <= crash + 10**9 and crash <= again.at for crash in server_crashes)
