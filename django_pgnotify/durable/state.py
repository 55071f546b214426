"""What is stored of a consumer: its cursor, who may move it, and its dead letters.

Whoever runs a consumer holds its advisory lock, and has raised its **claim** when it began. Every
later write names that claim and the **revision** that an operator raises, so a process that lost
the lock without noticing, or an operator's change, makes the write fail, and not go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import connections, transaction
from django.db.models import F, QuerySet

from .cursor import BEGINNING, Cursor, Logged, put_restored_behind
from .epoch import current_epoch

if TYPE_CHECKING:
    from ..models import Consumer

_CLAIM = """
    UPDATE pgnotify_consumer SET claim = claim + 1, holder = %s
    WHERE name = %s AND topics <@ coalesce(%s::jsonb, topics)
    RETURNING id, claim, revision, snapshot, target, position, epoch
"""
_CONTROL = """
    SELECT c.revision, c.claim, c.paused, c.resync, c.gap_cause, c.gap_since, c.gap_until,
        EXISTS (SELECT FROM pgnotify_dead_letter AS d
                WHERE d.consumer_id = c.id AND d.retry_at IS NOT NULL),
        (SELECT array_agg(DISTINCT d.key) FROM pgnotify_dead_letter AS d
         WHERE d.consumer_id = c.id AND d.retry_at IS NOT NULL AND d.key IS NOT NULL)
    FROM pgnotify_consumer AS c WHERE c.id = %s
"""
_MOVE = """
    UPDATE pgnotify_consumer
    SET snapshot = %s, target = %s, position = %s, handled = handled + %s,
        moved_at = statement_timestamp()
    WHERE id = %s AND claim = %s AND revision = %s
    RETURNING paused
"""
_SETTLE = "UPDATE pgnotify_consumer SET handled = handled + %s WHERE id = %s AND claim = %s"
_PARK = """
    INSERT INTO pgnotify_dead_letter
        (consumer_id, event_id, topic, key, source, body, published_at,
         attempts, retry_at, failed_at, error)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, statement_timestamp() + make_interval(secs => %s),
            CASE WHEN %s THEN statement_timestamp() END, %s)
    ON CONFLICT (consumer_id, event_id) DO UPDATE SET
        attempts = excluded.attempts, retry_at = excluded.retry_at,
        failed_at = excluded.failed_at, error = excluded.error
"""
# A letter whose key has an earlier one that is not due yet is not due either.
_DUE = """
    SELECT d.retry_at, d.id, d.event_id, d.topic, d.key, d.source, d.body, d.published_at,
        d.attempts
    FROM pgnotify_dead_letter AS d
    WHERE d.consumer_id = %(id)s AND d.retry_at <= statement_timestamp() AND NOT EXISTS (
        SELECT FROM pgnotify_dead_letter AS earlier
        WHERE earlier.consumer_id = %(id)s AND earlier.key = d.key
          AND earlier.retry_at > statement_timestamp() AND earlier.event_id < d.event_id
    )
    ORDER BY d.event_id LIMIT %(limit)s
"""
_NEXT_DUE = """
    SELECT extract(epoch FROM min(retry_at) - statement_timestamp())::float8
    FROM pgnotify_dead_letter WHERE consumer_id = %s AND retry_at > statement_timestamp()
"""
# One that was asked for again meanwhile stays.
_DONE = """
    DELETE FROM pgnotify_dead_letter
    WHERE id = ANY (%s::bigint[]) AND retry_at = ANY (%s::timestamptz[])
"""
_FAILED_AGAIN = """
    UPDATE pgnotify_dead_letter
    SET attempts = %s, retry_at = statement_timestamp() + make_interval(secs => %s),
        failed_at = statement_timestamp(), error = %s
    WHERE id = %s
"""


class CursorLost(Exception):
    """The consumer has been claimed by another process, set anew by an operator, or deleted."""


class Replaced(CursorLost):
    """Another process has claimed the consumer: it is that one's to run."""


class Claim(NamedTuple):
    """A consumer as it was when this process began to run it."""

    id: int
    number: int
    revision: int
    cursor: Cursor
    epoch: str


