"""Connections that were lost, by a restart of the server for one: no event is to blame for that.

Django replaces a broken connection at the end of a request, and here is none: without this, the
connections of a receiver's threads would stay broken, and fail one event after the other.
"""

from __future__ import annotations

import psycopg
from django.db import connections

_SQLSTATES = frozenset({"25P03", "25P04", "57P01", "57P02", "57P03", "57P04", "57P05"})
"""Of a session that was ended, or refused: by an administrator, a crash, or a timeout."""


def is_loss(exc: BaseException) -> bool:
    """Whether a failure comes from a connection that was lost, or could not be made."""
    one: BaseException | None = exc
    for _ in range(20):  # of a chain that somebody tied into a ring
        if one is None:
            break
        if isinstance(one, psycopg.OperationalError):
            # What libpq says by itself, of a connection, has no SQLSTATE.
            return (
                one.sqlstate is None or one.sqlstate.startswith("08") or one.sqlstate in _SQLSTATES
            )
        one = one.__cause__ or one.__context__
    return False


def close_lost() -> None:
    """Close the connections of this thread that an error has broken: the next use connects.

    One that is in a transaction is left to whoever began that.
    """
    for connection in connections.all(initialized_only=True):
        if connection.errors_occurred and not connection.in_atomic_block:
            connection.errors_occurred = False
            if connection.connection is not None and not connection.is_usable():
                connection.close()
