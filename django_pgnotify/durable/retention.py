"""Removes what nobody needs any more from the log, in bounded steps.

An event goes once it is older than ``PGNOTIFY_LOG_RETENTION`` and every consumer of its topic has
passed it; or, passed or not, once it is older than ``PGNOTIFY_LOG_LIMIT``. A consumer that loses
events so is told of it by a gap. Plain DELETEs, by id from the oldest on: the log is written at one
end and removed at the other, so vacuum finds whole pages to hand out again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import connections, transaction

from ..conf import conf

logger = logging.getLogger("django_pgnotify.durable")

BATCH = 2000
ROWS_PER_RUN = 100_000
"""Rows that one run of ``pglisten`` looks at: a second or so of work."""

_LOCK = "SELECT pg_try_advisory_xact_lock('pgnotify_event_log'::regclass::oid::bigint)"
_WINDOW = """
    SELECT max(id), count(*), bool_and(created_at < statement_timestamp() - %(retention)s)
    FROM (
        SELECT id, created_at FROM pgnotify_event_log WHERE id > %(after)s
        ORDER BY id LIMIT %(batch)s
    ) AS oldest
"""
# Of a sweep under way, what is behind its position has been handled too. The cursor of a consumer
# that waits for a resync may be of another server: it says nothing of what has been handled.
_NOT_PASSED = """
    c.topics @> to_jsonb(e.topic) AND (
        c.resync <> ''
        OR NOT pg_visible_in_snapshot(e.xid, c.snapshot::pg_snapshot)
        AND NOT (c.target <> '' AND e.id <= c.position
                 AND pg_visible_in_snapshot(e.xid, nullif(c.target, '')::pg_snapshot))
    )
"""
# One statement, so of one moment: what is removed and what is counted as lost are the same rows.
_DELETE = f"""
    WITH removed AS (
        DELETE FROM pgnotify_event_log AS e
        WHERE e.id > %(after)s AND e.id <= %(end)s
          AND e.created_at < statement_timestamp() - %(retention)s
          AND (e.created_at < statement_timestamp() - %(limit)s
               OR NOT EXISTS (SELECT FROM pgnotify_consumer AS c WHERE {_NOT_PASSED}))
        RETURNING e.id, e.topic, e.xid, e.created_at
    ), lost AS (
        SELECT c.id, count(*) AS events, min(e.created_at) AS since, max(e.created_at) AS until
        FROM removed AS e JOIN pgnotify_consumer AS c ON {_NOT_PASSED}
        WHERE e.created_at < statement_timestamp() - %(limit)s
        GROUP BY c.id
    ), told AS (
        UPDATE pgnotify_consumer AS consumer SET
            gap_cause = %(cause)s,
            gap_events = gap_events + lost.events,
            gap_since = least(gap_since, lost.since),
            gap_until = greatest(gap_until, lost.until)
        FROM lost WHERE consumer.id = lost.id
        RETURNING consumer.name, lost.events
    )
    SELECT '' AS name, count(*) FROM removed UNION ALL SELECT name, events FROM told ORDER BY name
"""  # noqa: S608 - put together from constants


def logged_topics(topics: Iterable[str], using: str) -> list[str]:
    """Those of ``topics`` that the log of alias ``using`` has events of."""
    with connections[using].cursor() as cursor:
        cursor.execute(
            "SELECT topic FROM unnest(%s::text[]) AS heard(topic) WHERE EXISTS"
            " (SELECT FROM pgnotify_event_log AS e WHERE e.topic = heard.topic)",
            [list(topics)],
        )
        return [topic for (topic,) in cursor.fetchall()]


class Pruned(NamedTuple):
    """What a run did: rows removed, rows looked at, and whether there is more to look at."""

    removed: int
    examined: int
    more: bool


class LogPruner:
    """Removes old events from the log of alias ``using``; goes on where its last run ended."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._after = 0

    def run(
        self,
        *,
        retention: float | None = None,
        limit: float | None = None,
        rows: int = ROWS_PER_RUN,
    ) -> Pruned:
        """Look at ``rows`` of the oldest rows, and remove those that may go.

        Args:
            retention: seconds; default ``PGNOTIFY_LOG_RETENTION``.
            limit: seconds; default ``PGNOTIFY_LOG_LIMIT``.
            rows: how many at most; a transaction has ``BATCH`` of them.

        Raises:
            django.db.Error: the database could not be reached, or has no such table.
        """
        limit = conf.LOG_LIMIT if limit is None else limit
        retention = conf.LOG_RETENTION if retention is None else retention
        if limit is not None:
            retention = min(retention, limit)
        removed = examined = 0
        while examined < rows:
            step = self._step(retention, limit, min(BATCH, rows - examined))
            removed += step.removed
            examined += step.examined
            if not step.more:
                self._after = 0
                return Pruned(removed, examined, False)
        return Pruned(removed, examined, True)

    def _step(self, retention: float, limit: float | None, batch: int) -> Pruned:
        params: dict[str, Any] = {
            "after": self._after,
            "batch": batch,
            "retention": timedelta(seconds=retention),
            # Nothing is older than that.
            "limit": timedelta(seconds=limit) if limit is not None else timedelta(days=100 * 365),
            "cause": f"events were older than PGNOTIFY_LOG_LIMIT ({limit:g} s) and were removed"
            if limit is not None
            else "",
        }
        with transaction.atomic(self._using), connections[self._using].cursor() as cursor:
            cursor.execute(_LOCK)
            if cursor.fetchone() != (True,):
                return Pruned(0, 0, False)  # another process is at it
            cursor.execute(_WINDOW, params)
            end, examined, all_old = cursor.fetchone()
            if end is None:
                return Pruned(0, 0, False)
            params["end"] = end
            cursor.execute(_DELETE, params)
            (_, removed), *lost = cursor.fetchall()
            for name, events in lost:
                logger.error(
                    "Consumer %s lost %d event(s) older than PGNOTIFY_LOG_LIMIT", name, events
                )
        self._after = end
        return Pruned(removed, examined, bool(all_old) and examined == batch)
