"""``manage.py pgnotify_replay``: give a durable consumer events of the log again."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from django_pgnotify import consumers
from django_pgnotify.exceptions import InvalidArgument
from django_pgnotify.management.arguments import count
from django_pgnotify.management.durable import add_database, database, moment


class Command(BaseCommand):
    help = "Give one durable consumer events of the log again: a stretch of time, or chosen ones."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_database(parser)
        parser.add_argument("consumer", metavar="NAME", help="name of the consumer")
        parser.add_argument(
            "--since", type=moment, metavar="TIME", help="published at this time or later"
        )
        parser.add_argument(
            "--until", type=moment, metavar="TIME", help="published before this time"
        )
        parser.add_argument(
            "--event",
            type=count,
            action="append",
            dest="events",
            metavar="ID",
            help="this event of the log; may be repeated",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["since"] is options["until"] is options["events"] is None:
            raise CommandError("Say which events: --since TIME, --until TIME or --event ID.")
        try:
            replayed = consumers.replay(
                options["consumer"],
                since=options["since"],
                until=options["until"],
                events=options["events"],
                using=database(options["database"]),
            )
        except InvalidArgument as exc:
            raise CommandError(str(exc)) from exc
        self.stdout.write(f"{options['consumer']} will get {replayed} event(s) again")
