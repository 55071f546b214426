"""``manage.py pgnotify_status``: who listens, how they are, and how full the queue is."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import ProgrammingError

from django_pgnotify.conf import conf
from django_pgnotify.consumers import consumers
from django_pgnotify.durable.lag import Lag
from django_pgnotify.epochs.use import staleness_limits
from django_pgnotify.exceptions import ListenError, UnsupportedDatabase
from django_pgnotify.listening.roll_call import RollCall, call_the_roll
from django_pgnotify.management.arguments import seconds
from django_pgnotify.management.caches import cache_lines, caches_of_nodes, caches_of_this_node
from django_pgnotify.management.durable import as_dict, lines, table
from django_pgnotify.models import Consumer
from django_pgnotify.publishing.sender import check_alias

WELL, NOT_WELL, UNREACHABLE = 0, 1, 2

LONGEST_CAUSE = 40
"""Characters of a gap's cause that the table shows; JSON has all of it."""


class Command(BaseCommand):
    help = (
        "Ask every live listener how it is. Exit code 0: there is one, and a leader, and all are "
        "ready; 1: not so; 2: the database cannot be reached."
    )
    # It is what one looks at when something is wrong, and says itself what is with the caches.
    requires_system_checks = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--database",
            metavar="ALIAS",
            help="database alias to ask on (default: PGNOTIFY_LISTEN_DATABASE, "
            "else PGNOTIFY_DATABASE)",
        )
        parser.add_argument(
            "--timeout",
            type=seconds,
            default=1.0,
            metavar="SECONDS",
            help="how long listeners have to answer (default: 1)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            using = check_alias(options["database"] or conf.listen_database)
            roll = asyncio.run(call_the_roll(using, options["timeout"]))
        except UnsupportedDatabase as exc:
            raise CommandError(str(exc), returncode=UNREACHABLE) from exc
        except ListenError as exc:
            message = f"cannot listen on database {using!r}: {exc}"
            raise CommandError(message, returncode=UNREACHABLE) from exc
        problem = _problem(roll)
        known = _consumers(conf.rows_database(using))
        nodes = caches_of_nodes([*roll.listeners, *caches_of_this_node()])
        if options["json"]:
            self.stdout.write(json.dumps(_as_json(roll, problem, known, nodes), indent=2))
        else:
            self._print(roll, problem, known, nodes)
        sys.exit(WELL if problem is None else NOT_WELL)

    def _print(
        self,
        roll: RollCall,
        problem: str | None,
        known: list[tuple[Consumer, Lag]],
        nodes: list[dict[str, Any]],
    ) -> None:
        for line in table([_HEADINGS, *map(_row, roll.listeners)]):
            self.stdout.write(line)
        for line in lines(known) if known else ():
            self.stdout.write(line)
        for line in cache_lines(nodes, staleness_limits()):
            self.stdout.write(line)
        self.stdout.write(f"notification queue: {roll.queue_usage:.1%} full")
        for suspect in roll.suspects:
            self.stdout.write(
                f"  holds up the queue if it listens: backend {suspect.pid} "
                f"({suspect.application or 'no name'}, {suspect.user} on {suspect.database}), "
                f"{suspect.state} for "
                f"{suspect.seconds:.0f} s {suspect.wait}".rstrip()
            )
        if problem is not None:
            self.stdout.write(self.style.ERROR(problem))


_HEADINGS = (
    "NODE",
    "PID",
    "BACKEND",
    "ROLE",
    "SINCE",
    "LAST ECHO",
    "RTT",
    "WAITING",
    "HANDLED",
    "FAILED",
    "DROPPED",
    "LAST GAP",
    "TOPICS",
)


def _row(status: dict[str, Any]) -> tuple[str, ...]:
    counts = status.get("counts", {})
    round_trip, gap = status.get("round_trip"), status.get("last_gap")
    return (
        str(status["node"]),
        str(status["pid"]),
        str(status["backend"]),
        str(status["role"]),
        _clock(status.get("established_since")),
        _clock(status.get("last_echo")),
        "-" if round_trip is None else f"{round_trip * 1000:.1f} ms",
        str(status.get("waiting", "-")),
        str(counts.get("handled", 0)),
        str(counts.get("failed", 0)),
        str(counts.get("dropped", 0)),
        "-" if gap is None else f"{_clock(gap['until'])} ({_short(gap['cause'])})",
        ", ".join(status["topics"]),
    )


def _clock(moment: str | None) -> str:
    return "-" if moment is None else moment[11:19]


def _short(cause: str) -> str:
    return cause if len(cause) <= LONGEST_CAUSE else f"{cause[: LONGEST_CAUSE - 1].rstrip()}…"


def _problem(roll: RollCall) -> str | None:
    """What a probe should fail for, None if all is well."""
    workers = [status for status in roll.listeners if status["role"] != "in process"]
    if not workers:
        return "No pglisten answers."
    waiting = {status["leadership"] for status in workers if status["role"] == "standby"}
    leading = {status["leadership"] for status in workers if status["role"] == "leader"}
    if waiting - leading:
        return f"No pglisten is the leader of {', '.join(sorted(waiting - leading))}."
    unready = [
        f"{one['pid']} on {one['node']}"
        for one in workers
        if one["established"] and not one.get("ready", True)
    ]
    if unready:
        return (
            f"pglisten is not ready: process {', '.join(unready)}. Its durable consumers have no "
            f"rows yet; its log says what they wait for."
        )
    return None


def _consumers(using: str) -> list[tuple[Consumer, Lag]]:
    """The durable consumers; none where the tables have not been made yet."""
    try:
        return consumers(using)
    except ProgrammingError:
        return []


def _as_json(
    roll: RollCall,
    problem: str | None,
    known: list[tuple[Consumer, Lag]],
    nodes: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "problem": problem,
        "listeners": roll.listeners,
        "consumers": [as_dict(*one) for one in known],
        "caches": nodes,
        "queue_usage": roll.queue_usage,
        "suspects": [suspect._asdict() for suspect in roll.suspects],
    }
