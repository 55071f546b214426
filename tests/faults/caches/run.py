"""``make cache-check``: writers, readers through caches, faults, and no read staler than promised.

    python -m tests.faults.caches.run --seconds 60 --seed 7
    python -m tests.faults.caches.run --without-epochs      # must fail: it checks the checker

Exits 0 only if no read broke a rule of ``judge.py``, and enough of them were answered by caches
for that to mean something.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests import redis_server

if TYPE_CHECKING:
    from django_pgnotify.caching import EpochTable
    from tests.faults.caches.nodes import Deployment, Node
    from tests.faults.caches.prober import Prober

SABOTAGES = (
    "fill-race",
    "silent-gap",
    "eternal-trust",
    "own-node-waits",
    "early-publication",
)
"""What is in ``sabotage.py``, which cannot be imported before Django is set up."""
SETTINGS = "tests.faults.caches.settings"
RECOVERY_LIMIT = 40.0
"""Seconds after which a table that has not moved on counts as one that never will."""
QUIET = 0.8
"""At most so many seconds between two faults."""


@dataclass
class Outcome:
    done: Counter[str] = field(default_factory=Counter)
    recovery: list[float] = field(default_factory=list)
    stuck: str | None = None


def main() -> int:
    options = _parse()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="pgnotify-caches-"))
    print(f"seed {seed}: at least {options.seconds:g} s", flush=True)
    code = _run(options, f"caches {seed}", folder)
    if code:
        print(f"FAILED; records are kept in {folder}; again with --seed {seed}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.caches.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="default: one that is made up and printed")
    parser.add_argument(
        "--without-epochs", action="store_true", help="caches that know no epochs, which must fail"
    )
    parser.add_argument(
        "--sabotage",
        choices=(*SABOTAGES, ""),
        default="",
        help="take one safeguard away, which must fail too",
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only kinds of fault that match"
    )
    parser.add_argument(
        "--small", action="store_true", help="fewer processes, so that it begins sooner"
    )
    parser.add_argument("--pg", type=int, choices=(16, 18), default=18, help="server version")
    parser.add_argument("--verbose", action="store_true", help="say each fault as it happens")
    return parser.parse_args()


def _run(options: argparse.Namespace, seed: str, folder: Path) -> int:
    begun = time.monotonic()
    (folder / "driver").mkdir()
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": SETTINGS,
        "CHECK_FOLDER": str(folder / "driver"),
        "DATABASE_URL": "postgresql://127.0.0.1/",  # until there is a server
    }
    if options.without_epochs:
        os.environ["CHECK_NAIVE"] = "1"
    if options.sabotage:
        os.environ["CHECK_SABOTAGE"] = options.sabotage
    with ExitStack() as stack:
        if redis_server.missing() is None:
            os.environ["CHECK_REDIS"] = stack.enter_context(redis_server.redis_server())
        import django

        django.setup()
        from tests.faults.caches.nodes import Deployment
        from tests.faults.caches.report import conclude

        deployment = stack.enter_context(Deployment(folder, seed, version=options.pg))
        _prepare(deployment)
        prober = _start(deployment, small=options.small)
        outcome = Outcome()
        try:
            _play(options, deployment, prober, random.Random(seed), outcome)
        finally:
            prober.finish()
        for node in deployment.nodes:
            node.finish()
        code = conclude(deployment, prober, outcome, _final_stamps())
    print(f"{time.monotonic() - begun:.0f} s")
    return code


def _prepare(deployment: Deployment) -> None:
    """Tables and rows; this process writes past the proxies."""
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connections

    from tests.faults.caches.models import create_rows, slow_commits_down
    from tests.settings import database_settings

    for alias in connections:
        connections[alias].settings_dict.update(database_settings(deployment.url))
    call_command("migrate", run_syncdb=True, verbosity=0)
    call_command("createcachetable", settings.CACHES["database"]["LOCATION"], verbosity=0)
    create_rows()
    slow_commits_down()
    connections.close_all()


def _start(deployment: Deployment, *, small: bool) -> Prober:
    """Two nodes with a ``pglisten`` each and, unless it is to be small, a process by itself."""
    from tests.faults.caches.prober import Prober

    for lone in (False, False) if small else (False, False, True):
        deployment.add_node(lone=lone)
    shared = [node for node in deployment.nodes if not node.lone]
    for node in shared:
        node.start_listener()
    for node in deployment.nodes:
        first = node.number == 0
        if node.lone:
            node.start_readers(alone=True, forked=1)
        elif small:
            node.start_readers(alone=not first, forked=1 if first else 0)
            node.start_writers("steady" if first else "mortal")
        else:
            node.start_readers(alone=True, forked=2)
            node.start_writers("steady", "mortal")
    for node in deployment.nodes:
        if node.listener is not None:
            node.listener.wait_for_line("^pglisten: ready", timeout=60)
        for process in node.readers:
            process.wait_for_line("^reading", timeout=60)
        for process in node.writers.values():
            process.wait_for_line("^writing", timeout=60)
    prober = Prober({node.number: _table(node) for node in shared})
    prober.start()
    return prober


def _table(node: Node) -> EpochTable:
    from django.test import override_settings

    from django_pgnotify.epochs.node import node_table

    with override_settings(PGNOTIFY_EPOCH_TABLE=str(node.table)):
        return node_table()


def _play(
    options: argparse.Namespace,
    deployment: Deployment,
    prober: Prober,
    chance: random.Random,
    outcome: Outcome,
) -> None:
    from tests.faults.caches.faults import draw

    ends = time.monotonic() + options.seconds
    for fault in draw(deployment.nodes, chance, options.only):
        time.sleep(chance.uniform(0.0, QUIET))  # healthy for a while
        if time.monotonic() > ends:
            return
        fault.begin()
        if options.verbose:
            print(f"{time.monotonic_ns() / 1e9:.2f} {fault}", flush=True)
        time.sleep(fault.duration)
        fault.end()
        outcome.done[fault.kind] += 1
        if not _recovered(prober, outcome):
            outcome.stuck = f"the tables did not move on within {RECOVERY_LIMIT:g} s of {fault}"
            return


def _recovered(prober: Prober, outcome: Outcome) -> bool:
    """Wait until every node has applied what was published after the fault."""
    lifted = time.monotonic_ns()
    while not all(prober.applied_since(node, lifted) for node in prober.seen):
        if time.monotonic_ns() > lifted + RECOVERY_LIMIT * 1e9:
            return False
        time.sleep(0.005)
    outcome.recovery.append((time.monotonic_ns() - lifted) / 1e9)
    return True


def _final_stamps() -> dict[int, int]:
    from tests.faults.caches.models import NUMBERS, stamp_of

    return {row: stamp_of(row) for row in NUMBERS}


if __name__ == "__main__":
    sys.exit(main())
