"""The listener: carries out what its session decides, on one connection, in one task."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from .. import signals
from ..backoff import Backoff
from ..conf import conf
from ..epochs.clock import node_clock
from ..exceptions import ConnectionLost, ListenError
from ..wire import wire_channel
from . import commands as todo
from .commands import Command
from .connection import ListenConnection, Notification, first_line
from .echo import echo
from .health import Health
from .leadership import LeaderLock
from .parameters import connection_params
from .session import Session, Timing
from .sink import Sink
from .status import STATUS_CHANNEL, may_reply_on, status_payload
from .wake_up import WakeUp

logger = logging.getLogger("django_pgnotify.listening")

BACKOFF_BASE = 0.1
"""Upper bound, in seconds, of the first pause between attempts to connect."""

OnProven = Callable[[int, frozenset[str]], None]


class Listener:
    """Listens on the channels it is told to, for ever, and says when it may have missed any.

    Args:
        using: database alias whose parameters to connect with, read anew at each attempt.
        channels: wire channels wanted from the start.
        sink: what receives.
        leadership: name of the lock to compete for; None never leads.
        gap_on_start: tell of a gap, since nobody knows when, at the first establishment too.
        on_proven: told after each heartbeat by when, as ``node_clock`` reads, everything that was
            committed on which channels has been given to the sink.
        heartbeat_interval: seconds, where it is to be less than ``PGNOTIFY_HEARTBEAT_INTERVAL``.
    """

    connection_class: type[ListenConnection] = ListenConnection

    def __init__(
        self,
        using: str,
        channels: Iterable[str],
        sink: Sink,
        *,
        leadership: str | None = None,
        gap_on_start: bool = False,
        on_proven: OnProven | None = None,
        heartbeat_interval: float | None = None,
    ) -> None:
        self.using = using
        self.health = Health()
        self._sink = sink
        prefix = conf.CHANNEL_PREFIX
        self._echo_channel = wire_channel(f"pgnotify.echo.{secrets.token_hex(8)}", prefix)
        self._status_channel = wire_channel(STATUS_CHANNEL, prefix)
        self._lock = None if leadership is None else LeaderLock(leadership, prefix)
        self._leader_channel = None if self._lock is None else self._lock.channel
        own = (self._echo_channel, self._status_channel, self._leader_channel)
        self._own_channels = frozenset(channel for channel in own if channel is not None)
        self._timeout = conf.HEARTBEAT_TIMEOUT
        self._on_proven = on_proven
        interval = conf.HEARTBEAT_INTERVAL
        if heartbeat_interval is not None:
            interval = min(interval, heartbeat_interval)
        self.session = Session(
            channels,
            backoff=Backoff(BACKOFF_BASE, conf.RECONNECT_MAX_DELAY),
            new_nonce=lambda: secrets.token_hex(8),
            timing=Timing(
                heartbeat_interval=interval,
                heartbeat_timeout=self._timeout,
                connect_timeout=conf.CONNECT_TIMEOUT + self._timeout,
                leader_poll_interval=conf.LEADER_POLL_INTERVAL,
            ),
            wants_to_lead=leadership is not None,
            gap_on_start=gap_on_start,
        )
        self._connection: ListenConnection | None = None
        self._server_listens: frozenset[str] | None = None
        self._echo_sent = 0.0
        self._echo_began = 0
        self._unread: deque[Notification] = deque()
        self._wanted: frozenset[str] | None = None
        self._stop_requested = False
        self._opening: asyncio.Task[ListenConnection] | None = None
        self._wake_up = WakeUp()
        self._undone: list[Command] = []
        self._fault: Exception | None = None

    # -- from outside, on the same loop -----------------------------------------------------

    def stop(self) -> None:
        """Ask :meth:`run` to give up the leadership, close, and return."""
        self._stop_requested = True
        if self._opening is not None:
            self._opening.cancel()
        self.kick()

    def want(self, channels: Iterable[str]) -> None:
        """Listen to exactly these channels; the sink hears ``established`` once it does."""
        self._wanted = frozenset(channels)
        self.kick()

    def beat_every(self, interval: float) -> None:
        """Prove itself now, and at least that often, in seconds, from here on."""
        self.session.beat_every(self._now(), min(interval, conf.HEARTBEAT_INTERVAL))
        self.kick()

    def kick(self) -> None:
        """Have the loop of :meth:`run` look again."""
        self._wake_up.ask()

    def status(self) -> dict[str, Any]:
        """Whether and since when it is established, its last echo and its last gap."""
        proven_at = self.session.proven_at
        return self.health.as_dict(None if proven_at is None else self.wall_time(proven_at))

    @property
    def backend_pid(self) -> int | None:
        """Pid of the PostgreSQL backend that serves this listener, None while there is none."""
        return None if self._connection is None else self._connection.backend_pid

    # -- the loop ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Listen until :meth:`stop`. Connection trouble never ends it; a sink that raises does."""
        loop = asyncio.get_running_loop()
        now = loop.time
        try:
            await self._carry_out(self.session.start(now()))
            while not self._stop_requested:
                await self._wake_up.wait(self.session.wake_at)
                if self._fault is not None:
                    raise self._fault
                if self._wanted is not None:
                    wanted, self._wanted = self._wanted, None
                    await self._carry_out(self.session.want(now(), wanted))
                await self._read()
                await self._carry_out(self.session.tick(now()))
            await self._hand_over()
        finally:
            await self._carry_out(self.session.stop(now()))

    def _on_input(self) -> None:
        """The connection has read something.

        Frames, which is what comes most, go straight to the sink while :meth:`run` only waits. It
        is woken for everything else, and sees to it in its turn.
        """
        connection = self._connection
        if connection is None or not self._wake_up.awaited:
            self.kick()
            return
        heard = connection.take()
        if self._own_channels.isdisjoint(one.channel for one in heard):
            for command in self.session.notified(self._now(), heard) if heard else ():
                if isinstance(command, todo.Deliver):
                    try:
                        self._sink.notified(command.notifications)
                    except Exception as exc:  # noqa: BLE001 - to end the task, not only this read
                        self._fault = exc
                        self.kick()
                else:
                    self._undone.append(command)
        else:
            self._unread.extend(heard)
        if self._unread or self._undone or connection.lost is not None:
            self.kick()

    async def _read(self) -> None:
        connection = self._connection
        if connection is None:
            return
        undone, self._undone = self._undone, []
        await self._carry_out(undone)
        self._unread.extend(connection.take())
        while self._unread:
            await self._read_on()
        if connection.lost is not None and connection is self._connection:
            await self._fail(ConnectionLost(f"the connection broke: {first_line(connection.lost)}"))

    async def _read_on(self) -> Notification | None:
        """Hand on unread frames up to and with the next notification for the listener itself."""
        heard: list[Notification] = []
        while self._unread and self._unread[0].channel not in self._own_channels:
            heard.append(self._unread.popleft())
        if heard:
            await self._carry_out(self.session.notified(self._now(), heard))
        if not self._unread:
            return None
        entry = self._unread.popleft()
        await self._heed(entry)
        return entry

    async def _heed(self, entry: Notification) -> None:
        now = self._now()
        if entry.channel == self._echo_channel:
            await self._echoed(entry.payload.decode(errors="replace"))
        elif entry.channel == self._leader_channel:
            if entry.payload == self._require_lock().mark:
                await self._carry_out(self.session.led(now, True))
            elif not entry.payload:
                await self._carry_out(self.session.leadership_free(now))
        else:
            await self._answer(entry.payload.decode(errors="replace"))

    async def _echoed(self, nonce: str) -> None:
        self.health.round_trip = self._now() - self._echo_sent
        channels = self.session.asked_for(nonce)
        began = self._echo_began
        await self._carry_out(self.session.echoed(self._now(), nonce, self._server_listens))
        # Behind what it leads to: a gap, and frames that had to wait for it.
        if channels and self._on_proven is not None and self.session.state == "established":
            self._on_proven(began, channels)

    async def _answer(self, channel: str) -> None:
        if self._connection is not None and may_reply_on(channel, conf.CHANNEL_PREFIX):
            try:
                await self._connection.execute(
                    b"SELECT pg_notify($1, $2)",
                    (channel, status_payload(self._sink.status())),
                    timeout=self._timeout,
                )
            except (ListenError, psycopg.Error) as exc:
                await self._fail(exc)

    async def _fail(self, exc: Exception) -> None:
        self.health.last_error = exc
        await self._carry_out(self.session.failed(self._now(), first_line(exc)))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _carry_out(self, commands: Sequence[Command]) -> None:
        """Carry out commands; after a failure, those of the session that gives up instead."""
        try:
            await self._do_all(commands)
        except (ListenError, psycopg.Error) as exc:
            await self._fail(exc)

    async def _do_all(self, commands: Sequence[Command]) -> None:
        """Carry out commands in order; what one of them leads to comes before the next."""
        for command in commands:
            await self._do(command)

    async def _do(self, command: Command) -> None:
        match command:
            case todo.Deliver(notifications):
                self._sink.notified(notifications)
            case todo.Connect():
                self._connection = await self._connect()
                await self._do_all(self.session.connected(self._now()))
            case todo.Listen(channels):
                await self._open().listen(
                    sorted(channels | self._own_channels), timeout=self._timeout
                )
                await self._do_all(self.session.listened(self._now(), channels))
            case todo.Unlisten(channels):
                await self._open().unlisten(sorted(channels), timeout=self._timeout)
                await self._do_all(self.session.unlistened(self._now(), channels))
            case todo.Echo(nonce):
                await self._echo(nonce)
            case todo.TryLead(from_here):
                await self._try_lead(from_here=from_here)
            case todo.Lead():
                self._sink.led(True)
            case todo.Follow():
                self._sink.led(False)
            case todo.Gap(since, until, cause, for_leader):
                times = (
                    None if since is None else self.wall_time(since),
                    self.wall_time(until),
                )
                self.health.note_gap(*times, cause)
                self._sink.gap(*times, cause, for_leader=for_leader)
                if not for_leader:
                    # Waited for: what a handler does is done before later frames are delivered.
                    await signals.listener_gap.asend_robust(
                        self, since=times[0], until=times[1], cause=cause
                    )
            case todo.Established(channels):
                self.health.last_error = None
                self.health.established_since = self.health.established_since or datetime.now(UTC)
                self._sink.established(channels)
                await signals.listener_established.asend_robust(self, using=self.using)
            case todo.Lost(cause, retry_in):
                # First, so that nobody is promised anything by a listener known to be deaf.
                self._sink.lost(cause, retry_in)
                logger.warning(
                    "Listener on database %r is not established: %s; next attempt in %.1f s",
                    self.using,
                    cause,
                    retry_in,
                    extra={"using": self.using, "cause": cause, "retry_in": retry_in},
                )
            case todo.Close():
                self._unread.clear()
                self.health.established_since = None
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None

    async def _connect(self) -> ListenConnection:
        opening = self.connection_class.open(
            connection_params(self.using), timeout=conf.CONNECT_TIMEOUT, on_input=self._on_input
        )
        self._opening = asyncio.create_task(opening, name="pgnotify-connect")
        try:
            return await self._opening
        except asyncio.CancelledError:
            if not (self._stop_requested and self._opening.cancelled()):
                raise
        finally:
            self._opening = None
        # Not from inside the handler: the frames of that error hold the half-open connection.
        raise ConnectionLost("told to stop while connecting")

    def _open(self) -> ListenConnection:
        if self._connection is None:
            raise ConnectionLost("the connection is closed")
        return self._connection

    async def _try_lead(self, *, from_here: bool) -> None:
        connection, lock = self._open(), self._require_lock()
        asked_at = self._now()
        silent_for: float | None = None
        acquired = await lock.try_take(connection, self._timeout)
        if acquired and not from_here:
            self._unread.extend(connection.take())
            while self._unread and not self.session.leader:
                await self._read_on()  # our mark is among them, and is heeded in its place
            return
        if not acquired:
            # By this time a silent leader has given itself up: it had no echo in its deadline.
            limit = self.session.timing.proof_lag
            silent_for = await lock.silence_of_holder(connection, limit, self._timeout)
        await self._do_all(
            self.session.led(
                self._now(),
                acquired,
                asked_at=asked_at,
                silent_for=silent_for,
            )
        )

    def _require_lock(self) -> LeaderLock:
        if self._lock is None:
            raise RuntimeError("this listener does not compete for the leadership")
        return self._lock

    async def _echo(self, nonce: str) -> None:
        connection = self._open()
        self._echo_sent, self._echo_began = self._now(), node_clock()
        self._server_listens = await echo(
            connection, self.using, self._echo_channel, nonce, self._timeout
        )

    async def _hand_over(self) -> None:
        """Let a standby lead from now on, not only once our connection is gone.

        Our last word is a notification, so that it has its place among the others: what comes
        before it is still ours, what comes after is the next leader's.
        """
        connection = self._connection
        if not self.session.leader or connection is None:
            return
        try:
            await self._require_lock().let_go(connection, self._timeout)
        except (ListenError, psycopg.Error) as exc:
            logger.info("Leadership ends with the connection, not before it: %s", exc)
            return
        self._unread.extend(connection.take())
        while self._unread:
            entry = await self._read_on()
            if entry is not None and entry.channel == self._leader_channel:
                break  # our goodbye, or the mark of one that was quicker than it

    def wall_time(self, moment: float) -> datetime:
        """A moment of the loop's clock as the time of day, in UTC."""
        return datetime.now(UTC) - timedelta(seconds=self._now() - moment)
