"""``manage.py pgnotify_consumers``: list durable consumers, pause, resume, reset, delete."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from django_pgnotify import consumers
from django_pgnotify.exceptions import UnknownConsumer
from django_pgnotify.management.durable import (
    add_database,
    as_dict,
    database,
    lines,
    moment,
    registered,
    unmade_as_dict,
    unmade_lines,
)

_WORDS = ("now", "beginning", "continue")


class Command(BaseCommand):
    help = "List the durable consumers with how far each is behind, or change one of them."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_database(parser)
        parser.add_argument("--json", action="store_true", help="print JSON, for programs")
        change = parser.add_mutually_exclusive_group()
        change.add_argument("--pause", metavar="NAME", help="stop after the events at hand")
        change.add_argument("--resume", metavar="NAME", help="go on where it stopped")
        change.add_argument("--delete", metavar="NAME", help="forget it and its dead letters")
        change.add_argument(
            "--reset", metavar="NAME", help="set where it goes on (see --to), and end a resync"
        )
        parser.add_argument(
            "--to",
            type=_place,
            metavar="PLACE",
            help="for --reset: now, beginning, continue (keep its place) or a time",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        using = database(options["database"])
        if (options["reset"] is None) is not (options["to"] is None):
            raise CommandError("--reset NAME and --to PLACE go together.")
        try:
            done = self._change(using, options)
        except UnknownConsumer as exc:
            raise CommandError(str(exc)) from exc
        if done is not None:
            self.stdout.write(done)
            return
        known = consumers.consumers(using)
        made = {one.name for one, _ in known}
        unmade = {name: one for name, one in registered(using).items() if name not in made}
        if options["json"]:
            found = [as_dict(one, lag) for one, lag in known]
            found += map(unmade_as_dict, unmade.values())
            self.stdout.write(json.dumps(found, indent=2))
        elif known or unmade:
            for line in (lines(known) if known else []) + unmade_lines(list(unmade), using):
                self.stdout.write(line)
        else:
            self.stdout.write("There is no durable consumer.")

    def _change(self, using: str, options: dict[str, Any]) -> str | None:
        if (name := options["pause"]) is not None:
            consumers.pause(name, using)
            return f"{name}: paused"
        if (name := options["resume"]) is not None:
            consumers.resume(name, using)
            return f"{name}: resumed"
        if (name := options["delete"]) is not None:
            consumers.delete(name, using)
            if (one := registered(using).get(name)) is None:
                return f"{name}: deleted"
            place = "now" if one.start == "now" else "the beginning of the log"
            return f"{name}: deleted; the code still has it: pglisten makes it anew, from {place}"
        if (name := options["reset"]) is not None:
            consumers.reset(name, options["to"], using)
            return f"{name}: reset to {options['to']}"
        return None


def _place(text: str) -> str | datetime:
    try:
        return text if text in _WORDS else moment(text)
    except argparse.ArgumentTypeError as exc:
        raise argparse.ArgumentTypeError(f"{exc}, nor one of {', '.join(_WORDS)}") from exc
