"""The statement that NOTIFYs: by psycopg alone where that is the same, else by Django's cursor.

A transaction's events can ride with its COMMIT. Else they cost the writer a round trip, and the
cursor with its client-side quoting costs as much again. So outside a transaction, with nobody
looking at the queries, the frames go as they are to psycopg's own generators, which wait as every
other statement of the connection does. Unnamed statements only, because a pooler may hand each one
to another backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import errors, generators, pq
from psycopg.abc import PQGen

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


def can_ride(connection: BaseDatabaseWrapper) -> bool:
    """Whether :func:`commit_and_notify` may stand in for the COMMIT that is due."""
    return (
        _is_ours_to_use(connection)
        and not connection.in_atomic_block
        and connection.connection.pgconn.transaction_status == pq.TransactionStatus.INTRANS
    )


def commit_and_notify(
    frames: Sequence[Frame], connection: BaseDatabaseWrapper
) -> psycopg.Error | None:
    """COMMIT, and NOTIFY each frame in a transaction behind it, in one round trip.

    The server skips the NOTIFY where the COMMIT fails.

    Returns:
        Why the NOTIFY failed; the COMMIT stands.

    Raises:
        django.db.Error: the COMMIT failed, or was not answered.
    """
    raw: psycopg.Connection[Any] = connection.connection
    pgconn = raw.pgconn
    values = [text.encode() for frame in frames for text in frame]
    with connection.wrap_database_errors, raw.lock:
        pgconn.enter_pipeline_mode()
        try:
            pgconn.send_query_params(b"COMMIT", None)
            pgconn.send_query_params(_query(len(frames)), values)
            pgconn.pipeline_sync()
            committed, notified = raw.wait(_two_answers(pgconn))
        finally:
            try:
                pgconn.exit_pipeline_mode()
            except psycopg.Error:  # interrupted while answers are under way
                raw.close()
        error = _error_in(committed, pgconn)
        if error is not None:
            raise error
    return _error_in(notified, pgconn)


def _two_answers(pgconn: pq.abc.PGconn) -> PQGen[tuple[pq.abc.PGresult, pq.abc.PGresult]]:
    yield from generators.send(pgconn)
    [first] = yield from generators.fetch_many(pgconn)
    [second] = yield from generators.fetch_many(pgconn)
    while True:
        [end] = yield from generators.fetch_many(pgconn)
        if end.status == pq.ExecStatus.PIPELINE_SYNC:
            return first, second
        # The second transaction commits at the end only: there a full queue is found out.
        second = end


def _error_in(result: pq.abc.PGresult, pgconn: pq.abc.PGconn) -> psycopg.Error | None:
    if result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
        return None
    if pgconn.status == pq.ConnStatus.BAD:
        return errors.OperationalError(result.get_error_message())
    return errors.error_from_result(result, encoding="utf-8")


def _nobody_looks(connection: BaseDatabaseWrapper) -> bool:
    """Whether there is no transaction to join, and nobody to show the statement to."""
    return (
        _is_ours_to_use(connection)
        and not connection.in_atomic_block
        and connection.connection.autocommit
        and connection.connection.pgconn.transaction_status == pq.TransactionStatus.IDLE
    )


def _is_ours_to_use(connection: BaseDatabaseWrapper) -> bool:
    """Whether psycopg is there, as Django set it up, and nobody watches or forbids statements."""
    raw = connection.connection
    return (
        isinstance(raw, psycopg.Connection)
        and not connection.execute_wrappers
        and not connection.queries_logged
        # A test case that allows no queries puts something else in the place of the method.
        and inspect.ismethod(connection.cursor)
        and connection.cursor.__func__ is type(connection.cursor.__self__).cursor  # type: ignore[attr-defined]
        and raw.pgconn.pipeline_status == pq.PipelineStatus.OFF
        and raw.pgconn.parameter_status(b"client_encoding") == b"UTF8"
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
        # Two, if its commit fails when it has been answered: so it does when the queue is full.
        for result in raw.wait(generators.execute(pgconn)):
            error = _error_in(result, pgconn)
            if error is not None:
                raise error


@cache
def _query(count: int) -> bytes:
    calls = (f"pg_notify(${number}, ${number + 1})" for number in range(1, 2 * count, 2))
    return f"SELECT {', '.join(calls)}".encode()
