"""The listening session as a pure state machine: no clock, no socket, no task.

Each input is a method that takes the time (seconds of a monotonic clock) and returns the commands
to carry out, in order. What a command leads to comes back as another input. ``wake_at`` says by
when :meth:`Session.tick` must be called even if nothing happens.

::

    idle ─start─▶ connecting ─connected─▶ listening ─listened─▶ proving ─echoed─▶ established
                     ▲   │                    │                    │                   │
                     │   └──────────────── failed ─────────────────┴───────────────────┘
                     └─tick─ waiting ◀──────────┘                    stop ─▶ stopped (from any)

"Established" means proven: LISTEN was committed, and a NOTIFY to ourselves came back on the same
session. Only then are frames delivered, after the gap that says what may have been missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..backoff import Backoff
from .commands import (
    Close,
    Command,
    Connect,
    Deliver,
    Echo,
    Established,
    Follow,
    Gap,
    Lead,
    Listen,
    Lost,
    TryLead,
    Unlisten,
)

_STARTED = "the listener has just started"

State = Literal["idle", "connecting", "listening", "proving", "established", "waiting", "stopped"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Intervals of a session, all in seconds."""

    heartbeat_interval: float = 10.0
    heartbeat_timeout: float = 5.0
    connect_timeout: float = 10.0
    leader_poll_interval: float = 1.0

    @property
    def proof_lag(self) -> float:
        """How old the last proof of a session that still counts itself well can be."""
        return self.heartbeat_interval + 2 * self.heartbeat_timeout


