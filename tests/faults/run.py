"""``make faults``: break things at random, and account for every number that was published.

    python -m tests.faults.run --faults 200 --seed 7
    python -m tests.faults.run --memory

Exits 0 only if nothing was lost silently, told late, out of order, or handled twice, and
memory stayed bounded. What the words mean is said in ``checker.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.faults.checker import Led, Verdict, check
from tests.faults.cluster import SETTINGS, Cluster, Running
from tests.faults.faults import Fault, Round, Scene, draw
from tests.faults.publisher import TABLE, Publisher, until

EVERY_NODE = ("node",)
LEADERS = ("leader", "raising")
RECOVERY_LIMIT = 30.0
"""Seconds after which a listener that has not recovered counts as one that never will."""
GROWTH_LIMIT = 32 * 1024 * 1024
"""Bytes that a listener may grow by in a run of faults, floods that overflow included."""

Times = dict[str, list[float]]


@dataclass
class Outcome:
    """What a run measured."""

    done: Counter[str] = field(default_factory=Counter)
    recovery: Times = field(default_factory=dict)
    take_over: Times = field(default_factory=dict)
    stuck: str | None = None


def main() -> int:
    options = _parse()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="pgnotify-faults-"))
    if options.memory:
        from tests.faults.memory import run_memory

        code = run_memory(folder, options.pg)
    else:
        print(f"{options.faults} faults, seed {seed}, {options.listeners} listeners", flush=True)
        code = _run(options, seed, folder)
    if code and not options.memory:
        print(f"records are kept in {folder}; again with --seed {seed}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, help="default: one that is made up and printed")
    parser.add_argument("--listeners", type=int, choices=(2, 3), default=3)
    parser.add_argument(
        "--pairs",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="share of the rounds in which two faults overlap",
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only kinds of fault that match"
    )
    parser.add_argument("--pg", type=int, choices=(16, 18), default=18, help="server version")
    parser.add_argument("--verbose", action="store_true", help="say each fault as it happens")
    parser.add_argument(
        "--memory", action="store_true", help="1,000,000 events through one listener instead"
    )
    return parser.parse_args()


def _run(options: argparse.Namespace, seed: int, folder: Path) -> int:
    chance = random.Random(f"faults {seed}")
    wanted = (options.faults, chance, options.pairs, options.only)
    begun = time.monotonic()
    outcome = Outcome()
    with Cluster(folder, options.listeners, options.pg) as cluster:
        publisher = _prepare(cluster, seed)
        scene = Scene(cluster, publisher, chance)
        for slot in cluster.slots:
            slot.start()
        if not until(lambda: _all_established(cluster), RECOVERY_LIMIT):
            print(_reports(cluster), file=sys.stderr)
            return 1
        publisher.start()
        try:
            _await_recovery(scene)
            for number, one_round in enumerate(draw(*wanted), 1):
                faults = _play(scene, one_round, outcome)
                if options.verbose:
                    print(f"{number:4} {' + '.join(map(str, faults))}", flush=True)
                if outcome.stuck:
                    break
        finally:
            publisher.finish()
        if outcome.stuck is None:
            _settle(scene, outcome)
        if outcome.stuck:
            print(_reports(cluster), file=sys.stderr)
        _end_all(cluster)
        everybody = cluster.everybody
    if publisher.error is not None:
        raise publisher.error
    lives = [running.life for running in everybody]
    verdict = check(
        publisher.published,
        lives,
        every_node=EVERY_NODE,
        leaders=LEADERS,
    )
    _keep(folder, publisher)
    _print(outcome, publisher, verdict)
    bounded = _print_memory(everybody)
    print(f"{time.monotonic() - begun:.0f} s")
    return _conclude(outcome, verdict, bounded, seed)


def _prepare(cluster: Cluster, seed: int) -> Publisher:
    """Django for this process, which publishes directly, past the proxies."""
    os.environ["DATABASE_URL"] = cluster.url
    os.environ["DJANGO_SETTINGS_MODULE"] = SETTINGS
    import django
    from django.core.management import call_command
    from django.db import connection

    django.setup()
    call_command("migrate", verbosity=0)
    with connection.cursor() as cursor:
        cursor.execute(TABLE)
    connection.close()
    return Publisher(seed)


def _all_established(cluster: Cluster) -> bool:
    cluster.look()
    return all(running.established for running in cluster.running)


# -- one round ------------------------------------------------------------------------------------


def _play(scene: Scene, one_round: Round, outcome: Outcome) -> list[Fault]:
    """Let the faults of a round overlap, and measure how everything comes back."""
    faults = [make(scene) for make in one_round]
    label = " + ".join(sorted(fault.label for fault in faults))
    begun = time.time()
    for place, fault in enumerate(faults):
        if place:
            time.sleep(scene.random.uniform(0.0, 0.5))
        fault.aim()
        if not place:
            begun = time.time()
        fault.begin()
    time.sleep(max(fault.duration for fault in faults))
    for fault in sorted(faults, key=lambda fault: fault.ends_last):
        fault.end()
    single = len(faults) == 1
    at_once = single and faults[0].duration == 0 and not faults[0].ends_last
    lifted = begun if at_once else time.time()
    outcome.done.update(fault.label for fault in faults)
    if not _await_recovery(scene):
        outcome.stuck = f"no recovery within {RECOVERY_LIMIT:g} s of {label}"
        return faults
    outcome.recovery.setdefault(label if single else "two at once", []).append(time.time() - lifted)
    if single and (faults[0].role == "leader" or faults[0].kind.startswith("server")):
        took_over = [
            line.at - begun
            for running in scene.cluster.everybody
            for line in running.life.lines
            if isinstance(line, Led) and line.leader and line.at > begun
        ]
        if took_over:
            outcome.take_over.setdefault(label, []).append(min(took_over))
    # Quiet for a while, so that a fault also meets listeners that are healthy again.
    time.sleep(scene.random.uniform(0.05, 0.4))
    return faults


def _await_recovery(scene: Scene) -> bool:
    """Wait until a number published from now on was handled by every listener, and by a leader."""
    first = scene.publisher.next_number
    # A burst that is being published now must not count as one that was.
    target = first + 3
    if not until(lambda: _handled(scene.cluster, target), RECOVERY_LIMIT):
        return False
    for running in scene.cluster.running:
        running.life.up_to_date = first - 1
        running.sample_memory()
    return True


def _handled(cluster: Cluster, target: int) -> bool:
    cluster.look()
    running = cluster.running
    return all(each.last.get(name, 0) >= target for each in running for name in EVERY_NODE) and all(
        any(each.last.get(name, 0) >= target for each in running) for name in LEADERS
    )


def _settle(scene: Scene, outcome: Outcome) -> None:
    """The publisher has stopped: everybody must come to hear of its last number."""
    last = scene.publisher.last_sent()
    if not until(lambda: _handled(scene.cluster, last), RECOVERY_LIMIT):
        outcome.stuck = f"the last number, {last}, was not handled everywhere"
    for running in scene.cluster.running:
        running.life.up_to_date = last
        running.sample_memory()


def _end_all(cluster: Cluster) -> None:
    for running in cluster.running:
        running.life.ended_at = time.time()
        cluster.signal(running, signal.SIGCONT)
        cluster.signal(running, signal.SIGTERM)
    for running in cluster.running:
        try:
            running.end("terminated")
        except AssertionError as exc:  # it does not end; said, and killed with the cluster
            print(exc, file=sys.stderr)


# -- what it says ---------------------------------------------------------------------------------


def _print(outcome: Outcome, publisher: Publisher, verdict: Verdict) -> None:
    print("\nfault                                        times   recovery median / worst")
    for label, times in sorted(outcome.done.items()):
        print(f"  {label:42} {times:5}   {_figures(outcome.recovery.get(label))}")
    if both := outcome.recovery.get("two at once"):
        print(f"  {'(two at once)':42} {len(both):5}   {_figures(both)}")
    print("\nwhat the leader met                          times   take-over median / worst")
    for label, values in sorted(outcome.take_over.items()):
        print(f"  {label:42} {len(values):5}   {_figures(values)}")
    statuses: Counter[str] = Counter(number.status for number in publisher.published)
    print(f"\n{len(publisher.published)} numbers: {_listed(statuses)}")
    for receiver, counts in verdict.counts.items():
        print(f"  {receiver}: {_listed(counts)}")
    if verdict.widths:
        print(f"{len(verdict.widths)} gaps, wide {_figures(verdict.widths)} (median / worst)")


def _print_memory(everybody: list[Running]) -> bool:
    """RSS of the listeners that lived longest, early and at the end; whether it is bounded."""
    bounded = True
    sampled = [running for running in everybody if len(running.rss) > 1]
    for running in sorted(sampled, key=lambda r: r.rss[-1][0] - r.rss[0][0], reverse=True)[:3]:
        (begun, early), (ended, late) = running.rss[0], running.rss[-1]
        peak = max(rss for _, rss in running.rss)
        bounded = bounded and peak - early <= GROWTH_LIMIT
        print(
            f"RSS of {running.life.name}: {early / 2**20:.1f} MiB, after {ended - begun:.0f} s "
            f"{late / 2**20:.1f} MiB, at most {peak / 2**20:.1f} MiB"
        )
    return bounded


def _conclude(outcome: Outcome, verdict: Verdict, bounded: bool, seed: int) -> int:
    failed = False
    if outcome.stuck:
        failed = True
        print(f"FAILED (seed {seed}): {outcome.stuck}")
    if verdict.violations:
        failed = True
        rules = Counter(violation.rule for violation in verdict.violations)
        print(f"FAILED (seed {seed}): {_listed(rules)}; the first of them:")
        for violation in verdict.violations[:20]:
            print(f"  {violation}")
    if not bounded:
        failed = True
        print(f"FAILED (seed {seed}): a listener grew by more than {GROWTH_LIMIT >> 20} MiB")
    if not failed:
        print("nothing was lost silently, told late, or out of order")
    return int(failed)


def _keep(folder: Path, publisher: Publisher) -> None:
    with (folder / "published.jsonl").open("w") as file:
        for number in publisher.published:
            file.write(json.dumps(number) + "\n")


def _figures(values: list[float] | None) -> str:
    return f"{median(values):6.2f} s / {max(values):6.2f} s" if values else "   -"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common())


def _reports(cluster: Cluster) -> str:
    return "\n".join(
        [cluster.who_is_there()]
        + [
            f"{running.life.name}\n{running.process.report()[-3000:]}"
            for running in cluster.running
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
