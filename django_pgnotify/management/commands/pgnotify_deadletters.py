"""``manage.py pgnotify_deadletters``: list, requeue or discard what consumers gave up."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from django_pgnotify import consumers
from django_pgnotify.exceptions import UnknownConsumer
from django_pgnotify.management.arguments import count
from django_pgnotify.management.durable import add_database, database, table


class Command(BaseCommand):
    help = "List the events that durable consumers have given up; requeue or discard them."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_database(parser)
        parser.add_argument("--consumer", metavar="NAME", help="of this one only")
        parser.add_argument(
            "--event",
            type=count,
            action="append",
            dest="events",
            metavar="ID",
            help="this event of the log only; may be repeated",
        )
        parser.add_argument(
            "--limit", type=count, default=50, metavar="N", help="list N at most (default: 50)"
        )
        parser.add_argument("--traceback-of", type=count, metavar="ID", help="print what it raised")
        act = parser.add_mutually_exclusive_group()
        act.add_argument("--requeue", action="store_true", help="have them tried again")
        act.add_argument("--discard", action="store_true", help="give them up for good")
        parser.add_argument(
            "--all", action="store_true", help="requeue or discard without naming any"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        using = database(options["database"])
        try:
            letters = consumers.dead_letters(options["consumer"], using)
        except UnknownConsumer as exc:
            raise CommandError(str(exc)) from exc
        if options["events"]:
            letters = letters.filter(event_id__in=options["events"])
        if options["requeue"] or options["discard"]:
            if not (options["all"] or options["consumer"] or options["events"]):
                raise CommandError("Say which: --consumer NAME, --event ID, or --all.")
            act = consumers.requeue if options["requeue"] else consumers.discard
            verb = "requeued" if options["requeue"] else "discarded"
            dead = set(letters.values_list("event_id", flat=True)) if options["events"] else ()
            unknown = [str(one) for one in options["events"] or () if one not in dead]
            if unknown:
                of = f" of {options['consumer']!r}" if options["consumer"] else ""
                raise CommandError(
                    f"No dead letter{of} is of event {', '.join(unknown)}; nothing was {verb}."
                )
            self.stdout.write(f"{act(letters)} event(s) {verb}")
        elif options["traceback_of"]:
            found = letters.filter(event_id=options["traceback_of"])
            if not found:
                raise CommandError(f"No dead letter is of event {options['traceback_of']}.")
            for letter in found:
                self.stdout.write(f"{letter.consumer.name}, event {letter.event_id}:")
                self.stdout.write(letter.error)
        else:
            rows = [("EVENT", "CONSUMER", "TOPIC", "KEY", "ATTEMPTS", "FAILED", "ERROR")]
            rows += [
                (
                    str(letter.event_id),
                    letter.consumer.name,
                    letter.topic,
                    letter.key or "-",
                    str(letter.attempts),
                    "-" if letter.failed_at is None else f"{letter.failed_at:%Y-%m-%d %H:%M:%S}",
                    consumers.error_line(letter),
                )
                for letter in letters[: options["limit"]]
            ]
            for line in table(rows) if len(rows) > 1 else ["There is no dead letter."]:
                self.stdout.write(line)
