"""The faults. Each begins, is endured for its duration, and ends; all are drawn from one seed."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from tests.faults.cluster import Cluster, Running, Slot
from tests.faults.publisher import Publisher

DEADLINE = 1.5
"""Seconds after which a silent leader is replaced: heartbeat interval and twice its timeout."""


@dataclass
class Scene:
    """Where a fault takes place."""

    cluster: Cluster
    publisher: Publisher
    random: random.Random


@dataclass
class Fault:
    """One fault.

    ``role`` says whom it hits: the leader, a standby, all listeners, or nobody in particular.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("leader", "standby")
    ends_last: ClassVar[bool] = False
    """Whether it ends with a new process, once everything else is as it was."""

    scene: Scene
    role: str
    slots: list[Slot] = field(default_factory=list)
    duration: float = 0.0

    def __str__(self) -> str:
        who = f" ({', '.join(slot.name for slot in self.slots)})" if self.slots else ""
        return f"{self.label}{who}"

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.role}" if self.role else self.kind

    def aim(self) -> None:
        """Choose the targets, as the roles are distributed now."""
        slots, leader = self.scene.cluster.slots, self.scene.cluster.leader()
        if self.role == "leader":
            self.slots = [leader or slots[0]]
        elif self.role == "standby":
            self.slots = [self.scene.random.choice([s for s in slots if s is not leader])]
        elif self.role == "all":
            self.slots = list(slots)

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def _uniform(self, low: float, high: float) -> float:
        return self.scene.random.uniform(low, high)

    def _sometimes_short(self) -> float:
        """Mostly long enough to be found out, sometimes over before the deadline."""
        if self.scene.random.random() < 0.25:
            return self._uniform(0.1, DEADLINE - 0.6)
        return self._uniform(DEADLINE + 0.2, DEADLINE + 1.2)


class TerminateBackend(Fault):
    kind = "pg_terminate_backend"

    def begin(self) -> None:
        for slot in self.slots:
            self.scene.cluster.terminate_backend(slot)


class KillServer(Fault):
    kind = "server SIGKILL + restart"
    roles = ("",)

    def begin(self) -> None:
        self.scene.cluster.server.kill()

    def end(self) -> None:
        self.scene.cluster.server.start()


class DropConnection(Fault):
    """The proxy closes what is open, half of the time with RST; new connections are served."""

    kind = "proxy close"
    roles = ("leader", "standby", "all")

    def begin(self) -> None:
        for slot in self.slots:
            slot.proxy.disconnect(reset=self.scene.random.random() < 0.5)


class RefuseConnection(Fault):
    kind = "proxy close + refuse"

    def aim(self) -> None:
        super().aim()
        self.duration = self._uniform(0.2, 1.5)

    def begin(self) -> None:
        for slot in self.slots:
            slot.proxy.close(reset=True)

    def end(self) -> None:
        for slot in self.slots:
            slot.proxy.open()


class Blackhole(Fault):
    kind = "proxy blackhole"
    roles = ("leader", "standby", "all")

    def aim(self) -> None:
        super().aim()
        self.duration = self._sometimes_short()

    def begin(self) -> None:
        for slot in self.slots:
            slot.proxy.blackhole()

    def end(self) -> None:
        for slot in self.slots:
            slot.proxy.resume()


class Freeze(Fault):
    kind = "SIGSTOP + SIGCONT"

    def aim(self) -> None:
        super().aim()
        self.duration = self._sometimes_short()
        self.frozen = [slot.running for slot in self.slots if slot.running is not None]

    def begin(self) -> None:
        for running in self.frozen:
            self.scene.cluster.signal(running, signal.SIGSTOP)

    def end(self) -> None:
        for running in self.frozen:
            self.scene.cluster.signal(running, signal.SIGCONT)


class _EndProcess(Fault):
    ends_last = True

    def aim(self) -> None:
        super().aim()
        self.ending: list[Running] = [s.running for s in self.slots if s.running is not None]

    def end(self) -> None:
        for running in self.ending:
            # Where two faults have ended the same process, there is one successor.
            if running.slot.running is running:
                running.slot.start()


class KillListener(_EndProcess):
    kind = "listener SIGKILL + restart"

    def begin(self) -> None:
        for running in self.ending:
            running.end("killed")


class TerminateListener(_EndProcess):
    kind = "listener SIGTERM + restart"

    def begin(self) -> None:
        for running in self.ending:
            running.life.ended_at = min(running.life.ended_at, time.time())
            self.scene.cluster.signal(running, signal.SIGTERM)

    def end(self) -> None:
        for running in self.ending:
            running.end("terminated")
        super().end()


class TerminateInBlackhole(TerminateListener):
    """The leader is told to go when its network has just been cut: the hand-over arrives late."""

    kind = "listener SIGTERM in a blackhole"
    roles = ("leader",)

    def aim(self) -> None:
        super().aim()
        self.duration = self._uniform(0.1, 1.3)

    def begin(self) -> None:
        for slot in self.slots:
            slot.proxy.blackhole()
        time.sleep(self._uniform(0.0, 0.1))
        super().begin()

    def end(self) -> None:
        for slot in self.slots:
            slot.proxy.resume()
        super().end()


class Raise(Fault):
    """A receiver raises for a hundred events in a row."""

    kind = "receiver raising"
    roles = ("",)

    def begin(self) -> None:
        self.scene.publisher.burst(100, raising=True)


class Flood(Fault):
    kind = "flood"
    roles = ("",)

    def begin(self) -> None:
        self.scene.publisher.burst(self.scene.random.randint(2_000, 8_000))


KINDS: tuple[type[Fault], ...] = (
    TerminateBackend,
    KillServer,
    DropConnection,
    RefuseConnection,
    Blackhole,
    Freeze,
    KillListener,
    TerminateListener,
    TerminateInBlackhole,
    Raise,
    Flood,
)

Round = list[Callable[[Scene], Fault]]


def draw(count: int, chance: random.Random, pairs: float, only: str = "") -> list[Round]:
    """Rounds with ``count`` faults in all, every kind and role as often as any other.

    ``pairs`` is the share of the rounds in which two faults overlap; ``only`` is a regular
    expression that chooses among the kinds.
    """
    each = [(kind, role) for kind in KINDS for role in kind.roles if re.search(only, kind.kind)]
    if not each:
        kinds = ", ".join(repr(kind.kind) for kind in KINDS)
        raise ValueError(f"no kind of fault matches {only!r}; there are {kinds}")
    bag: list[tuple[type[Fault], str]] = []
    while len(bag) < count:
        chance.shuffle(each)
        bag += each
    bag = bag[:count]
    rounds: list[Round] = []
    while bag:
        size = 2 if len(bag) > 1 and chance.random() < pairs else 1
        rounds.append([_maker(*bag.pop()) for _ in range(size)])
    return rounds


def _maker(kind: type[Fault], role: str) -> Callable[[Scene], Fault]:
    return lambda scene: kind(scene, role)