class Control(NamedTuple):
    """What may have changed from outside since the last look."""

    revision: int
    claim: int
    paused: bool
    resync: str
    gap_cause: str
    gap_since: datetime | None
    gap_until: datetime | None
    has_letters: bool
    waiting_keys: frozenset[str]


class Parked(NamedTuple):
    """An event that is put aside: to be tried again ``retry_in`` seconds from now, or for good."""

    event: Logged
    key: str | None
    body: str
    attempts: int
    retry_in: float | None
    error: str


class Letter(NamedTuple):
    """A stored event whose turn it is."""

    id: int
    event_id: int
    topic: str
    key: str | None
    source: str
    body: str
    published_at: datetime
    attempts: int


class Verdict(NamedTuple):
    """A letter that failed again: seconds to the next attempt, None if there is none."""

    letter: int
    attempts: int
    retry_in: float | None
    error: str


def register(name: str, topics: Sequence[str], start: str, using: str) -> None:
    """Make sure that there is a consumer ``name``, and that it reads ``topics`` from now on.

    Its cursor is past all of its topics at once. So whoever reads less of them, because it runs
    older code, cannot move it any more.

    Raises:
        django.db.Error: the database could not be reached, or has no such table.
    """
    known = create(name, topics, start, using)
    if known is not None and set(known) != set(topics):
        rows = _consumers(using).filter(name=name)
        rows.update(topics=list(topics), revision=F("revision") + 1)
        put_restored_behind(topics, using)


def create(name: str, topics: Sequence[str], start: str, using: str) -> list[str] | None:
    """Make sure that there is a consumer ``name``; a new one begins at ``start``.

    Returns:
        The topics of one that there was; they stay as they are.

    Raises:
        django.db.Error: the database could not be reached, or has no such table.
    """
    consumers = _consumers(using)
    known: list[str] | None = consumers.filter(name=name).values_list("topics", flat=True).first()
    if known is not None:
        return known
    put_restored_behind(topics, using)
    consumers.bulk_create(
        [
            consumers.model(
                name=name,
                topics=list(topics),
                snapshot=BEGINNING if start == "beginning" else current_snapshot(using),
                epoch=str(current_epoch(using)),
            )
        ],
        ignore_conflicts=True,
    )
    return None


def _consumers(using: str) -> QuerySet[Consumer]:
    from ..models import Consumer  # models are not importable before the apps are loaded

    return Consumer.objects.using(using)


