"""Events that ride with COMMIT: sent behind it in the same round trip, not in one of their own.

To the server they are two transactions, so the COMMIT never waits for the lock of NOTIFY, and where
it fails the NOTIFY is skipped. What cannot ride leaves by the hook of the commit buffer: all but
the first events of a large transaction, those too big for a frame or for another alias, and all of
them while somebody looks at the queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import pq

from ..conf import conf
from ..epochs.use import is_in_use
from ..stats import publishing_stats
from ..wire import Outgoing
from .buffer import FIRST_PORTION, CommitBuffer, Run, encoded, runs_of
from .committed import bump, events_of, names_of_events
from .sender import is_default_transport, packer_in_use
from .statement import FRAMES_PER_STATEMENT, Frame, can_ride, commit_and_notify
from .unsent import in_doubt, report_unsent


def let_events_ride(connection: BaseDatabaseWrapper, buffer: CommitBuffer) -> None:
    """Have the events of each transaction of ``connection`` ride with its COMMIT.

    What they invalidate is stale on this node when the COMMIT has been answered, before anybody's
    hook runs; or when nobody will ever know whether it took place.
    """
    commit = connection._commit  # type: ignore[attr-defined]
    rollback = connection._rollback  # type: ignore[attr-defined]

    def commit_with_events() -> None:
        runs = runs_of(connection)
        if runs and _is_rolled_back(connection):
            for run in runs:
                run.events, run.sent = [], []
        # Only looked at when the locks are gone.
        events = events_of(runs)
        if buffer.by_hand:
            events += buffer.by_hand if is_in_use() else ()
            buffer.by_hand = []
        if not events:
            commit_runs(runs)
            return
        try:
            commit_runs(runs)
        except BaseException:
            in_doubt(names_of_events(events), connection)
            raise
        bump(names_of_events(events))

    def commit_runs(runs: list[Run]) -> None:
        riders = _riders(runs, connection) if runs else []
        packer = packer_in_use() if riders else None
        frames = packer.pack(riders) if packer is not None and packer.fit(riders) else []
        if 0 < len(frames) <= FRAMES_PER_STATEMENT:
            _commit_with(frames, riders, connection)
            _forget(len(riders), runs)
        else:
            commit()

    def rollback_with_events() -> None:
        buffer.by_hand = []
        rollback()

    # Django has no hook before COMMIT. Should it once not ask _commit() any more, events leave by
    # the hook behind it.
    connection._commit = commit_with_events  # type: ignore[attr-defined]
    connection._rollback = rollback_with_events  # type: ignore[attr-defined]


def _riders(runs: Sequence[Run], connection: BaseDatabaseWrapper) -> list[Outgoing]:
    """The first events of the transaction, as many as can ride; they are encoded in their runs."""
    if (
        any(run.using != connection.alias for run in runs)
        or conf.BACKGROUND_SENDER
        or not is_default_transport()
        or not can_ride(connection)
    ):
        return []
    riders: list[Outgoing] = []
    for run in runs:
        first = run.events[: FIRST_PORTION - len(riders)]
        sent = encoded(first)
        run.events[: len(first)] = sent
        riders += sent
    return riders


def _commit_with(
    frames: Sequence[Frame], events: Sequence[Outgoing], connection: BaseDatabaseWrapper
) -> None:
    error = commit_and_notify(frames, connection)
    if error is not None:
        report_unsent(events, connection.alias, error)
    else:
        publishing_stats.add("published", len(events))
        publishing_stats.add("frames", len(frames))


def _forget(count: int, runs: Sequence[Run]) -> None:
    """Leave to the hook what has not ridden."""
    for run in runs:
        gone = min(count, len(run.events))
        del run.events[:gone]
        count -= gone


def _is_rolled_back(connection: BaseDatabaseWrapper) -> bool:
    """Whether an error that somebody swallowed has made a rollback of the COMMIT that is due."""
    raw = connection.connection
    return (
        isinstance(raw, psycopg.Connection)
        and raw.pgconn.transaction_status == pq.TransactionStatus.INERROR
    )
