"""The connection of an event loop: it listens, and it sends in between.

One session for both, because a session hears its own NOTIFY in the same packet that acknowledges
it: whoever awaits a send finds it delivered to the members of its own loop, and no second backend
has to be woken for that. Statements take turns; those of the listener are few and short.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

import psycopg
from psycopg import errors, pq

from ..exceptions import ConnectionLost, PublishError
from ..listening.connection import ListenConnection, Row, first_line
from ..listening.listener import Listener

# Expired ones do not count: nobody may come to prune them, and each send would look for them.
_MEMBERS = "EXISTS (SELECT FROM pgnotify_layer_member WHERE expires_at > now())"
_ONE, _ONE_AND_MEMBERS = b"pgnotify_one", b"pgnotify_one_and_members"
_PREPARE = (
    "PREPARE pgnotify_one (text, text) AS SELECT pg_notify($1, $2)",
    f"PREPARE pgnotify_one_and_members (text, text) AS SELECT pg_notify($1, $2), {_MEMBERS}",
)
_LOOK = b"SELECT has_table_privilege(to_regclass('pgnotify_layer_member'), 'SELECT')"

Done = Callable[[Exception | None, "pq.abc.PGresult | None"], None]
"""Told what became of a statement: the error, or the last result."""


class NotSent(PublishError):
    """The server ended the session before it did what it was told; another session can do it."""


class LayerConnection(ListenConnection):
    """See the module."""

    def __init__(self, raw: psycopg.AsyncConnection[Any], on_input: Callable[[], None]) -> None:
        super().__init__(raw, on_input)
        self.utf8 = raw.pgconn.parameter_status(b"server_encoding") == b"UTF8"
        self.has_tables = False
        """Whether the tables of the layer are there."""
        self._taken = False
        self._line: deque[Callable[[], None]] = deque()
        self._sending: Done | None = None
        self._refusal: psycopg.Error | None = None
        self._result: pq.abc.PGresult | None = None
        self._undelivered: list[Callable[[], None]] = []
        self.told_to_end = False
        """Whether the server took its leave in order: what was in flight was not done.

        Told while it was idle, nearly always. That it ended between commit and answer cannot be
        ruled out, but is a matter of microseconds.
        """

    @classmethod
    async def open(
        cls, params: dict[str, Any], *, timeout: float, on_input: Callable[[], None]
    ) -> Self:
        """As that of the base; whatever the project has chosen, we speak UTF-8."""
        params = {**params, "client_encoding": "UTF8"}
        return await super().open(params, timeout=timeout, on_input=on_input)

    async def _introduce(self, timeout: float) -> None:
        await super()._introduce(timeout)
        [(there,)] = await self.execute(_LOOK, timeout=timeout)
        self.has_tables = there == b"t"
        if not self.pooled:
            statements = "; ".join(_PREPARE[: 1 + self.has_tables])
            await self.execute(statements.encode(), timeout=timeout)

    # -- turns --------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        return self.lost is None and not self.closed

    @property
    def free(self) -> bool:
        """Whether a statement can leave now."""
        return not self._taken

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call it when its turn has come: it sends, or calls :meth:`pass_on`."""
        self._line.append(callback)

    def pass_on(self) -> None:
        """End a turn."""
        self._taken = False
        while self._line and not self._taken:
            self._line.popleft()()

    async def execute(
        self, statement: bytes, params: Sequence[str] | None = None, *, timeout: float
    ) -> list[Row]:
        """As that of the base, in its turn."""
        if self._taken:
            turn = self._loop.create_future()
            self._line.append(partial(self._give, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.pass_on()
                raise
        self._taken = True
        try:
            return await super().execute(statement, params, timeout=timeout)
        finally:
            self.pass_on()

    def _give(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            self._taken = True
            turn.set_result(None)

    # -- sending ------------------------------------------------------------------------------

    def notify(self, frames: Sequence[tuple[bytes, bytes]], done: Done, *, groups: bool) -> None:
        """Send ``(channel, payload)`` pairs in one statement, now: the connection must be free.

        Args:
            done: called once, when the server has answered or the connection is lost.
            groups: ask, too, whether any group has a normal channel as a member; the answer is
                the last column.
        """
        groups = groups and self.has_tables
        if len(frames) == 1 and not self.pooled:
            name = _ONE_AND_MEMBERS if groups else _ONE
            self._start(self._pgconn.send_query_prepared, name, frames[0], done)
        else:
            calls = [f"pg_notify(${n}, ${n + 1})" for n in range(1, 2 * len(frames), 2)]
            statement = f"SELECT {', '.join([*calls, _MEMBERS] if groups else calls)}"
            params = [text for frame in frames for text in frame]
            self._start(self._pgconn.send_query_params, statement.encode(), params, done)

    def request(
        self, statement: bytes, params: Sequence[str], *, timeout: float
    ) -> asyncio.Future[list[Row]]:
        """Run a statement in its turn. To cancel the future does not undo it.

        The future fails with NotSent or PublishError where the connection was lost, which it is
        when a statement is not answered within ``timeout`` seconds, and with the server's error
        where it refused.
        """
        future: asyncio.Future[list[Row]] = self._loop.create_future()
        alarm: asyncio.TimerHandle | None = None

        def done(error: Exception | None, result: pq.abc.PGresult | None) -> None:
            if alarm is not None:
                alarm.cancel()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result([] if result is None else _rows(result))

        def begin() -> None:
            nonlocal alarm
            alarm = self._loop.call_later(timeout, self.lose, f"no answer within {timeout:g} s")
            encoded = [value.encode() for value in params]
            self._start(self._pgconn.send_query_params, statement, encoded, done)

        if self._taken:
            self._line.append(begin)
        else:
            begin()
        return future

    def _start(
        self,
        send: Callable[[bytes, Sequence[bytes]], None],
        statement: bytes,
        params: Sequence[bytes],
        done: Done,
    ) -> None:
        if not self.usable:
            done(NotSent(first_line(self.lost or ConnectionLost("it is closed"))), None)
            return
        self._refusal, self._result = None, None
        try:
            self._pgconn.consume_input()  # the end of an idle session may have been waiting there
            send(statement, params)
            self._taken, self._sending = True, done
            self._flush()
        except psycopg.Error as exc:
            if self._sending is None:
                done(NotSent(first_line(exc)), None)
            self._lose(exc)

    def _readable(self) -> None:
        if self._sending is None:
            super()._readable()
            return
        answered = False
        try:
            self._pgconn.consume_input()
            answered = self._collect_answer()
            self._collect_notifications()
        except psycopg.Error as exc:
            with suppress(psycopg.Error):
                self._collect_notifications()
            self._lose(exc)
        if self._inbox or self.lost is not None:
            self._on_input()
        if answered:
            self._answered()

    def _collect_answer(self) -> bool:
        """Whether the server has done with the statement."""
        while not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:
                return True
            if result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                self._result = result
            else:
                self._refusal = errors.error_from_result(result, encoding="utf-8")
                if self._pgconn.status == pq.ConnStatus.BAD:
                    self._lose(self._refusal)
                    return False
        return False

    def _answered(self) -> None:
        sent, self._sending = self._sending, None
        if sent is None:
            return
        error: Exception | None = self._refusal
        if isinstance(error, errors.UndefinedTable) and self.has_tables:
            self.has_tables = False  # a migration has been undone; groups do without it
            error = NotSent(first_line(error))
        tell = partial(sent, error, self._result)
        self.pass_on()  # first, or whoever sends without a pause would never let others have it
        if self.has_undelivered():
            self._undelivered.append(tell)
        else:
            tell()

    def has_undelivered(self) -> bool:
        """Whether something was read that has not been handed on yet; the listener tells."""
        return bool(self._inbox)

    def delivered(self) -> None:
        """What had been read has been handed on: tell those whose own messages were among it."""
        waiting, self._undelivered = self._undelivered, []
        for tell in waiting:
            tell()

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        super().close()
        self._give_up()

    def lose(self, reason: str) -> None:
        """Give it up: it does not answer any more."""
        self._lose(ConnectionLost(reason))

    def _lose(self, exc: Exception) -> None:
        if self.lost is None:
            self.told_to_end = (self._last_word() or "").startswith("57P0")
        super()._lose(exc)
        self._give_up()

    def _last_word(self) -> str | None:
        """The SQLSTATE with which the server took its leave."""
        if error := self._refusal or self._error:
            return error.sqlstate
        if self._pgconn.status != pq.ConnStatus.BAD:
            return None  # to ask would be to wait
        with suppress(psycopg.Error):
            while (result := self._pgconn.get_result()) is not None:
                field = result.error_field(pq.DiagnosticField.SQLSTATE)
                if field is not None:
                    return field.decode()
        return None

    def _give_up(self) -> None:
        self.delivered()
        sent, self._sending = self._sending, None
        if sent is not None:
            cause = self.lost or ConnectionLost("the connection was closed")
            error = (NotSent if self.told_to_end else PublishError)(first_line(cause))
            error.__cause__ = cause
            sent(error, None)
        self.pass_on()


def _rows(result: pq.abc.PGresult) -> list[Row]:
    return [
        tuple(result.get_value(row, column) for column in range(result.nfields))
        for row in range(result.ntuples)
    ]


class LayerListener(Listener):
    """A listener whose connection sends, too."""

    connection_class = LayerConnection

    @property
    def connection(self) -> LayerConnection | None:
        connection = self._connection
        return connection if isinstance(connection, LayerConnection) else None

    async def _connect(self) -> ListenConnection:
        connection = await super()._connect()
        if isinstance(connection, LayerConnection):
            connection.has_undelivered = lambda: bool(  # type: ignore[method-assign]
                connection._inbox or self._unread or self._undone
            )
        return connection

    def _on_input(self) -> None:
        """As that of the base, with less ado for what comes most: frames, while all is well."""
        connection = self._connection
        if (
            connection is not None
            and connection.lost is None
            and self._wake_up.awaited
            and not self._undone
            and self.session.state == "established"
            and self._own_channels.isdisjoint([one.channel for one in connection._inbox])
        ):
            self._sink.notified(connection.take())
        else:
            super()._on_input()

    async def _read(self) -> None:
        await super()._read()
        if self.connection is not None:
            self.connection.delivered()
