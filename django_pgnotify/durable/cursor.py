"""The snapshot-diff cursor: which events of the log are new to a consumer, and in what order.

Neither ids nor transaction ids are given out in the order of commits, so "everything above the
last one" loses what commits late, and waiting for the oldest running transaction stalls behind any
long one. A cursor is therefore a ``pg_snapshot`` S: behind it is exactly what S sees. A **sweep**
reads what a newer snapshot T sees and S does not, by id, and then T takes the place of S.

Read by id and not by transaction id, because that is the order per key: writers that change the
same row wait for each other, so the one that commits first has taken its id first, whereas its
transaction may well have begun last.

What T sees and S does not is: transactions that S saw running (its ``xip``; a handful), and those
that began after S (``xid >= xmax``). Both are ranges of the index on (topic, xid, id), however
large the log is and however long something else has been running.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from django.db import connections

BEGINNING = "3:3:"
"""A snapshot that sees nothing: 3 is the first transaction id of a cluster."""

PAGE_SIZE = 1000
LARGE_BODY = 32 * 1024
"""Bytes above which a body is fetched when its turn comes, so that a page has a bounded size."""

_MAX_WINDOW = 50_000

_COLUMNS = """
    e.id, e.topic, e.source, e.created_at,
    CASE WHEN octet_length(e.body) <= %(large)s THEN e.body END AS body
"""

# Each branch is in the order of the index and has its own limit, so that the planner has no reason
# to walk the primary key in the hope of meeting new rows early.
_NEW = f"""
    FROM unnest(%(topics)s::text[]) AS wanted(topic) CROSS JOIN LATERAL (
        (SELECT {_COLUMNS} FROM pgnotify_event_log AS e
         WHERE e.topic = wanted.topic AND e.xid >= %(xmax)s::xid8 {{bounds}}
         ORDER BY e.xid LIMIT %(limit)s)
        UNION ALL
        (SELECT {_COLUMNS} FROM pgnotify_event_log AS e
         WHERE e.topic = wanted.topic AND e.xid = ANY (%(xip)s::xid8[]) {{bounds}}
         ORDER BY e.xid LIMIT %(limit)s)
    ) AS found
"""  # noqa: S608 - put together from constants
# What was restored from another cluster may have ids that this one has yet to come to.
_COME_TO = "AND e.xid < pg_snapshot_xmax(pg_current_snapshot())"
_FIRST = f"""
    WITH found AS MATERIALIZED (SELECT found.* {_NEW.format(bounds=_COME_TO)})
    SELECT now_.snapshot, found.*
    FROM (SELECT pg_current_snapshot()::text AS snapshot) AS now_ LEFT JOIN found ON true
    ORDER BY found.id
"""  # noqa: S608
_BOUNDS = """
    AND e.id > %(position)s AND e.xid < %(target_xmax)s::xid8
    AND pg_visible_in_snapshot(e.xid, %(target)s::pg_snapshot)
"""
_RESUMED = f"""
    WITH found AS MATERIALIZED (SELECT found.* {_NEW.format(bounds=_BOUNDS)})
    SELECT %(target)s, found.* FROM found ORDER BY found.id
"""  # noqa: S608
_LOWEST = """
    SELECT min(lowest.id) FROM unnest(%(topics)s::text[]) AS wanted(topic) CROSS JOIN LATERAL (
        SELECT min(e.id) AS id FROM pgnotify_event_log AS e
        WHERE e.topic = wanted.topic AND e.xid >= %(xmax)s::xid8
          AND e.xid < %(target_xmax)s::xid8
        UNION ALL
        SELECT min(e.id) FROM pgnotify_event_log AS e
        WHERE e.topic = wanted.topic AND e.xid = ANY (%(xip)s::xid8[])
    ) AS lowest
"""
_WINDOW = """
    SELECT max(id) FROM (
        SELECT id FROM pgnotify_event_log WHERE id > %(position)s AND id <= %(ceiling)s
        ORDER BY id LIMIT %(window)s
    ) AS rows_by_id
"""
# The operator keeps the index on topic out of it: the range of ids is the narrow condition here.
_SLICE = f"""
    SELECT {_COLUMNS} FROM pgnotify_event_log AS e
    WHERE e.id > %(position)s AND e.id <= %(end)s AND (e.topic || '') = ANY (%(topics)s::text[])
      AND pg_visible_in_snapshot(e.xid, %(target)s::pg_snapshot)
      AND NOT pg_visible_in_snapshot(e.xid, %(snapshot)s::pg_snapshot)
    ORDER BY e.id
"""  # noqa: S608

# Nobody sees events of a transaction that such a snapshot does not see, but for its own.
_OF_THE_FUTURE = """
    e.xid >= pg_snapshot_xmax(pg_current_snapshot())
    AND e.xid IS DISTINCT FROM pg_current_xact_id_if_assigned()
"""
_ANY_RESTORED = f"""
    SELECT FROM unnest(%s::text[]) AS wanted(topic) CROSS JOIN LATERAL (
        SELECT FROM pgnotify_event_log AS e
        WHERE e.topic = wanted.topic AND {_OF_THE_FUTURE} ORDER BY e.xid LIMIT 1
    ) AS restored
"""  # noqa: S608 - put together from constants
_PUT_BEHIND = f"""
    UPDATE pgnotify_event_log AS e SET xid = %s::xid8
    WHERE e.topic = ANY (%s::text[]) AND {_OF_THE_FUTURE}
