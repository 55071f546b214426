"""``manage.py pgnotify_prune``: remove old events from the log, as ``pglisten`` does by itself."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand

from django_pgnotify.durable.retention import ROWS_PER_RUN, LogPruner
from django_pgnotify.management.arguments import count, seconds
from django_pgnotify.management.durable import add_database, database


class Command(BaseCommand):
    help = (
        "Remove events that are older than the retention and that every consumer has passed, "
        "and those older than the limit."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_database(parser)
        parser.add_argument(
            "--retention",
            type=seconds,
            metavar="SECONDS",
            help="keep what is younger (default: PGNOTIFY_LOG_RETENTION)",
        )
        parser.add_argument(
            "--limit",
            type=seconds,
            metavar="SECONDS",
            help="remove what is older though a consumer has not passed it, which is told of a "
            "gap (default: PGNOTIFY_LOG_LIMIT)",
        )
        parser.add_argument(
            "--max-rows",
            type=count,
            metavar="N",
            help="look at N of the oldest rows at most (default: all that are old)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        pruner = LogPruner(database(options["database"]))
        removed, left = 0, options["max_rows"]
        more = True
        while more and (left is None or left > 0):
            rows = ROWS_PER_RUN if left is None else min(left, ROWS_PER_RUN)
            step = pruner.run(retention=options["retention"], limit=options["limit"], rows=rows)
            removed, more = removed + step.removed, step.more
            if left is not None:
                left -= step.examined
        self.stdout.write(f"{removed} event(s) removed from the log")