class Session:
    """See the module. One session lives as long as its listener, through any number of connections.

    Args:
        channels: wire channels wanted from the start.
        backoff: delays between attempts to connect; reset once a connection has been healthy.
        new_nonce: returns a text that was not used before.
        wants_to_lead: whether to compete for the leader's lock.
        gap_on_start: whether to tell of a gap when established for the first time, too.
    """

    def __init__(
        self,
        channels: Iterable[str],
        *,
        backoff: Backoff,
        new_nonce: Callable[[], str],
        timing: Timing | None = None,
        wants_to_lead: bool = False,
        gap_on_start: bool = False,
    ) -> None:
        self.state: State = "idle"
        self.wanted = frozenset(channels)
        self.listened_to: frozenset[str] = frozenset()
        self.leader = False
        self.wake_at: float | None = None
        self.proven_at: float | None = None
        self.timing = timing or Timing()
        self._backoff = backoff
        self._new_nonce = new_nonce
        self._wants_to_lead = wants_to_lead
        self._gap_on_start = gap_on_start
        self._cause = ""
        self._held: list[Any] = []
        self._nonce: str | None = None
        self._echo_due: float | None = None
        self._echo_at = 0.0
        self._echo_channels: frozenset[str] = frozenset()
        self._next_echo = 0.0
        self._next_try = 0.0
        self._leaderless: tuple[float, str] | None = None
        self._established_at: float | None = None
        self._changing: frozenset[str] = frozenset()
        self._change_due: float | None = None

    # -- inputs ---------------------------------------------------------------------------

    def start(self, now: float) -> list[Command]:
        return self._connect(now) if self.state == "idle" else []

    def connected(self, now: float) -> list[Command]:
        if self.state != "connecting":
            return [Close()]
        self.state = "listening"
        self.wake_at = now + self.timing.heartbeat_timeout
        self._changing = self.wanted
        return [Listen(self.wanted)]

    def listened(self, now: float, channels: frozenset[str]) -> list[Command]:
        """LISTEN was committed for ``channels``."""
        if self.state == "listening":
            self.state = "proving"
            self.listened_to = channels
            self._changing, self._change_due = frozenset(), None
            return self._echo(now)
        if self.state != "established":
            return []
        self.listened_to |= channels
        self._changing, self._change_due = frozenset(), None
        # The session itself is proven, so a committed LISTEN is all a new channel needs.
        return [self._heard(), *self._change_channels(now)]

    def unlistened(self, now: float, channels: frozenset[str]) -> list[Command]:
        if self.state != "established":
            return []
        self.listened_to -= channels
        self._changing, self._change_due = frozenset(), None
        return [self._heard(), *self._change_channels(now)]

    def echoed(
        self, now: float, nonce: str, listening: frozenset[str] | None = None
    ) -> list[Command]:
        """Our own NOTIFY came back.

        Args:
            listening: channels the server says we listen to, where it was asked.
        """
        if nonce != self._nonce or self.state not in ("proving", "established"):
            return []
        asked_for = self._echo_channels & self.listened_to
        if listening is not None and not asked_for <= listening:
            missing = ", ".join(sorted(asked_for - listening)[:3])
            return self.failed(now, f"the server no longer listens for us on {missing}")
        self._nonce, self._echo_due = None, None
        self._next_echo = now + self.timing.heartbeat_interval
        # It proves that what was committed before it was sent has been read, and no more.
        since, self.proven_at = self.proven_at, self._echo_at
        if self.state == "established":
            self._reset_backoff_if_healthy(now)
            self._set_alarm()
            return []
        self.state = "established"
        self._established_at = now
        self._next_try = now
        commands: list[Command] = []
        if since is not None:
            commands.append(Gap(since, now, self._cause))
            if self._leaderless is not None:
                since = min(since, self._leaderless[0])
            self._leaderless = (since, self._cause)
        elif self._gap_on_start:
            commands.append(Gap(None, now, _STARTED))
        held: list[Command] = [Deliver(self._held)] if self._held else []
        self._held = []
        if self._wants_to_lead:
            # What was held comes before the lock is ours: another leader may have acted on it.
            # Whoever waits for "established" may publish at once, and expect the leader to act.
            commands += [*held, self._try_lead(now), self._heard()]
        else:
            commands += [self._heard(), *held]
        self._set_alarm()
        return [*commands, *self._change_channels(now)]

    def asked_for(self, nonce: str) -> frozenset[str]:
        """The channels that an echo with this nonce proves; none if it is not awaited."""
        return self._echo_channels & self.listened_to if nonce == self._nonce else frozenset()

    def notified(self, now: float, notifications: list[Any]) -> list[Command]:
        if self.state == "established":
            proof_age = now - (self.proven_at or now)
            if self.leader and proof_age > self.timing.proof_lag:
                # Somebody else leads by now, and what we read first may be old.
                return self.failed(now, "this process was stopped, or too busy, for too long")
            return [Deliver(notifications)]
        if self.state in ("listening", "proving"):
            # Already ours, but the gap must come first.
            self._held += notifications
        return []

    def led(
        self,
        now: float,
        acquired: bool,
        *,
        asked_at: float | None = None,
        silent_for: float | None = None,
    ) -> list[Command]:
        """The outcome of :class:`TryLead`.

        Args:
            asked_at: when the server was asked; default now.
            silent_for: seconds since the present leader last gave a sign of life, None where
                that is not known.
        """
        if self.state != "established" or self.leader:
            return []
        if not acquired:
            # What it had read by its last sign of life goes back to its last proof before that.
            asked_at = now if asked_at is None else asked_at
            since = asked_at - (silent_for or 0.0) - self.timing.proof_lag
            if silent_for is not None or self._leaderless is None:
                self._leaderless = (since, "the leader was gone")
            return []
        self.leader = True
        self._set_alarm()
        commands: list[Command] = [Lead()]
        if self._leaderless is not None:
            since, cause = self._leaderless
            self._leaderless = None
            commands.append(Gap(since, now, cause, for_leader=True))
        elif self._gap_on_start:
            commands.append(Gap(None, now, _STARTED, for_leader=True))
        return commands

    def leadership_free(self, now: float) -> list[Command]:
        """The leader said, in the stream of notifications, that it has let go of the lock."""
        if self.state == "established" and self._wants_to_lead and not self.leader:
            # The gap is told all the same: that the leader let go in order does not prove that
            # the network let it read up to that point.
            command = self._try_lead(now, from_here=True)
            self._set_alarm()
            return [command]
        return []

    def want(self, now: float, channels: Iterable[str]) -> list[Command]:
        """From here on these are the channels to listen to."""
        self.wanted = frozenset(channels)
        if self.state != "established":
            return []
        if self.wanted == self.listened_to and not self._changing:
            return [self._heard()]
        return self._change_channels(now)

    def beat_every(self, now: float, interval: float) -> None:
        """There is a heartbeat now, and from here on one each ``interval`` seconds."""
        self.timing = replace(self.timing, heartbeat_interval=interval)
        self._next_echo = now
        if self.state == "established":
            self._set_alarm()

    def tick(self, now: float) -> list[Command]:
        """Time has passed."""
        if self.wake_at is None or now < self.wake_at:
            return []
        match self.state:
            case "waiting":
                return self._connect(now)
            case "connecting":
                return self.failed(now, "the server did not answer in time")
            case "listening":
                return self.failed(now, "LISTEN was not answered in time")
            case "proving":
                return self.failed(
                    now,
                    "our own NOTIFY did not come back in time; is a transaction pooler in between?",
                )
            case "established":
                return self._keep_alive(now)
        return []

    def failed(self, now: float, cause: str) -> list[Command]:
        """Anything went wrong with the connection, or with opening it."""
        if self.state in ("idle", "waiting", "stopped"):
            return []
        if self.state == "established":
            self._reset_backoff_if_healthy(now)
        commands = self._leave_connection()
        self._cause = cause
        self.state = "waiting"
        delay = self._backoff.next()
        self.wake_at = now + delay
        return [*commands, Lost(cause, delay)]

    def stop(self, now: float) -> list[Command]:
        if self.state == "stopped":
            return []
        commands = self._leave_connection()
        self.state, self.wake_at = "stopped", None
        return commands

    # -- steps ----------------------------------------------------------------------------

    def _connect(self, now: float) -> list[Command]:
        self.state = "connecting"
        self.wake_at = now + self.timing.connect_timeout
        return [Connect()]

    def _echo(self, now: float) -> list[Command]:
        self._nonce = self._new_nonce()
        self._echo_at, self._echo_channels = now, self.listened_to
        self._echo_due = now + self.timing.heartbeat_timeout
        self._set_alarm()
        return [Echo(self._nonce)]

    def _heard(self) -> Command:
        # What is about to be left does not count: whoever wants it again by then waits for LISTEN.
        return Established(self.listened_to & self.wanted)

    def _try_lead(self, now: float, *, from_here: bool = False) -> Command:
        self._next_try = now + self.timing.leader_poll_interval
        return TryLead(from_here)

    def _change_channels(self, now: float) -> list[Command]:
        """Bring the server nearer to what is wanted, one statement at a time."""
        if self._changing:
            return []
        command: Command
        if missing := self.wanted - self.listened_to:
            self._changing, command = missing, Listen(missing)
        elif surplus := self.listened_to - self.wanted:
            self._changing, command = surplus, Unlisten(surplus)
        else:
            return []
        self._change_due = now + self.timing.heartbeat_timeout
        self._set_alarm()
        return [command]

    def _keep_alive(self, now: float) -> list[Command]:
        if self._echo_due is not None and now >= self._echo_due:
            return self.failed(now, "a heartbeat did not come back in time")
        if self._change_due is not None and now >= self._change_due:
            return self.failed(now, "LISTEN or UNLISTEN was not answered in time")
        commands: list[Command] = []
        if self._echo_due is None and now >= self._next_echo:
            commands += self._echo(now)
        if self._wants_to_lead and not self.leader and now >= self._next_try:
            commands.append(self._try_lead(now))
        self._set_alarm()
        return commands

    def _leave_connection(self) -> list[Command]:
        commands: list[Command] = [Follow()] if self.leader else []
        self.leader = False
        self.listened_to = self._changing = frozenset()
        self._nonce = self._echo_due = self._change_due = self._established_at = None
        self._held = []
        return [*commands, Close()]

    def _reset_backoff_if_healthy(self, now: float) -> None:
        if (
            self._established_at is not None
            and now - self._established_at >= self.timing.heartbeat_interval
        ):
            self._backoff.reset()

    def _set_alarm(self) -> None:
        alarms = [self._next_echo if self._echo_due is None else self._echo_due]
        if self.state == "established":
            if self._change_due is not None:
                alarms.append(self._change_due)
            if self._wants_to_lead and not self.leader:
                alarms.append(self._next_try)
        self.wake_at = min(alarms)
