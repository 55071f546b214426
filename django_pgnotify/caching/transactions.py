"""What an open transaction means for caches: what it writes, nobody may see before the COMMIT.

Asked of PostgreSQL itself, so that raw SQL and bulk operations count too, and only after a miss. In
a TestCase, whose own transaction never commits, it is as if there were none. One by hand
(``set_autocommit(False)``) has no hook for its COMMIT, so what it loads once it has written is not
stored at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import pq

from ..publishing.buffer import runs_of
from ..publishing.committed import names_of_events, pending_names
from ..publishing.publisher import sent_by_hand

_PROBE = (
    "SELECT pg_current_xact_id_if_assigned() IS NOT NULL,"
    " current_setting('transaction_isolation') = 'read committed'"
)


def in_transaction() -> bool:
    """Whether this thread has a transaction open, other than that of a TestCase."""
    return any(True for _ in _open())


def publish(store: Callable[[], Any]) -> bool:
    """Have ``store`` called as soon as others may see what was loaded just now.

    At once, outside a transaction or in one that has written nothing; after its COMMIT in one that
    has; never after a rollback, of the savepoint too, never in one by hand, and never for what was
    read from a snapshot (REPEATABLE READ), which may be older than any lease.

    Returns:
        Whether it was called.
    """
    waits_for = writers()
    if waits_for:
        after_all(waits_for, store)
    elif waits_for is not None:
        store()
        return True
    return False


def writers() -> list[BaseDatabaseWrapper] | None:
    """Whose COMMIT what was loaded just now has to wait for; None where it is not to be stored."""
    found = []
    for connection in _open():
        written, sees_commits = _probe(connection)
        if not sees_commits or (written and not connection.in_atomic_block):
            return None
        if written:
            found.append(connection)
    return found


def after_all(connections: list[BaseDatabaseWrapper], store: Callable[[], Any]) -> None:
    """Have ``store`` called once all of their transactions have been committed.

    Each gets its hook now: one that is registered later would outlive a rollback before that.
    """
    waited_for = len(connections)

    def committed() -> None:
        nonlocal waited_for
        waited_for -= 1
        if not waited_for:
            store()

    for connection in connections:
        connection.on_commit(committed, robust=True)


def touched_names() -> set[str]:
    """What the open transactions of this thread will invalidate with their COMMIT."""
    names: set[str] = set()
    for connection in _open():
        runs = runs_of(connection) if connection.run_on_commit else ()
        if runs:
            names |= pending_names(runs)
        by_hand = sent_by_hand(connection)
        if by_hand:
            names |= names_of_events(by_hand)
    return names


def _open() -> Iterator[BaseDatabaseWrapper]:
    for connection in connections.all(initialized_only=True):
        if connection.vendor != "postgresql":
            continue
        if connection.in_atomic_block:
            blocks = connection.atomic_blocks
            own = [one for one in blocks if not getattr(one, "_from_testcase", False)]
            if len(own) == len(blocks):
                yield connection
        elif _is_open_by_hand(connection):
            yield connection


def _is_open_by_hand(connection: BaseDatabaseWrapper) -> bool:
    raw: psycopg.Connection[Any] | None = connection.connection
    if raw is None or connection.autocommit:
        return False
    return raw.pgconn.transaction_status != pq.TransactionStatus.IDLE


def _probe(connection: BaseDatabaseWrapper) -> tuple[bool, bool]:
    """Whether the transaction has written, and whether each statement sees what was committed."""
    raw: psycopg.Connection[Any] | None = connection.connection
    if raw is None or raw.closed:
        return True, False
    status = raw.pgconn.transaction_status
    if status == pq.TransactionStatus.IDLE:
        return False, True  # it has not begun
    if status != pq.TransactionStatus.INTRANS:
        return True, False
    # Past Django's cursor: whoever counts or forbids queries does not mean this one.
    try:
        [row] = psycopg.Cursor(raw).execute(_PROBE).fetchall()
    except psycopg.Error:
        return True, False  # the connection was lost; whoever uses it next is told
    return bool(row[0]), bool(row[1])
