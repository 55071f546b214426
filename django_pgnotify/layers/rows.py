"""What NOTIFY cannot keep or carry: rows of normal channels, of large messages, and of members.

On a connection of its own, opened when first needed, so that no large row holds up what arrives.
It sends, too, where the loop does not listen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from ..conf import conf
from ..exceptions import CannotConnect, PgNotifyError, PublishError
from ..listening.connection import Row, first_line
from ..listening.parameters import connection_params
from .connection import LayerConnection, NotSent

logger = logging.getLogger("django_pgnotify.layers")

_PRUNE_EVERY = 10.0
"""Seconds between two looks for expired rows, by each loop that has written any."""
_PRUNE_AT_ONCE = 1000

_STORE = (
    "INSERT INTO pgnotify_layer_message (layer, channel, body, expires_at) "
    "VALUES ($1, '', decode($2, 'hex'), now() + make_interval(secs => $3::float8)) RETURNING id"
)
_FETCH = "SELECT encode(body, 'hex') FROM pgnotify_layer_message WHERE id = $1 AND layer = $2"
# Rows that others are about to store count as little as those they are about to take: the capacity
# may be exceeded by as many messages as there are connections that send at the same instant.
_PUT = """
WITH stored AS (
    INSERT INTO pgnotify_layer_message (layer, channel, body, expires_at)
    SELECT $1::text, $2::text, decode($3, 'hex'), now() + make_interval(secs => $4::float8)
    WHERE $5::bigint > (SELECT count(*) FROM (
        SELECT FROM pgnotify_layer_message
        WHERE layer = $1::text AND channel = $2::text AND expires_at > now()
        LIMIT $5::bigint
    ) AS waiting)
    RETURNING id
)
SELECT pg_notify($6, $7) FROM stored"""
_TAKE = """
DELETE FROM pgnotify_layer_message WHERE id = ANY (ARRAY(
    SELECT id FROM pgnotify_layer_message
    WHERE layer = $1::text AND channel = $2::text AND expires_at > now()
    ORDER BY id LIMIT $3::bigint FOR UPDATE SKIP LOCKED
)) RETURNING id, encode(body, 'hex'), extract(epoch FROM expires_at - now())"""
_PUT_BACK = """
WITH stored AS (
    INSERT INTO pgnotify_layer_message (id, layer, channel, body, expires_at)
    VALUES ($1, $2, $3, decode($4, 'hex'), now() + make_interval(secs => $5::float8)) RETURNING id
)
SELECT pg_notify($6, $7) FROM stored"""
_JOIN = (
    "INSERT INTO pgnotify_layer_member (layer, group_name, channel, expires_at) "
    "VALUES ($1, $2, $3, now() + make_interval(secs => $4::float8)) "
    "ON CONFLICT (layer, group_name, channel) DO UPDATE SET expires_at = EXCLUDED.expires_at"
)
_LEAVE = "DELETE FROM pgnotify_layer_member WHERE layer = $1 AND group_name = $2 AND channel = $3"
_MEMBERS = (
    "SELECT channel FROM pgnotify_layer_member "
    "WHERE layer = $1 AND group_name = $2 AND expires_at > now() ORDER BY id"
)
_FLUSH = (
    "DELETE FROM pgnotify_layer_message WHERE layer = $1",
    "DELETE FROM pgnotify_layer_member WHERE layer = $1",
)
_PRUNE = tuple(
    f"WITH gone AS (DELETE FROM {table} WHERE id = ANY (ARRAY(SELECT id FROM {table} "  # noqa: S608
    f"WHERE expires_at <= now() ORDER BY expires_at LIMIT {_PRUNE_AT_ONCE} FOR UPDATE SKIP LOCKED))"
    " RETURNING 1) SELECT count(*) FROM gone"
    for table in ("pgnotify_layer_message", "pgnotify_layer_member")
)
_READS = (_FETCH, _MEMBERS)
"""Statements that do no harm if they run twice."""


class Taken(NamedTuple):
    """A row that was taken: its id, what it held, and seconds it would still have waited."""

    row: int
    body: bytes
    remaining: float


class Rows:
    """See the module; used on one event loop.

    Args:
        using: database alias.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._connection: LayerConnection | None = None
        self._opening = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._prune_due = 0.0
        self._last_expires = 0.0
        """When the last row that we have written expires."""
        self._alarm: asyncio.TimerHandle | None = None
        self._pruning: asyncio.Future[list[Row]] | None = None
        self._closed = False

    @property
    def connection(self) -> LayerConnection | None:
        """The connection, if it is open."""
        connection = self._connection
        return connection if connection is not None and connection.usable else None

    async def connected(self) -> LayerConnection:
        """The connection, opened if it is not.

        Raises:
            CannotConnect: refused, or not answered in time.
        """
        async with self._opening:
            if self._closed:
                raise CannotConnect("the channel layer has been stopped")
            if self._connection is None or not self._connection.usable:
                params = {"application_name": "pgnotify-layer", **connection_params(self._using)}
                connection = await LayerConnection.open(
                    params, timeout=conf.CONNECT_TIMEOUT, on_input=self._look
                )
                self._connection = connection
            return self._connection

    def close(self) -> None:
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        if self._pruning is not None:
            self._pruning.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _look(self) -> None:
        connection = self._connection
        if connection is None:
            return
        connection.take()
        if connection.lost is not None:
            self._connection = None
            connection.close()

    # -- rows ---------------------------------------------------------------------------------

    async def store(self, layer: str, body: bytes, expiry: float) -> int:
        """Keep a body for those who will be told its number, which is returned."""
        [(number,)] = await self._execute(_STORE, layer, body.hex(), str(expiry))
        self._wrote(expiry)
        return int(number or 0)

    async def fetch(self, layer: str, number: int) -> bytes | None:
        """A stored body, None if it has expired."""
        rows = await self._execute(_FETCH, str(number), layer)
        return bytes.fromhex((rows[0][0] or b"").decode()) if rows else None

    async def put(
        self,
        layer: str,
        channel: str,
        body: bytes,
        expiry: float,
        capacity: int,
        wake: tuple[bytes, bytes],
    ) -> bool:
        """Add a message to a normal channel and wake its receivers; False if there is no room."""
        rows = await self._execute(
            *(_PUT, layer, channel, body.hex(), str(expiry), str(capacity)),
            *(part.decode() for part in wake),
        )
        self._wrote(expiry)
        return bool(rows)

    async def take(
        self, layer: str, channel: str, limit: int, wake: tuple[bytes, bytes]
    ) -> list[Taken]:
        """The next messages of a normal channel, which are then nobody else's.

        Where the task is cancelled meanwhile, they are put back.
        """
        try:
            return _taken(await self._execute(_TAKE, layer, channel, str(limit)))
        except _CutShort as exc:
            for taken in _taken(exc.rows):
                await self.put_back(layer, channel, taken, wake)
            raise asyncio.CancelledError from None

    async def put_back(
        self, layer: str, channel: str, taken: Taken, wake: tuple[bytes, bytes]
    ) -> None:
        """Undo :meth:`take` for one message."""
        await self._execute(
            *(_PUT_BACK, str(taken.row), layer, channel, taken.body.hex(), str(taken.remaining)),
            *(part.decode() for part in wake),
        )

    async def join(self, layer: str, group: str, channel: str, expiry: float) -> None:
        await self._execute(_JOIN, layer, group, channel, str(expiry))
        self._wrote(0.0)  # memberships last for a day, and few are not taken back

    async def leave(self, layer: str, group: str, channel: str) -> None:
        await self._execute(_LEAVE, layer, group, channel)

    async def members(self, layer: str, group: str) -> list[str]:
        """The normal channels in a group."""
        rows = await self._execute(_MEMBERS, layer, group)
        return [(channel or b"").decode() for (channel,) in rows]

    async def flush(self, layer: str) -> None:
        if (await self.connected()).has_tables:
            for statement in _FLUSH:
                await self._execute(statement, layer)

    # -- expired rows -------------------------------------------------------------------------

    def _wrote(self, expiry: float) -> None:
        """See to it that expired rows go, until those written now are among them."""
        now = self._loop.time()
        self._last_expires = max(self._last_expires, now + expiry)
        if self._alarm is not None or self._closed:
            return
        if now < self._prune_due:
            self._alarm = self._loop.call_at(self._prune_due, self._prune)
        else:
            self._prune()  # at once: the loop may be about to end

    def _prune(self) -> None:
        """Begin to remove what has expired; nobody waits for it, and it fails nobody."""
        now = self._loop.time()
        self._prune_due, self._alarm = now + _PRUNE_EVERY, None
        if now <= self._last_expires + _PRUNE_EVERY:
            self._alarm = self._loop.call_at(self._prune_due, self._prune)
        if self._pruning is None:
            self._prune_some(list(_PRUNE))

    def _prune_some(self, statements: list[str]) -> None:
        """Run the first of the statements, again while there is more; then the next."""
        connection = self.connection
        if connection is None or not statements:
            return

        def done(answer: asyncio.Future[list[Row]]) -> None:
            self._pruning = None
            if answer.cancelled():
                return
            if (error := answer.exception()) is not None:
                logger.warning(
                    "Expired rows of the channel layer could not be removed, and wait: %s",
                    first_line(error),
                )
                return
            [(count,)] = answer.result()
            # Others have their turn in between, and yet it keeps up with whatever they write.
            more = int(count or 0) == _PRUNE_AT_ONCE
            self._prune_some(statements if more else statements[1:])

        self._pruning = connection.request(statements[0].encode(), (), timeout=conf.CONNECT_TIMEOUT)
        self._pruning.add_done_callback(done)

    # -- statements -----------------------------------------------------------------------------

    async def _execute(self, statement: str, *params: str) -> list[Row]:
        """Run a statement; once more on a fresh session if ours was told to end before it did it.

        One that only reads also where it is not known whether it was done.

        Raises:
            PublishError: the database could not be reached, or not be told.
            PgNotifyError: the tables are not there.
        """
        for again in (True, False):
            try:
                return await self._once(statement.encode(), params, take=statement is _TAKE)
            except psycopg.errors.UndefinedTable as exc:
                raise PgNotifyError(
                    f"The channel layer's tables are missing on database {self._using!r}: "
                    f"'manage.py migrate django_pgnotify --database {self._using}' makes them."
                ) from exc
            except (PgNotifyError, psycopg.Error) as exc:
                harmless = PublishError if statement in _READS else NotSent
                if not (again and isinstance(exc, harmless)):
                    raise PublishError(
                        f"The channel layer could not reach its tables: {first_line(exc)}"
                    ) from exc
        raise AssertionError("unreachable")

    async def _once(self, statement: bytes, params: Sequence[str], *, take: bool) -> list[Row]:
        connection = await self.connected()
        answer = connection.request(statement, params, timeout=conf.CONNECT_TIMEOUT)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not take:
                raise
            try:
                rows = await answer  # or what it takes would be lost
            except (PgNotifyError, psycopg.Error):
                rows = []
            raise _CutShort(rows) from None


class _CutShort(asyncio.CancelledError):
    """The task was cancelled while a statement was in flight, which then returned these rows."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def _taken(rows: list[Row]) -> list[Taken]:
    return sorted(
        Taken(int(number or 0), bytes.fromhex((body or b"").decode()), float(remaining or 0))
        for number, body, remaining in rows
    )
