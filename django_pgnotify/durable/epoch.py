"""Which server and database a cursor belongs to: transaction ids mean nothing elsewhere."""

from __future__ import annotations

import logging
from typing import NamedTuple

from django.db import DatabaseError, connections, transaction

logger = logging.getLogger("django_pgnotify.durable")

_DATABASE = "SELECT oid::text FROM pg_database WHERE datname = current_database()"
_SYSTEM = "SELECT system_identifier::text FROM pg_control_system()"
_TIMELINE = "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
_UNKNOWN = "?"


class Epoch(NamedTuple):
    """A server's system identifier, the database's oid in it, and the timeline it is on."""

    system: str
    database: str
    timeline: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> Epoch:
        return cls(*text.split("/"))

    def foreign_to(self, now: Epoch) -> str | None:
        """Why a cursor of this epoch cannot be used in ``now``; None if it can."""
        if _UNKNOWN not in (self.system, now.system) and self.system != now.system:
            return (
                f"the server's system identifier is {now.system} and was {self.system}: the data "
                f"was restored into, or upgraded to, another cluster"
            )
        if self.database != now.database:
            return f"the database was copied: its oid is {now.database} and was {self.database}"
        return None

    def timeline_changed(self, now: Epoch) -> bool:
        """Whether the server was promoted, or restored to a point in time, in between."""
        return _UNKNOWN not in (self.timeline, now.timeline) and self.timeline != now.timeline


def current_epoch(using: str) -> Epoch:
    """The epoch of the server behind alias ``using``; parts that a role may not ask for are ``?``.

    Raises:
        django.db.Error: the server could not be reached.
    """
    return Epoch(_ask(_SYSTEM, using), _ask(_DATABASE, using), _ask(_TIMELINE, using))


def _ask(statement: str, using: str) -> str:
    connection = connections[using]
    try:
        # A savepoint where a transaction is open: a refusal must not end it.
        with transaction.atomic(using), connection.cursor() as cursor:
            cursor.execute(statement)
            [value] = cursor.fetchone()
            return str(value)
    except DatabaseError as exc:
        if getattr(exc.__cause__, "sqlstate", None) != "42501":
            raise
        logger.warning(
            "The role of database %r may not ask for %s: a restore cannot be told by it",
            using,
            statement.removeprefix("SELECT "),
        )
        return _UNKNOWN
