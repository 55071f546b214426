"""Puts every read before the judge, and says what came out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from tests.faults.caches import records
from tests.faults.caches.judge import Applied, Chain, Verdict, chains, judge
from tests.faults.caches.records import COMMITTED, IN_DOUBT, KILLED, ROLLED_BACK, Write
from tests.faults.caches.settings import MAX_STALENESS
from tests.faults.caches.ways import ways

if TYPE_CHECKING:
    from tests.faults.caches.nodes import Deployment, Node
    from tests.faults.caches.prober import Prober
    from tests.faults.caches.run import Outcome

SHOWN = 10
LEAST_HITS = 0.05
"""Share of the reads of a way that a cache must have answered, or nothing was checked."""
OUTCOMES = {
    COMMITTED: "committed",
    ROLLED_BACK: "rolled back",
    IN_DOUBT: "in doubt",
    KILLED: "cut short by a kill",
}


def conclude(
    deployment: Deployment, prober: Prober, outcome: Outcome, final: Mapping[int, int]
) -> int:
    """Print the tally; 0 if all is well, else 1."""
    writes: dict[int, Write] = {}
    for path in deployment.folder.glob("*/*.writes"):
        writes |= records.writes(path)
    rows = chains(writes, final, [node.number for node in deployment.nodes])
    verdict = Verdict()
    for node in deployment.nodes:
        _judge(node, prober, writes, rows, verdict)
    _print_faults(outcome)
    print(f"writes: {_listed(Counter(OUTCOMES[write.outcome] for write in writes.values()))}")
    _print_probes(prober)
    idle = _print_ways(verdict)
    _print_stats(deployment)
    print(f"the stalest value was {verdict.stalest:.3f} s old; {MAX_STALENESS:g} s are allowed")
    failed = _print_violations(verdict)
    if outcome.stuck:
        print(f"FAILED: {outcome.stuck}")
    if idle:
        print(f"FAILED: too few hits to mean anything: {', '.join(idle)}")
    if failed or outcome.stuck or idle:
        return 1
    print("no read was staler than promised")
    return 0


def _judge(
    node: Node,
    prober: Prober,
    writes: Mapping[int, Write],
    rows: Mapping[int, Chain],
    verdict: Verdict,
) -> None:
    applied = Applied(prober.seen.get(node.number, ()))
    for path in sorted(node.folder.glob("*.reads")):
        where = f"{node.name} {path.stem}"
        seen = records.reads(path)
        judge(node.number, where, seen, writes, rows, applied, MAX_STALENESS, verdict)


def _print_faults(outcome: Outcome) -> None:
    print(f"{outcome.done.total()} faults: {_listed(outcome.done)}")
    if times := outcome.recovery:
        print(
            f"until every table had caught up: median {median(times):.2f} s, "
            f"worst {max(times):.2f} s"
        )


def _print_probes(prober: Prober) -> None:
    times = sorted((p.seen - p.published) / 1e6 for seen in prober.seen.values() for p in seen)
    if times:
        print(
            f"{len(times)} probes seen in tables after {median(times):.1f} ms in the median, "
            f"{times[int(len(times) * 0.99)]:.0f} ms at p99"
        )


def _print_ways(verdict: Verdict) -> list[str]:
    """Returns the ways that were hardly ever answered from a cache."""
    print(f"{verdict.reads.total()} reads, {verdict.hits.total()} of them hits:")
    idle = []
    for number, way in enumerate(ways()):
        reads, hits, stale = (c[number] for c in (verdict.reads, verdict.hits, verdict.stale))
        share = hits / reads if reads else 0.0
        print(f"  {way.name:34} {reads:7} reads {share:6.1%} hits  {stale:5} stale as allowed")
        if share < LEAST_HITS:
            idle.append(way.name)
    return idle


def _print_stats(deployment: Deployment) -> None:
    """What the near caches counted themselves: stale entries and bypasses are prevented errors."""
    total: dict[str, Counter[str]] = {}
    for path in deployment.folder.glob("*/*.stats"):
        for alias, counts in json.loads(path.read_text()).items():
            numbers = {name: n for name, n in counts.items() if isinstance(n, int)}
            total.setdefault(alias, Counter()).update(numbers)
    for alias, counts in sorted(total.items()):
        print(f"  {alias}: {_listed(counts)}")


def _print_violations(verdict: Verdict) -> bool:
    if not verdict.violations:
        return False
    names = [way.name for way in ways()]
    rules = Counter((each.rule, names[each.way]) for each in verdict.violations)
    print(f"{len(verdict.violations)} violations:")
    for (rule, name), count in rules.most_common():
        print(f"  {rule}, {name}: {count}")
    worst = sorted(verdict.violations, key=lambda each: -each.late)
    for each in islice(worst, SHOWN):
        print(
            f"  {each.rule}: row {each.row} by {names[each.way]} on {each.where} at "
            f"{each.begun / 1e9:.3f}: stamp {each.stamp}, {each.late * 1e3:.1f} ms too late"
        )
    return True


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common()) or "none"
