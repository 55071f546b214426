"""The statement that NOTIFYs: by psycopg alone where that is the same, else by Django's cursor.

An event costs its writer one round trip, and Django's cursor with its client-side quoting costs as
much again. Outside a transaction, with nobody looking at the queries, the frames go as they are to
psycopg's own ``execute`` generator, which waits as every other statement of the connection does.
Unnamed statements only, because a pooler may hand each one to another backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import errors, generators, pq

FRAMES_PER_STATEMENT = 64
"""At most 512 kB of payload in one statement, so that a listener works on the first frames of a
large transaction while the others are on their way."""

Frame = tuple[str, str]
"""A wire channel and a payload."""


def notify(frames: Sequence[Frame], connection: BaseDatabaseWrapper) -> None:
    """NOTIFY each frame, in order, in the transaction that is open on ``connection`` if one is.

    Raises:
        django.db.Error: PostgreSQL refused or could not be reached.
    """
    # What cursor() sees to before each statement.
    connection.validate_thread_sharing()
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    execute = _directly if _nobody_looks(connection) else _through_cursor
    for start in range(0, len(frames), FRAMES_PER_STATEMENT):
        execute(frames[start : start + FRAMES_PER_STATEMENT], connection)


def _nobody_looks(connection: BaseDatabaseWrapper) -> bool:
    """Whether there is no transaction to join, no log of queries, and no wrapper around them."""
    raw: Any = connection.connection
    return (
        isinstance(raw, psycopg.Connection)
        and not connection.in_atomic_block
        and not connection.execute_wrappers
        and not connection.queries_logged
        and raw.autocommit
        and raw.pgconn.transaction_status == pq.TransactionStatus.IDLE
    )


# A function call for each frame, not an array of them: an array is quoted or encoded in Python.


def _through_cursor(frames: Sequence[Frame], connection: BaseDatabaseWrapper) -> None:
    query = "SELECT " + ", ".join(["pg_notify(%s, %s)"] * len(frames))
    with connection.cursor() as cursor:
        cursor.execute(query, [text for frame in frames for text in frame])


def _directly(frames: Sequence[Frame], connection: BaseDatabaseWrapper) -> None:
    raw: psycopg.Connection[Any] = connection.connection
    pgconn = raw.pgconn
    values = [text.encode() for frame in frames for text in frame]
    with connection.wrap_database_errors, raw.lock:
        pgconn.send_query_params(_query(len(frames)), values)
        [result] = raw.wait(generators.execute(pgconn))
        if result.status != pq.ExecStatus.TUPLES_OK:
            if pgconn.status == pq.ConnStatus.BAD:
                raise errors.OperationalError(result.get_error_message())
            raise errors.error_from_result(result, encoding="utf-8")


@cache
def _query(count: int) -> bytes:
    calls = (f"pg_notify(${number}, ${number + 1})" for number in range(1, 2 * count, 2))
    return f"SELECT {', '.join(calls)}".encode()