def current_snapshot(using: str) -> str:
    """What is visible now, as text."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_current_snapshot()::text")
        [snapshot] = cursor.fetchone()
        return str(snapshot)


class ConsumerState:
    """The stored state of consumer ``name``, on this thread's connection to ``using``.

    Raises:
        CursorLost: from every method that writes; reload with :meth:`claim`.
        django.db.Error: from every method; PostgreSQL refused or could not be reached.
    """

    def __init__(self, name: str, using: str) -> None:
        self.name = name
        self.using = using
        self.paused = False
        """Whether it was paused when it was last looked at, or moved."""
        self._id = self._claim = self._revision = 0
        self._due: dict[int, datetime] = {}

    def claim(self, holder: str, topics: Sequence[str] | None = None) -> Claim:
        """Begin to run it: from here on, whoever ran it before cannot write any more.

        Args:
            topics: what will be read. Of a consumer that has others too, nothing may be moved.
        """
        read = None if topics is None else json.dumps(list(topics))
        rows = self._execute(_CLAIM, holder, self.name, read)
        if not rows:
            raise CursorLost(f"there is no consumer {self.name!r} that reads no other topics")
        number, claim, revision, snapshot, target, position, epoch = rows[0]
        self._id, self._claim, self._revision = number, claim, revision
        return Claim(number, claim, revision, Cursor(snapshot, target, position), epoch)

    def control(self) -> Control:
        """What there is to know before the next sweep."""
        rows = self._execute(_CONTROL, self._id)
        if not rows:
            raise CursorLost("it was deleted")
        *known, keys = rows[0]
        control = Control._make([*known, frozenset(keys or ())])
        if control.claim != self._claim:
            raise Replaced("it was claimed by another process")
        if control.revision != self._revision:
            raise CursorLost("it was set anew by an operator")
        self.paused = control.paused
        return control

    def move(self, cursor: Cursor, handled: int, parked: Sequence[Parked] = ()) -> None:
        """Store a new cursor, and with it what was put aside, in one transaction."""
        if not parked:
            self._move(cursor, handled)
            return
        with transaction.atomic(self.using):
            for one in parked:
                self._park(one)
            self._move(cursor, handled)

    def _move(self, cursor: Cursor, handled: int) -> None:
        owned = (self._id, self._claim, self._revision)
        rows = self._execute(_MOVE, *cursor, handled, *owned)
        if not rows:
            raise self._lost()
        self.paused = rows[0][0]

    def _lost(self) -> CursorLost:
        """Why nothing can be written any more."""
        rows = self._execute("SELECT claim FROM pgnotify_consumer WHERE id = %s", self._id)
        if not rows:
            return CursorLost("it was deleted")
        if rows[0][0] != self._claim:
            return Replaced("it was claimed by another process")
        return CursorLost("it was set anew by an operator")

    def _park(self, one: Parked) -> None:
        event = one.event
        self._write(
            _PARK,
            *(self._id, event.id, event.topic, one.key, event.source, one.body, event.created_at),
            *(one.attempts, one.retry_in, one.attempts > 0, one.error),
        )

    # -- what waits outside the order of the log ----------------------------------------------

    def letters(self, limit: int) -> list[Letter]:
        """The first of those that are due, by id of the event."""
        with connections[self.using].cursor() as cursor:
            cursor.execute(_DUE, {"id": self._id, "limit": limit})
            rows = cursor.fetchall()
        self._due = {letter: due for due, letter, *_ in rows}
        return [Letter(*row) for _, *row in rows]

    def next_letter_in(self) -> float | None:
        """Seconds until the next one is due, None if none is waiting."""
        [(seconds,)] = self._execute(_NEXT_DUE, self._id)
        return None if seconds is None else float(seconds)

    def settle(self, done: Sequence[int], failed: Sequence[Verdict] = ()) -> None:
        """Store what became of letters, in one transaction."""
        with transaction.atomic(self.using):
            if self._write(_SETTLE, len(done), self._id, self._claim) != 1:
                raise self._lost()
            if done:
                self._write(_DONE, list(done), [self._due.get(letter) for letter in done])
            for letter, attempts, retry_in, error in failed:
                self._write(_FAILED_AGAIN, attempts, retry_in, error, letter)

    # -- gaps and epochs ------------------------------------------------------------------------

    def gap_told(self, told: Control) -> None:
        """The receiver has heard of this gap; of one that has grown meanwhile it is yet to hear."""
        self._write(
            "UPDATE pgnotify_consumer SET gap_cause = '', gap_since = NULL, gap_until = NULL "
            "WHERE id = %s AND claim = %s AND gap_cause = %s "
            "AND gap_since IS NOT DISTINCT FROM %s AND gap_until IS NOT DISTINCT FROM %s",
            self._id,
            self._claim,
            told.gap_cause,
            told.gap_since,
            told.gap_until,
        )

    def stop_for_resync(self, cause: str) -> None:
        """Wait, with this cause, until an operator says where to go on."""
        self._write(
            "UPDATE pgnotify_consumer SET resync = %s WHERE id = %s AND claim = %s AND resync = ''",
            cause,
            self._id,
            self._claim,
        )

    def note_gap(self, cause: str, epoch: str) -> None:
        """Have the receiver told of a gap that lasts from its last move until now."""
        self._write(
            "UPDATE pgnotify_consumer SET gap_cause = %s, epoch = %s, "
            "gap_since = coalesce(gap_since, moved_at), gap_until = statement_timestamp() "
            "WHERE id = %s AND claim = %s",
            cause,
            epoch,
            self._id,
            self._claim,
        )

    def let_go(self) -> None:
        """Not run by this process any more."""
        self._write(
            "UPDATE pgnotify_consumer SET holder = '' WHERE id = %s AND claim = %s",
            self._id,
            self._claim,
        )

    def _execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with connections[self.using].cursor() as cursor:
            cursor.execute(statement, params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows

    def _write(self, statement: str, *params: Any) -> int:
        with connections[self.using].cursor() as cursor:
            cursor.execute(statement, params)
            return int(cursor.rowcount)