"""  # noqa: S608


class Snapshot(NamedTuple):
    """The parts of a ``pg_snapshot`` (see PostgreSQL's ``pg_current_snapshot()``)."""

    xmin: int
    xmax: int
    xip: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        xmin, xmax, xip = text.split(":")
        return cls(int(xmin), int(xmax), tuple(map(int, xip.split(","))) if xip else ())

    @property
    def params(self) -> dict[str, Any]:
        """Of a query for what it does not see: PostgreSQL casts text to xid8, and no number."""
        return {"xmax": str(self.xmax), "xip": list(map(str, self.xip))}


class Cursor(NamedTuple):
    """Where a consumer is: all that ``snapshot`` sees, and of a sweep all up to ``position``."""

    snapshot: str
    target: str = ""
    position: int = 0


class Logged(NamedTuple):
    """A row of the log. ``body`` is None where it is large; see :meth:`LogReader.body`."""

    id: int
    topic: str
    source: str
    created_at: datetime
    body: str | None


class Page(NamedTuple):
    """A stretch of a sweep, by id, and the cursor when all of it has been handled."""

    events: list[Logged]
    begin: Cursor
    end: Cursor

    def after(self, event: Logged) -> Cursor:
        """The cursor when this event, and all before it, has been handled."""
        return self.end if event is self.events[-1] else self.begin._replace(position=event.id)


class TransactionIdsWentBack(Exception):
    """The server is not the one the cursor is of: its transaction ids were, or may be, lower."""


class LogReader:
    """Reads the log of alias ``using`` for a consumer of ``topics``, on this thread's connection.

    Raises:
        django.db.Error: PostgreSQL refused or could not be reached; from every method.
    """

    def __init__(self, using: str, topics: tuple[str, ...], page_size: int = PAGE_SIZE) -> None:
        self._using = using
        self._topics = list(topics)
        self._page_size = page_size
        self._ceiling: int | None = None
        self._window = page_size

    def reset(self) -> None:
        """Forget the sweep that was under way: the cursor has been set anew."""
        self._ceiling = None

    def next_page(self, cursor: Cursor) -> Page:
        """What comes after ``cursor``; an empty page that ends a sweep if that is nothing.

        Raises:
            TransactionIdsWentBack: the cursor is not of this server's time.
        """
        if self._ceiling is None:
            target, page = self._all_at_once(cursor)
            if page is not None:
                return page
            cursor = self._begin(cursor, target)
        return self._by_windows(cursor)

    def body(self, event: Logged) -> str | None:
        """The JSON text of an event; None if its row has been removed."""
        if event.body is not None:
            return event.body
        rows = self._rows("SELECT body FROM pgnotify_event_log WHERE id = %(id)s", id=event.id)
        return rows[0][0] if rows else None

    def _all_at_once(self, cursor: Cursor) -> tuple[str, Page | None]:
        """The target, and the rest of the sweep if it fits a page: the everyday case."""
        old = Snapshot.parse(cursor.snapshot)
        limits = {
            "xmax": str(old.xmax),
            "xip": list(map(str, old.xip)),
            "limit": self._page_size + 1,
        }
        if cursor.target:
            target = cursor.target
            bounds = {"target": target, "target_xmax": str(Snapshot.parse(target).xmax)}
            rows = self._rows(_RESUMED, **limits, **bounds, position=cursor.position)
        else:
            rows = self._rows(_FIRST, **limits)
            target = rows[0][0]
            if Snapshot.parse(target).xmax < old.xmax:
                raise TransactionIdsWentBack(
                    f"the cursor is at transaction {old.xmax}, the server at {target}"
                )
            if rows[0][1] is None:
                rows = []
        if len(rows) > self._page_size:
            return target, None
        begin = cursor._replace(target=target)
        return target, Page([Logged(*row[1:]) for row in rows], begin, Cursor(target))

    def _begin(self, cursor: Cursor, target: str) -> Cursor:
        """``cursor`` in a sweep too large for one page, once it is settled where that ends."""
        [(highest,)] = self._rows("SELECT max(id) FROM pgnotify_event_log")
        self._ceiling, self._window = highest or 0, self._page_size
        if cursor.target or cursor.snapshot == BEGINNING:
            return cursor._replace(target=target)
        old = Snapshot.parse(cursor.snapshot)
        until = str(Snapshot.parse(target).xmax)
        [(lowest,)] = self._rows(_LOWEST, **old.params, target_xmax=until)
        return Cursor(cursor.snapshot, target, (lowest or 1) - 1)

    def _by_windows(self, cursor: Cursor) -> Page:
        while True:
            bounds = {"position": cursor.position, "ceiling": self._ceiling}
            [(end,)] = self._rows(_WINDOW, **bounds, window=self._window)
            if end is None:
                self._ceiling = None
                return Page([], cursor, Cursor(cursor.target))
            rows = self._rows(_SLICE, **cursor._asdict(), end=end)
            # Among the rows of other topics, or of what had been read before, go faster.
            sparse = len(rows) * 2 < self._page_size
            self._window = min(self._window * 2, _MAX_WINDOW) if sparse else self._page_size
            if rows:
                return Page([Logged(*row) for row in rows], cursor, cursor._replace(position=end))
            cursor = cursor._replace(position=end)

    def _rows(self, statement: str, **params: Any) -> list[tuple[Any, ...]]:
        params |= {"topics": self._topics, "large": LARGE_BODY}
        with connections[self._using].cursor() as cursor:
            cursor.execute(statement, params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows


def put_restored_behind(topics: Sequence[str], using: str) -> None:
    """Have what a dump of another cluster brought be behind every cursor but the beginning.

    Its transaction ids may be of this cluster's future: nobody would get these events, until some
    day they were taken for new ones.
    """
    with connections[using].cursor() as cursor:
        # Asked first: it is an UPDATE that a role may lack the right to.
        cursor.execute(_ANY_RESTORED, [list(topics)])
        if cursor.fetchone() is not None:
            cursor.execute(_PUT_BEHIND, [str(Snapshot.parse(BEGINNING).xmax), list(topics)])
