"""The one connection that LISTENs: psycopg's libpq connection, read by the event loop itself.

Everything the server sends goes through one callback, whether a statement is in flight or not, so
a notification that arrives during a statement is seen with its answer and waits for nothing. The
connection is in autocommit and never inside a transaction. Each statement has a deadline that
holds even where the network swallows every packet.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import errors, pq, sql

from ..exceptions import CannotConnect, ConnectionLost, StandbyServer
from .parameters import with_keepalives

_READS = 4
"""Times that the socket is read before what was read is handed on. libpq reads 16 kB at a time; a
burst goes to the receivers' threads in fewer and larger batches if they come together."""

_MUCH = 4096
"""Bytes of payload in one read that make another one worth its system call."""

SERVER_KEEPALIVES = b"""
SELECT set_config('tcp_keepalives_idle', '10', false),
       set_config('tcp_keepalives_interval', '10', false),
       set_config('tcp_keepalives_count', '3', false),
       set_config('tcp_user_timeout', '30000', false)
"""


class Notification(NamedTuple):
    """What one NOTIFY brought: channel, payload in bytes, and the pid of the sending backend."""

    channel: str
    payload: bytes
    backend: int


Row = tuple[bytes | None, ...]


class ListenConnection:
    """An open connection. Make one with :meth:`open`; close it with :meth:`close`.

    Args:
        on_input: called (on the loop) when notifications have arrived or the connection is lost.
    """

    def __init__(self, raw: psycopg.AsyncConnection[Any], on_input: Callable[[], None]) -> None:
        self._raw = raw
        self._pgconn: pq.abc.PGconn = raw.pgconn
        self._loop = asyncio.get_running_loop()
        self._fileno = raw.fileno()
        self._on_input = on_input
        self._inbox: list[Notification] = []
        self._answer: asyncio.Future[list[Row]] | None = None
        self._rows: list[Row] = []
        self._error: psycopg.Error | None = None
        self.lost: Exception | None = None
        self.closed = False
        self.backend_pid = 0
        self.pooled = False
        self._loop.add_reader(self._fileno, self._readable)

    @classmethod
    async def open(
        cls, params: dict[str, Any], *, timeout: float, on_input: Callable[[], None]
    ) -> Self:
        """Connect with Django's connection parameters.

        Raises:
            CannotConnect: refused, not answered within ``timeout`` seconds, or not permitted.
            StandbyServer: the server is a standby.
        """
        raw: psycopg.AsyncConnection[Any] | None = None
        try:
            async with asyncio.timeout(timeout):
                raw = await psycopg.AsyncConnection.connect(
                    **with_keepalives(params, timeout), autocommit=True
                )
        except TimeoutError:
            pass  # told below, not here: the frames of this error hold the half-open connection
        except (psycopg.Error, OSError) as exc:
            raise CannotConnect(first_line(exc)) from exc
        if raw is None:
            raise CannotConnect(f"no answer within {timeout:g} s")
        connection = cls(raw, on_input)
        try:
            await connection._introduce(timeout)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _introduce(self, timeout: float) -> None:
        [(pid, recovering)] = await self.execute(
            b"SELECT pg_backend_pid(), pg_is_in_recovery()", timeout=timeout
        )
        if recovering == b"t":
            raise StandbyServer(
                "the server is a standby (pg_is_in_recovery), where LISTEN does not exist; "
                "name the primary in PGNOTIFY_LISTEN_DATABASE"
            )
        self.backend_pid = int(pid or 0)
        # A pooler answers with a key of its own, not with that of the backend it lends us.
        self.pooled = self._pgconn.backend_pid != self.backend_pid
        if not self.pooled:
            # The server's side of the keepalives: a backend that writes to nobody would hold up
            # the notification queue of the whole cluster.
            await self.execute(SERVER_KEEPALIVES, timeout=timeout)

    async def listen(self, channels: Sequence[str], *, timeout: float) -> None:
        await self._each("LISTEN {}", channels, timeout)

    async def unlisten(self, channels: Sequence[str], *, timeout: float) -> None:
        await self._each("UNLISTEN {}", channels, timeout)

    async def _each(self, statement: str, channels: Sequence[str], timeout: float) -> None:
        # One simple query is one transaction: all of them take effect with its commit, or none.
        parts = [sql.SQL(statement).format(sql.Identifier(name)) for name in channels]
        if parts:
            await self.execute(sql.SQL("; ").join(parts).as_bytes(self._raw), timeout=timeout)

    async def execute(
        self, statement: bytes, params: Sequence[str] | None = None, *, timeout: float
    ) -> list[Row]:
        """Run one statement; returns the rows of its last result as text.

        Raises:
            ConnectionLost: no answer within ``timeout`` seconds, or the connection broke.
            psycopg.Error: the server refused the statement.
        """
        if self.lost is not None or self.closed:
            raise ConnectionLost(first_line(self.lost)) from self.lost
        if self._answer is not None:
            raise RuntimeError("a statement is in flight on the listening connection already")
        self._answer = self._loop.create_future()
        self._rows, self._error = [], None
        try:
            if params is None:
                self._pgconn.send_query(statement)
            else:
                self._pgconn.send_query_params(statement, [value.encode() for value in params])
            self._flush()
            async with asyncio.timeout(timeout):
                return await self._answer
        except TimeoutError as exc:
            self._lose(exc)
            raise ConnectionLost(f"no answer within {timeout:g} s") from exc
        except psycopg.OperationalError as exc:
            if self.lost is None and self._pgconn.status != pq.ConnStatus.BAD:
                raise
            self._lose(exc)
            raise ConnectionLost(first_line(exc)) from exc
        finally:
            self._answer = None

    def take(self) -> list[Notification]:
        """The notifications that have arrived since the last call."""
        inbox, self._inbox = self._inbox, []
        return inbox

    def close(self) -> None:
        """Close at once; never waits for the network."""
        if self.closed:
            return
        self.closed = True
        self._detach()
        self._pgconn.finish()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(psycopg.OperationalError("the connection was closed"))

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    # -- the loop's side --------------------------------------------------------------------

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._loop.add_writer(self._fileno, self._writable)

    def _writable(self) -> None:
        try:
            if not self._pgconn.flush():
                self._loop.remove_writer(self._fileno)
        except psycopg.Error as exc:
            self._lose(exc)

    def _readable(self) -> None:
        try:
            for _ in range(_READS):
                self._pgconn.consume_input()
                if self._answer is not None and not self._answer.done():
                    self._collect_results()
                if self._collect_notifications() < _MUCH:
                    break
        except psycopg.Error as exc:
            # What came just before the end has been read, and counts.
            with suppress(psycopg.Error):
                self._collect_notifications()
            self._lose(exc)
        if self._inbox or self.lost is not None:
            self._on_input()

    def _collect_notifications(self) -> int:
        """Move what libpq has read to the inbox; returns the bytes of payload."""
        size = 0
        while (notify := self._pgconn.notifies()) is not None:
            channel = notify.relname.decode(errors="replace")
            self._inbox.append(Notification(channel, notify.extra, notify.be_pid))
            size += len(notify.extra)
        return size

    def _collect_results(self) -> None:
        answer = self._answer
        while answer is not None and not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:
                if self._error is not None:
                    answer.set_exception(self._error)
                else:
                    answer.set_result(self._rows)
                return
            if result.status == pq.ExecStatus.TUPLES_OK:
                self._rows = [
                    tuple(result.get_value(row, column) for column in range(result.nfields))
                    for row in range(result.ntuples)
                ]
            elif result.status != pq.ExecStatus.COMMAND_OK:
                self._error = errors.error_from_result(result, encoding="utf-8")
                if self._pgconn.status == pq.ConnStatus.BAD:
                    self._lose(self._error)
                    return

    def _lose(self, exc: Exception) -> None:
        if self.lost is None:
            self.lost = exc
            self._detach()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(psycopg.OperationalError(first_line(exc)))
            self._on_input()

    def _detach(self) -> None:
        self._loop.remove_reader(self._fileno)
        self._loop.remove_writer(self._fileno)


def first_line(exc: BaseException | None) -> str:
    """What libpq says in several lines, cut to the one that names the cause."""
    lines = str(exc).strip().splitlines() if exc is not None else []
    return lines[0] if lines else type(exc).__name__
