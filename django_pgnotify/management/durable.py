"""What the commands of durable topics have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django.core.management.base import CommandError
from django.db import connections
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from django_pgnotify.conf import conf
from django_pgnotify.consumers import state_of
from django_pgnotify.durable.lag import Lag
from django_pgnotify.durable.log import missing_tables
from django_pgnotify.exceptions import UnsupportedDatabase
from django_pgnotify.models import Consumer
from django_pgnotify.publishing.sender import check_alias
from django_pgnotify.registry import Receiver, registry


def add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--database",
        metavar="ALIAS",
        help="database alias that has the log (default: PGNOTIFY_DATABASE)",
    )


def database(alias: str | None) -> str:
    """The alias given, or the default.

    Raises:
        CommandError: it is not PostgreSQL, or has not the tables of durable topics.
    """
    try:
        using = check_alias(alias or conf.DATABASE)
    except UnsupportedDatabase as exc:
        raise CommandError(str(exc)) from exc
    if not has_tables(using):
        raise CommandError(f"pgnotify: {missing_tables(using)}.")
    return using


def has_tables(using: str) -> bool:
    """Whether the tables of durable topics are on alias ``using``."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", [Consumer._meta.db_table])
        return bool(cursor.fetchone() == (True,))


def registered(using: str) -> dict[str, Receiver]:
    """The durable consumers that the code has, by name, where ``using`` has their log."""
    if using != conf.DATABASE:
        return {}
    return {one.uid: one for one in registry.receivers if _topics_of(one)}


def _topics_of(receiver: Receiver) -> tuple[str, ...]:
    return registry.durable_topics(receiver, conf.DELIVERY)


def moment(text: str) -> datetime:
    """A point in time, as ISO 8601; without a zone it is in the project's TIME_ZONE."""
    try:
        value = parse_datetime(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: {exc}") from exc
    if value is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time such as 2025-01-31T12:00:00+00:00"
        )
    return value if timezone.is_aware(value) else timezone.make_aware(value)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns that stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def lines(known: Sequence[tuple[Consumer, Lag]]) -> list[str]:
    """The table of consumers."""
    rows = [("CONSUMER", "STATE", "EVENTS BEHIND", "SECONDS", "DEAD LETTERS", "HANDLED", "HOLDER")]
    for one, lag in known:
        rows.append(
            (
                one.name,
                state_of(one),
                f"{lag.events}{'+' if lag.more else ''}",
                f"{lag.seconds:.1f}",
                str(one.dead_letters.filter(retry_at=None).count()),
                str(one.handled),
                one.holder or "-",
            )
        )
    return table(rows)


def unmade_lines(names: Sequence[str], using: str) -> list[str]:
    """Of consumers that the code has, and that have no row yet."""
    where = "" if using == "default" else f" --database={using}"
    to_do = f"not made yet: run 'manage.py migrate{where}', or start pglisten"
    return table([(name, to_do) for name in names]) if names else []


def as_dict(one: Consumer, lag: Lag) -> dict[str, Any]:
    """A consumer as plain values."""
    return {
        "name": one.name,
        "topics": one.topics,
        "state": state_of(one),
        "paused": one.paused,
        "resync": one.resync,
        "events_behind": lag.events,
        "more_behind": lag.more,
        "seconds_behind": lag.seconds,
        "dead_letters": one.dead_letters.filter(retry_at=None).count(),
        "waiting_letters": one.dead_letters.exclude(retry_at=None).count(),
        "handled": one.handled,
        "lost": one.gap_events,
        "holder": one.holder,
    }


def unmade_as_dict(one: Receiver) -> dict[str, Any]:
    """One that has no row yet, with the members of the others."""
    return {
        "name": one.uid,
        "topics": list(_topics_of(one)),
        "state": "not made yet",
        "paused": False,
        "resync": "",
        "events_behind": 0,
        "more_behind": False,
        "seconds_behind": 0.0,
        "dead_letters": 0,
        "waiting_letters": 0,
        "handled": 0,
        "lost": 0,
        "holder": "",
    }
