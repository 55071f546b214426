"""The listening session: every input in every state, by rules and one by one."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from django_pgnotify.backoff import Backoff
from django_pgnotify.listening.commands import (
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
from django_pgnotify.listening.session import Session, Timing

TIMING = Timing(
    heartbeat_interval=10.0, heartbeat_timeout=5.0, connect_timeout=8.0, leader_poll_interval=1.0
)
CAP = 30.0
LIVE = {"connecting", "listening", "proving", "established"}


def highest(low: float, high: float) -> float:
    return high


def session(*channels: str, **options: Any) -> Session:
    numbers = itertools.count(1)
    arguments: dict[str, Any] = {
        "backoff": Backoff(1.0, CAP, uniform=highest),
        "new_nonce": lambda: f"nonce-{next(numbers)}",
        "timing": TIMING,
    }
    return Session(channels or ("jobs",), **arguments | options)


def kinds(commands: list[Command]) -> list[type]:
    return [type(command) for command in commands]


def nonce_of(commands: list[Command]) -> str:
    [echo] = [command for command in commands if isinstance(command, Echo)]
    return echo.nonce


def establish(one: Session, now: float = 0.0) -> list[Command]:
    """Take a session from idle or waiting to established; what the last echo led to."""
    one.start(now) if one.state == "idle" else one.tick(max(now, one.wake_at or 0))
    assert one.state == "connecting"
    [listen] = one.connected(now)
    assert isinstance(listen, Listen)
    commands = one.echoed(now, nonce_of(one.listened(now, listen.channels)))
    assert one.state == "established"
    return commands


def beat(one: Session, now: float) -> None:
    one.echoed(now, nonce_of(one.tick(now)))


# -- by rules --------------------------------------------------------------------------------


class SessionMachine(RuleBasedStateMachine):
    """A shell that answers in any order, late, wrongly, or not at all, and a clock that jumps."""

    wants_to_lead = False

    @initialize(jitter=st.floats(0, 1))
    def begin(self, jitter: float) -> None:
        self.now = 100.0
        self.numbers = itertools.count(1)
        self.nonces: list[str] = []
        self.backoff = Backoff(0.5, CAP, uniform=lambda low, high: low + (high - low) * jitter)
        self.session = Session(
            ["a", "b"],
            backoff=self.backoff,
            new_nonce=self.new_nonce,
            timing=TIMING,
            wants_to_lead=self.wants_to_lead,
        )
        self.open = False  # a Connect was not yet followed by a Close
        self.started = False
        self.stopped = False
        self.listen_pending: deque[frozenset[str]] = deque()
        self.unlisten_pending: deque[frozenset[str]] = deque()
        self.try_pending = 0
        self.confirmed: frozenset[str] = frozenset()  # what the server listens to
        self.echoes: dict[str, float] = {}  # sent on this connection, and when
        self.proven = False  # an echo came back on this connection
        self.last_proof: float | None = None
        self.gap_due = False  # established before, and not yet told of what was missed
        self.leading = False
        self.heard: list[int] = []  # on this connection
        self.delivered: list[int] = []
        self.messages = itertools.count(1)

    def new_nonce(self) -> str:
        nonce = f"nonce-{next(self.numbers)}"
        self.nonces.append(nonce)
        return nonce

    def see(self, commands: list[Command]) -> None:
        """Check each command in its place, as the shell would carry it out."""
        assert not (self.stopped and commands), "commands after the end"
        for command in commands:
            match command:
                case Connect():
                    assert not self.open, "a second Connect without a Close"
                    self.open = True
                case Close():
                    assert not self.leading, "closed without Follow"
                    self.open = self.proven = False
                    self.confirmed = frozenset()
                    self.listen_pending.clear()
                    self.unlisten_pending.clear()
                    self.try_pending = 0
                    self.echoes.clear()
                    self.heard.clear()
                    self.delivered.clear()
                    self.gap_due = self.last_proof is not None
                case Listen(channels) | Unlisten(channels):
                    assert self.open
                    assert not self.listen_pending
                    assert not self.unlisten_pending
                    assert channels or not self.proven
                    pending = (
                        self.listen_pending
                        if isinstance(command, Listen)
                        else self.unlisten_pending
                    )
                    pending.append(channels)
                case Echo(nonce):
                    assert self.open
                    self.echoes[nonce] = self.now
                case Gap(since, until, _, for_leader):
                    assert since is not None
                    assert since <= until == self.now
                    if for_leader:
                        assert self.leading, "a leader's gap for who does not lead"
                    else:
                        assert self.gap_due, "a gap out of nothing, or twice"
                        assert since == self.last_proof
                        self.gap_due = False
                case Established(channels):
                    assert self.proven
                    assert not self.gap_due, "established before the gap was told"
                    assert channels <= self.confirmed
                case Deliver(notifications):
                    assert self.proven, "delivered before it was proven"
                    assert not self.gap_due, "delivered before the gap"
                    self.delivered += notifications
                case TryLead():
                    assert self.open
                    assert self.proven
                    assert self.wants_to_lead
                    assert not self.leading
                    self.try_pending += 1
                case Lead():
                    assert self.proven
                    assert not self.leading
                    self.leading = True
                case Follow():
                    assert self.leading
                    self.leading = False
                case Lost(cause, retry_in):
                    assert cause
                    assert 0 <= retry_in <= CAP

    # -- inputs

    @rule()
    def start(self) -> None:
        self.see(self.session.start(self.now))
        self.started = self.started or not self.stopped

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.5, 1.0, 4.999, 5.0, 10.0, 60.0, 86400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        before = self.session.wake_at
        commands = self.session.tick(self.now)
        if before is None or self.now < before:
            assert commands == []
        else:
            assert commands or (
                self.session.wake_at is not None and self.session.wake_at > self.now
            ), "an alarm that leads to nothing"
        self.see(commands)
        after = self.session.wake_at
        if after is not None and self.session.state != "waiting":
            assert after > self.now, "an alarm in the past: the loop would spin"

    @rule()
    def sleep_until_the_alarm(self) -> None:
        if self.session.wake_at is not None:
            self.now = max(self.now, self.session.wake_at)
            self.tick()

    @precondition(lambda self: self.session.state not in ("listening", "proving", "established"))
    @rule()
    def connected(self) -> None:
        """In time, or late, when nobody waits for it any more."""
        wanted = self.session.state == "connecting"
        commands = self.session.connected(self.now)
        if wanted:
            self.see(commands)
        else:
            # Whatever came late is closed, and the state stays what it was.
            assert kinds(commands) == [Close]

    @precondition(lambda self: self.listen_pending)
    @rule()
    def listened(self) -> None:
        channels = self.listen_pending.popleft()
        self.confirmed |= channels
        self.see(self.session.listened(self.now, channels))

    @precondition(lambda self: self.session.state not in ("listening", "established"))
    @rule()
    def listened_late(self) -> None:
        assert self.session.listened(self.now, frozenset({"a"})) == []

    @precondition(lambda self: self.unlisten_pending)
    @rule()
    def unlistened(self) -> None:
        channels = self.unlisten_pending.popleft()
        self.confirmed -= channels
        self.see(self.session.unlistened(self.now, channels))

    def prove(self, nonce: str, listening: frozenset[str] | None) -> None:
        live = nonce in self.echoes and self.session.state in ("proving", "established")
        known = listening is None or self.session.listened_to <= listening
        expected = nonce == self.session._nonce
        if live and known and expected:
            self.proven = True
        sent_at = self.echoes.get(nonce, self.now)
        commands = self.session.echoed(self.now, nonce, listening)
        self.see(commands)
        if live and known and expected:
            # What was committed before it was sent has been read; of later things it says nothing.
            self.last_proof = sent_at
            self.echoes.pop(nonce, None)

    @precondition(lambda self: self.echoes)
    @rule(ask=st.booleans())
    def echoed(self, ask: bool) -> None:
        self.prove(max(self.echoes), self.confirmed if ask else None)

    @precondition(lambda self: self.nonces)
    @rule(data=st.data())
    def echoed_from_the_past(self, data: st.DataObject) -> None:
        nonce = data.draw(st.sampled_from(self.nonces))
        stale = nonce not in self.echoes
        state = self.session.state
        self.prove(nonce, None)
        assert not stale or self.session.state == state, "an old echo proved something"

    @rule()
    def echoed_by_somebody_else(self) -> None:
        state = self.session.state
        assert self.session.echoed(self.now, "nonce-of-another") == []
        assert self.session.state == state

    @precondition(lambda self: self.echoes and self.session.listened_to)
    @rule()
    def echoed_by_a_server_that_forgot_a_channel(self) -> None:
        nonce = max(self.echoes)
        forgot = frozenset(sorted(self.session.listened_to)[1:])
        valid = nonce == self.session._nonce
        self.see(self.session.echoed(self.now, nonce, forgot))
        if valid:
            assert self.session.state == "waiting"

    @rule(number=st.integers(1, 3))
    def notified(self, number: int) -> None:
        notifications = [next(self.messages) for _ in range(number)]
        if self.session.state in ("listening", "proving", "established"):
            self.heard += notifications
        self.see(self.session.notified(self.now, notifications))

    @precondition(lambda self: self.try_pending)
    @rule(acquired=st.booleans())
    def led(self, acquired: bool) -> None:
        self.try_pending -= 1
        self.see(self.session.led(self.now, acquired))

    @rule()
    def leadership_free(self) -> None:
        self.see(self.session.leadership_free(self.now))

    @rule(channels=st.sets(st.sampled_from("abcd")))
    def want(self, channels: set[str]) -> None:
        self.see(self.session.want(self.now, channels))

    @rule()
    def failed(self) -> None:
        live = self.session.state in LIVE
        commands = self.session.failed(self.now, "cut")
        self.see(commands)
        assert (Lost in kinds(commands)) is live

    @precondition(lambda self: self.now > 1000)
    @rule()
    def stop(self) -> None:
        self.see(self.session.stop(self.now))
        self.stopped = True

    # -- invariants

    @invariant()
    def it_has_a_connection_where_its_state_says_so(self) -> None:
        assert self.open is (self.session.state in LIVE)

    @invariant()
    def established_means_an_echo_came_back_on_this_connection(self) -> None:
        assert (self.session.state == "established") is self.proven

    @invariant()
    def it_is_never_deaf(self) -> None:
        """In each live state something is going to happen, and soon."""
        state, wake_at = self.session.state, self.session.wake_at
        if state in ("idle", "stopped"):
            assert wake_at is None
            return
        assert wake_at is not None
        limit = {
            "waiting": CAP,
            "connecting": TIMING.connect_timeout,
            "listening": TIMING.heartbeat_timeout,
            "proving": TIMING.heartbeat_timeout,
            "established": max(TIMING.heartbeat_interval, TIMING.heartbeat_timeout),
        }[state]
        assert wake_at <= self.now + limit
        if state == "established" and self.wants_to_lead and not self.leading:
            assert wake_at <= self.now + TIMING.leader_poll_interval

    @invariant()
    def what_was_heard_is_delivered_once_and_in_order(self) -> None:
        if self.session.state == "established":
            assert self.delivered == self.heard
        elif self.session.state in ("listening", "proving"):
            assert self.delivered == []

    @invariant()
    def the_gap_is_told_once_it_is_established_again(self) -> None:
        if self.session.state == "established":
            assert not self.gap_due

    @invariant()
    def it_leads_only_while_established(self) -> None:
        assert self.session.leader is self.leading
        if self.leading:
            assert self.session.state == "established"

    @invariant()
    def it_is_on_its_way_to_what_is_wanted(self) -> None:
        if self.session.state == "established":
            assert self.session.listened_to == self.confirmed
            assert (
                self.session.wanted == self.confirmed
                or self.listen_pending
                or self.unlisten_pending
            )

    @invariant()
    def stopped_is_the_end(self) -> None:
        if self.stopped:
            assert self.session.state == "stopped"


class LeaderMachine(SessionMachine):
    wants_to_lead = True


TestRules = SessionMachine.TestCase
TestRules.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLeaderRules = LeaderMachine.TestCase
TestLeaderRules.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


# -- to established --------------------------------------------------------------------------


def test_established_comes_after_listen_and_a_proof_and_not_before() -> None:
    one = session("jobs", "shop.order")
    assert kinds(one.start(0)) == [Connect]
    assert one.connected(1) == [Listen(frozenset({"jobs", "shop.order"}))]
    assert one.listened(2, frozenset({"jobs", "shop.order"})) == [Echo("nonce-1")]
    assert one.state == "proving"
    assert one.echoed(3, "nonce-1") == [Established(frozenset({"jobs", "shop.order"}))]
    assert one.state == "established"


def test_a_first_connection_has_missed_nothing() -> None:
    assert Gap not in kinds(establish(session()))


def test_start_twice_connects_once() -> None:
    one = session()
    assert kinds(one.start(0)) == [Connect]
    assert one.start(0) == []


def test_what_is_heard_before_the_proof_is_held_and_delivered_behind_it() -> None:
    one = session()
    one.start(0)
    [listen] = one.connected(0)
    assert one.notified(0, ["early"]) == []
    assert isinstance(listen, Listen)
    echo = one.listened(0, listen.channels)
    assert one.notified(0, ["a", "b"]) == []
    commands = one.echoed(1, nonce_of(echo))
    assert kinds(commands) == [Established, Deliver]
    assert commands[-1] == Deliver(["early", "a", "b"])


def test_what_is_heard_before_the_proof_of_a_new_connection_comes_behind_the_gap() -> None:
    one = session()
    establish(one)
    one.failed(4, "cut")
    now = one.wake_at or 0
    one.tick(now)
    [listen] = one.connected(now)
    assert isinstance(listen, Listen)
    echo = one.listened(now, listen.channels)
    one.notified(now, ["held"])
    commands = one.echoed(now, nonce_of(echo))
    assert commands == [
        Gap(0.0, now, "cut"), Established(frozenset({"jobs"})), Deliver(["held"]),
    ]  # fmt: skip


def test_what_was_held_on_a_lost_connection_is_not_delivered_on_the_next() -> None:
    one = session()
    one.start(0)
    one.connected(0)
    one.notified(0, ["of the old connection"])
    one.failed(1, "cut")
    assert Deliver not in kinds(establish(one, one.wake_at or 0))


def test_an_echo_of_the_connection_before_proves_nothing() -> None:
    one = session()
    one.start(0)
    one.connected(0)
    old = nonce_of(one.listened(0, frozenset({"jobs"})))
    one.failed(1, "cut")
    now = one.wake_at or 0
    one.tick(now)
    one.connected(now)
    one.listened(now, frozenset({"jobs"}))
    assert one.echoed(now, old) == []
    assert one.state == "proving"


def test_a_connection_that_comes_after_giving_up_is_closed() -> None:
    one = session()
    one.start(0)
    assert kinds(one.tick(TIMING.connect_timeout)) == [Close, Lost]
    assert one.connected(TIMING.connect_timeout) == [Close()]
    assert one.state == "waiting"


# -- deadlines -------------------------------------------------------------------------------


def connecting(one: Session) -> float:
    one.start(0)
    return TIMING.connect_timeout


def listening(one: Session) -> float:
    one.start(0)
    one.connected(0)
    return TIMING.heartbeat_timeout


def proving(one: Session) -> float:
    one.start(0)
    one.connected(0)
    one.listened(0, frozenset({"jobs"}))
    return TIMING.heartbeat_timeout


def changing(one: Session) -> float:
    establish(one)
    assert kinds(one.want(0, ["jobs", "more"])) == [Listen]
    return TIMING.heartbeat_timeout


def dropping(one: Session) -> float:
    establish(one)
    assert kinds(one.want(0, [])) == [Unlisten]
    return TIMING.heartbeat_timeout


def beating(one: Session) -> float:
    establish(one)
    assert kinds(one.tick(TIMING.heartbeat_interval)) == [Echo]
    return TIMING.heartbeat_interval + TIMING.heartbeat_timeout


@pytest.mark.parametrize(
    "stage", [connecting, listening, proving, changing, dropping, beating],
    ids=lambda stage: stage.__name__,
)  # fmt: skip
def test_silence_ends_each_stage_at_its_deadline_and_not_before(
    stage: Callable[[Session], float],
) -> None:
    one = session()
    deadline = stage(one)
    state = one.state
    assert one.wake_at == deadline
    assert one.tick(deadline - 0.001) == []
    assert one.state == state
    commands = one.tick(deadline)
    assert kinds(commands) == [Close, Lost]
    assert one.state == "waiting"
    lost = commands[-1]
    assert isinstance(lost, Lost)
    assert lost.cause


def test_an_echo_that_never_comes_names_the_pooler() -> None:
    one = session()
    deadline = proving(one)
    lost = one.tick(deadline)[-1]
    assert isinstance(lost, Lost)
    assert "pooler" in lost.cause


def test_a_half_open_connection_is_found_within_one_interval_and_one_timeout() -> None:
    """It accepts what is sent, and never answers."""
    one = session()
    establish(one, 0)
    now = 0.0
    while one.state == "established":
        assert one.wake_at is not None
        now = one.wake_at
        one.tick(now)
    assert now <= TIMING.heartbeat_interval + TIMING.heartbeat_timeout


def test_notifications_do_not_stand_in_for_the_heartbeat() -> None:
    """They prove that we are sent to, not that LISTEN is still ours."""
    one = session()
    establish(one)
    one.notified(9.9, ["x"])
    assert kinds(one.tick(10)) == [Echo]


def test_heartbeats_go_on_for_ever() -> None:
    one = session()
    establish(one)
    for _ in range(1000):
        assert one.wake_at is not None
        beat(one, one.wake_at)
        assert one.state == "established"
    assert one.proven_at == 10_000.0


def test_only_one_heartbeat_is_on_its_way() -> None:
    one = session()
    establish(one)
    assert kinds(one.tick(10)) == [Echo]
    assert one.tick(12) == []


def test_a_tick_before_its_time_does_nothing() -> None:
    one = session()
    establish(one)
    assert one.tick(9.999) == []


# -- the server's own word -------------------------------------------------------------------


def test_a_server_that_forgot_a_channel_is_a_loss() -> None:
    one = session("a", "b")
    establish(one)
    echo = nonce_of(one.tick(10))
    commands = one.echoed(10, echo, frozenset({"a", "pgnotify.echo"}))
    assert kinds(commands) == [Close, Lost]
    lost = commands[-1]
    assert isinstance(lost, Lost)
    assert "b" in lost.cause


def test_a_server_that_listens_to_more_is_fine() -> None:
    one = session("a")
    establish(one)
    assert one.echoed(10, nonce_of(one.tick(10)), frozenset({"a", "pgnotify.echo"})) == []
    assert one.state == "established"


def test_a_channel_added_while_an_echo_is_on_its_way_is_not_taken_for_forgotten() -> None:
    """The list that comes with the echo is from before the LISTEN."""
    one = session("a")
    establish(one)
    echo = nonce_of(one.tick(10))
    listing = frozenset({"a"})
    assert kinds(one.want(10, ["a", "b"])) == [Listen]
    one.listened(10, frozenset({"b"}))
    one.echoed(10.1, echo, listing)
    assert one.state == "established"


# -- gaps ------------------------------------------------------------------------------------


def test_a_gap_reaches_from_the_last_proof_to_the_new_one_and_says_why() -> None:
    one = session()
    establish(one, 0)
    beat(one, 10)
    one.notified(12, ["seen"])
    one.failed(13, "the connection broke")
    now = (one.wake_at or 0) + 100
    assert establish(one, now)[0] == Gap(10.0, now, "the connection broke")


def test_attempts_that_fail_in_between_do_not_shorten_the_gap() -> None:
    one = session()
    establish(one, 0)
    one.failed(3, "cut")
    for _ in range(5):
        one.tick(one.wake_at or 0)
        one.failed(one.wake_at or 0, "refused")
    now = one.wake_at or 0
    [gap] = [command for command in establish(one, now) if isinstance(command, Gap)]
    assert (gap.since, gap.until) == (0.0, now)


def test_every_loss_is_a_gap_of_its_own() -> None:
    one = session()
    establish(one, 0)
    for number in range(5):
        one.failed((one.proven_at or 0) + 1, f"cut {number}")
        [gap] = [c for c in establish(one, (one.wake_at or 0) + 5) if isinstance(c, Gap)]
        assert gap.cause == f"cut {number}"


def test_the_gap_comes_after_listen_is_proven_and_before_anything_else() -> None:
    """Told earlier, a receiver could read a state that changes before we listen again."""
    one = session(wants_to_lead=True)
    establish(one)
    one.failed(1, "cut")
    now = one.wake_at or 0
    before = [*one.tick(now), *one.connected(now)]
    echo = one.listened(now, frozenset({"jobs"}))
    assert Gap not in kinds([*before, *echo])
    assert kinds(one.echoed(now, nonce_of(echo)))[0] is Gap


# -- backoff ---------------------------------------------------------------------------------


def delays(one: Session, number: int, now: float = 0.0) -> list[float]:
    found = []
    for _ in range(number):
        one.tick(max(now, one.wake_at or 0))
        now = max(now, one.wake_at or 0)
        lost = one.failed(now, "refused")[-1]
        assert isinstance(lost, Lost)
        assert one.wake_at == now + lost.retry_in
        found.append(lost.retry_in)
    return found


def test_attempts_go_on_for_ever_with_growing_pauses() -> None:
    one = session()
    one.start(0)
    one.failed(0, "refused")
    assert delays(one, 7) == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    delays(one, 500)
    assert one.state == "waiting"


def test_a_healthy_period_begins_a_new_series() -> None:
    one = session()
    one.start(0)
    one.failed(0, "refused")
    delays(one, 6)
    now = one.wake_at or 0
    establish(one, now)
    lost = one.failed(now + TIMING.heartbeat_interval, "cut")[-1]
    assert lost == Lost("cut", 1.0)


def test_a_connection_that_breaks_at_once_does_not_begin_a_new_series() -> None:
    """A server that accepts and drops everybody would otherwise be hammered."""
    one = session()
    one.start(0)
    one.failed(0, "refused")
    before = delays(one, 3)[-1]
    now = one.wake_at or 0
    establish(one, now)
    lost = one.failed(now + TIMING.heartbeat_interval - 0.001, "cut")[-1]
    assert lost == Lost("cut", before * 2)


def test_a_heartbeat_after_a_healthy_period_resets_too() -> None:
    one = session()
    one.start(0)
    one.failed(0, "refused")
    delays(one, 4)
    now = one.wake_at or 0
    establish(one, now)
    beat(one, now + TIMING.heartbeat_interval)
    assert one._backoff.attempts == 0


def test_heartbeats_can_be_asked_for_more_often_while_it_runs() -> None:
    one = session()
    one.beat_every(0, 4.0)
    assert one.wake_at is None
    establish(one, 10.0)
    assert one.wake_at == 14.0
    one.beat_every(11.0, 1.5)
    assert one.wake_at == 11.0
    beat(one, 11.0)
    assert one.wake_at == 12.5
    assert kinds(one.tick(12.5)) == [Echo]
    one.beat_every(12.5, 3.0)
    assert one.wake_at == 12.5 + TIMING.heartbeat_timeout, "it waits for the echo of this one"


# -- leadership ------------------------------------------------------------------------------


def test_who_does_not_want_to_lead_never_tries() -> None:
    one = session()
    assert TryLead not in kinds(establish(one))
    assert one.leadership_free(1) == []
    assert TryLead not in kinds(one.tick(10))


def test_a_session_tries_to_lead_before_it_says_established() -> None:
    """Whoever waits for it may publish at once, and expect the leader to act."""
    assert kinds(establish(session(wants_to_lead=True))) == [TryLead, Established]


def test_a_standby_tries_again_at_each_interval_and_at_once_when_told() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, False)
    assert one.wake_at == 1.0
    assert kinds(one.tick(1.0)) == [TryLead]
    one.led(1.0, False)
    assert kinds(one.leadership_free(1.2)) == [TryLead]
    assert one.wake_at == 2.2


def test_the_first_leader_has_missed_nothing() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    assert one.led(0, True) == [Lead()]
    assert one.leader


def test_a_leader_does_not_try_again() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, True)
    assert kinds(one.tick(10)) == [Echo]
    assert one.leadership_free(11) == []


def test_a_new_leader_tells_of_the_time_without_one() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, False, silent_for=0.25)
    one.tick(1)
    one.led(1, False, silent_for=0.5)
    one.tick(2)
    # What the former leader had read goes back to its last proof before its last sign of life.
    since = 1 - 0.5 - TIMING.proof_lag
    assert one.led(2, True) == [Lead(), Gap(since, 2, "the leader was gone", for_leader=True)]


def test_a_leader_of_whom_nothing_is_known_does_not_shorten_the_gap() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, False, silent_for=0.0)
    one.tick(1)
    one.led(1, False)
    one.tick(2)
    [_, gap] = one.led(2, True)
    assert isinstance(gap, Gap)
    assert gap.since == -TIMING.proof_lag


def test_a_standby_that_lost_its_connection_meanwhile_does_not_shorten_the_gap() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, False, silent_for=4.0)
    one.failed(1, "cut")
    now = one.wake_at or 0
    establish(one, now)
    [_, gap] = one.led(now, True)
    assert isinstance(gap, Gap)
    assert gap.since is not None
    assert gap.since <= -4.0


def test_a_leader_that_was_stopped_for_too_long_delivers_nothing_old() -> None:
    """Somebody else leads by then."""
    one = session(wants_to_lead=True)
    establish(one, 50)
    one.led(50, True)
    assert kinds(one.notified(50 + TIMING.proof_lag, ["fresh"])) == [Deliver]
    commands = one.notified(50 + TIMING.proof_lag + 0.001, ["old"])
    assert kinds(commands) == [Follow, Close, Lost]


def test_a_listener_that_cannot_know_what_was_before_it_says_so_where_asked() -> None:
    one = session(wants_to_lead=True, gap_on_start=True)
    commands = establish(one, 5)
    assert kinds(commands) == [Gap, TryLead, Established]
    gap = commands[0]
    assert isinstance(gap, Gap)
    assert (gap.since, gap.until, gap.for_leader) == (None, 5, False)
    [_, gap] = one.led(5, True)
    assert isinstance(gap, Gap)
    assert (gap.since, gap.for_leader) == (None, True)


def test_a_leader_that_lost_its_connection_is_none_and_tells_of_the_gap_when_it_leads_again() -> (
    None
):
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.led(0, True)
    assert kinds(one.failed(3, "cut")) == [Follow, Close, Lost]
    assert not one.leader
    now = one.wake_at or 0
    establish(one, now)
    assert one.led(now, True) == [Lead(), Gap(0, now, "cut", for_leader=True)]


def test_the_leader_lock_is_not_taken_for_won_on_a_connection_that_is_gone() -> None:
    one = session(wants_to_lead=True)
    establish(one, 0)
    one.failed(1, "cut")
    assert one.led(1, True) == []
    assert not one.leader


# -- channels --------------------------------------------------------------------------------


def test_channels_wanted_later_are_listened_to_one_statement_at_a_time() -> None:
    one = session("a")
    establish(one)
    assert one.want(1, ["a", "b", "c"]) == [Listen(frozenset({"b", "c"}))]
    assert one.want(1, ["b"]) == []
    commands = one.listened(2, frozenset({"b", "c"}))
    # What is about to be left is not announced.
    assert commands[0] == Established(frozenset({"b"}))
    assert commands[1] == Unlisten(frozenset({"a", "c"}))
    assert one.unlistened(3, frozenset({"a", "c"})) == [Established(frozenset({"b"}))]
    assert one.listened_to == {"b"}


def test_channels_wanted_while_connecting_are_not_forgotten() -> None:
    one = session("a")
    one.start(0)
    [listen] = one.connected(0)
    assert one.want(0, ["a", "b"]) == []
    assert isinstance(listen, Listen)
    echo = one.listened(0, listen.channels)
    assert one.echoed(0, nonce_of(echo))[-1] == Listen(frozenset({"b"}))


def test_a_new_connection_listens_to_what_is_wanted_now() -> None:
    one = session("a")
    establish(one)
    one.failed(1, "cut")
    one.want(1, ["x", "y"])
    one.tick(one.wake_at or 0)
    assert one.connected(5) == [Listen(frozenset({"x", "y"}))]


# -- the end ---------------------------------------------------------------------------------


def nothing(one: Session) -> None: ...


@pytest.mark.parametrize(
    "stage", [nothing, connecting, listening, proving, establish, changing, beating],
    ids=lambda stage: stage.__name__,
)  # fmt: skip
def test_stop_closes_from_any_state_and_is_final(stage: Callable[[Session], Any]) -> None:
    one = session()
    stage(one)
    assert kinds(one.stop(50)) == [Close]
    assert (one.state, one.wake_at) == ("stopped", None)
    assert one.stop(51) == []
    assert one.start(51) == []
    assert one.tick(1e9) == []
    assert one.failed(52, "late") == []
    assert one.notified(53, ["late"]) == []
    assert one.listened(54, frozenset({"jobs"})) == []
    assert one.unlistened(54, frozenset({"jobs"})) == []
    assert one.echoed(55, "nonce-1") == []
    assert one.led(56, True) == []
    assert one.leadership_free(56) == []
    assert one.want(57, ["x"]) == []
    assert one.state == "stopped"


def test_a_stopping_leader_follows_before_it_closes() -> None:
    one = session(wants_to_lead=True)
    establish(one)
    one.led(0, True)
    assert kinds(one.stop(1)) == [Follow, Close]


def test_commands_are_values() -> None:
    assert Gap(0, 1, "c") == Gap(0, 1, "c", for_leader=False)
    assert len({Connect(), Connect(), Close(), Echo("n"), Echo("n")}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Echo("n").nonce = "m"  # type: ignore[misc]
