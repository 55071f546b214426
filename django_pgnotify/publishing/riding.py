"""Events that ride with COMMIT: sent behind it in the same round trip, not in one of their own.

To the server they are two transactions, so the COMMIT never waits for the lock of NOTIFY, and where
it fails the NOTIFY is skipped. What cannot ride leaves by the hook of the commit buffer: events of
large transactions, too big for a frame, for another alias, or while somebody looks at the queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import pq

from ..conf import conf
from ..stats import publishing_stats
from .buffer import FIRST_PORTION, Run, encoded, runs_of
from .sender import is_default_transport, packer_in_use, report_unsent
from .statement import FRAMES_PER_STATEMENT, Frame, can_ride, commit_and_notify


def let_events_ride(connection: BaseDatabaseWrapper) -> None:
    """Have the events of each transaction of ``connection`` ride with its COMMIT."""
    commit = connection._commit  # type: ignore[attr-defined]

    def commit_with_events() -> None:
        runs = runs_of(connection)
        if runs and _is_rolled_back(connection):
            for run in runs:
                run.events = []
        frames = _frames_of(runs, connection) if runs else []
        if frames:
            _commit_with(frames, runs, connection)
        else:
            commit()

    # Django has no hook before COMMIT. Should it once not ask _commit() any more, events leave by
    # the hook behind it.
    connection._commit = commit_with_events  # type: ignore[attr-defined]


def _commit_with(
    frames: Sequence[Frame], runs: Sequence[Run], connection: BaseDatabaseWrapper
) -> None:
    events = [event for run in runs for event in encoded(run.events)]
    error = commit_and_notify(frames, connection)
    for run in runs:
        run.events = []
    if error is not None:
        report_unsent(events, connection.alias, error)
    else:
        publishing_stats.add("published", len(events))
        publishing_stats.add("frames", len(frames))


def _frames_of(runs: Sequence[Run], connection: BaseDatabaseWrapper) -> Sequence[Frame]:
    """What can ride, all of it or nothing."""
    if (
        sum(len(run.events) for run in runs) > FIRST_PORTION
        or any(run.using != connection.alias for run in runs)
        or conf.BACKGROUND_SENDER
        or not is_default_transport()
        or not can_ride(connection)
    ):
        return []
    for run in runs:
        run.events[:] = encoded(run.events)
    events = [event for run in runs for event in encoded(run.events)]
    packer = packer_in_use()
    if not packer.fit(events):
        return []
    frames = packer.pack(events)
    return frames if len(frames) <= FRAMES_PER_STATEMENT else []


def _is_rolled_back(connection: BaseDatabaseWrapper) -> bool:
    """Whether an error that somebody swallowed has made a rollback of the COMMIT that is due."""
    raw = connection.connection
    return (
        isinstance(raw, psycopg.Connection)
        and raw.pgconn.transaction_status == pq.TransactionStatus.INERROR
    )
