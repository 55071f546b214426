"""How far consumers are behind."""

from __future__ import annotations

from typing import NamedTuple

from django.db import connections

from ..models import Consumer
from .cursor import Snapshot

COUNTED = 10_000
"""Events that are counted at most; beyond it a lag says "more"."""

_LAG = """
    SELECT count(*), extract(epoch FROM statement_timestamp() - min(created_at))::float8
    FROM (
        SELECT e.created_at
        FROM unnest(%(topics)s::text[]) AS wanted(topic) CROSS JOIN LATERAL (
            (SELECT created_at FROM pgnotify_event_log AS e
             WHERE e.topic = wanted.topic AND e.xid >= %(xmax)s::xid8 AND {bounds}
             ORDER BY e.xid LIMIT %(limit)s)
            UNION ALL
            (SELECT created_at FROM pgnotify_event_log AS e
             WHERE e.topic = wanted.topic AND e.xid = ANY (%(xip)s::xid8[]) AND {bounds}
             ORDER BY e.xid LIMIT %(limit)s)
        ) AS e
        LIMIT %(limit)s
    ) AS behind
"""
_IN_SWEEP = """
    (e.id > %(position)s OR NOT pg_visible_in_snapshot(e.xid, %(target)s::pg_snapshot))
"""


class Lag(NamedTuple):
    """Events that a consumer has not passed, and the age of the oldest of them in seconds.

    ``more`` says that there are more than ``events``, which is where counting stopped.
    """

    events: int
    seconds: float
    more: bool

    def __str__(self) -> str:
        return f"{self.events}{'+' if self.more else ''} event(s), {self.seconds:.0f} s"


def lag_of(consumer: Consumer, counted: int = COUNTED) -> Lag:
    """How far ``consumer`` is behind now; by its stored cursor, so by what is sure.

    Raises:
        django.db.Error: its database could not be reached.
    """
    old = Snapshot.parse(consumer.snapshot)
    with connections[consumer._state.db or "default"].cursor() as cursor:
        cursor.execute(
            _LAG.format(bounds=_IN_SWEEP if consumer.target else "true"),
            {
                "topics": consumer.topics,
                **old.params,
                "target": consumer.target,
                "position": consumer.position,
                "limit": counted + 1,
            },
        )
        events, seconds = cursor.fetchone()
    return Lag(min(events, counted), max(0.0, seconds or 0.0), events > counted)
