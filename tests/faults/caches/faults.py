"""What is done to a node: each fault begins, lasts, and ends."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from typing import ClassVar

from tests.faults.caches.nodes import Node

LONGEST = 3.2
"""Seconds: more than MAX_STALENESS, so that near caches have to be bypassed."""


class Fault:
    """One that befalls ``node``.

    Attributes:
        kind: what a person calls it.
        on_listener: whether it needs a node with a ``pglisten``.
        writer: the writer that it needs, if any.
    """

    kind: ClassVar[str]
    on_listener: ClassVar[bool] = False
    writer: ClassVar[str | None] = None

    def __init__(self, node: Node, chance: random.Random) -> None:
        self.node = node
        self.chance = chance
        self.duration = 0.0

    def __str__(self) -> str:
        return f"{self.kind} of {self.node.name} for {self.duration:.1f} s"

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """What lifts it."""

    def last(self) -> None:
        """Sometimes a moment, sometimes longer than a near cache may be believed."""
        self.duration = self.chance.choice((0.0, self.chance.uniform(0.05, LONGEST)))


class CutConnection(Fault):
    kind = "connection cut"

    def begin(self) -> None:
        self.node.listening.disconnect(reset=self.chance.random() < 0.5)


class RefuseConnections(Fault):
    kind = "connections refused"

    def begin(self) -> None:
        self.last()
        self.node.listening.close()

    def end(self) -> None:
        self.node.listening.open()


class Blackhole(Fault):
    """Frames come late, in one heap, or not at all."""

    kind = "black hole"

    def begin(self) -> None:
        self.last()
        self.node.listening.blackhole()

    def end(self) -> None:
        self.node.listening.resume()


class DropFrames(Fault):
    kind = "frames dropped"

    def begin(self) -> None:
        self.duration = self.chance.uniform(0.05, 1.0)
        self.node.listening.swallow()

    def end(self) -> None:
        self.node.listening.end_swallowing()


class TerminateBackend(Fault):
    kind = "backend terminated"

    def begin(self) -> None:
        self.node.deployment.terminate_backends(self.node.name)


class _ListenerFault(Fault):
    on_listener = True

    def signal(self, number: signal.Signals) -> None:
        assert self.node.listener is not None
        self.node.listener.signal(number)


class Freeze(_ListenerFault):
    """When it goes on, it reads frames and echoes of long ago."""

    kind = "listener stopped (SIGSTOP)"

    def begin(self) -> None:
        self.last()
        self.signal(signal.SIGSTOP)

    def end(self) -> None:
        self.signal(signal.SIGCONT)


class KillListener(_ListenerFault):
    kind = "listener killed"

    def begin(self) -> None:
        self.last()
        assert self.node.listener is not None
        self.node.listener.kill()

    def end(self) -> None:
        self.node.start_listener()


class TerminateListener(KillListener):
    kind = "listener terminated"

    def begin(self) -> None:
        self.last()
        assert self.node.listener is not None
        self.node.listener.terminate()


class SecondListener(_ListenerFault):
    """Two write to one table for a while; the elder is frozen meanwhile, and then the one left."""

    kind = "second listener, the first frozen"

    def begin(self) -> None:
        self.duration = self.chance.uniform(1.5, LONGEST)
        self.elder = self.node.listener
        self.signal(signal.SIGSTOP)
        self.younger = self.node.start_listener()

    def end(self) -> None:
        assert self.elder is not None
        self.elder.signal(signal.SIGCONT)
        self.younger.kill()
        self.node.listener = self.elder


class CutWriter(Fault):
    """A COMMIT may be in doubt, or a NOTIFY have no connection any more; many times over."""

    kind = "writers' connections cut"
    writer = "steady"

    def begin(self) -> None:
        for _ in range(12):
            self.node.writing.disconnect(reset=self.chance.random() < 0.5)
            time.sleep(self.chance.uniform(0.0, 0.15))


class KillWriter(Fault):
    """One whose NOTIFY is part of its transaction, so that nothing can come between."""

    kind = "writer killed"
    writer = "mortal"

    def begin(self) -> None:
        self.node.writers["mortal"].kill()

    def end(self) -> None:
        self.node.start_writer("mortal")


class FreezeReaders(Fault):
    """In the middle of whatever they do: what they had loaded is stored when they go on."""

    kind = "readers stopped (SIGSTOP)"

    def begin(self) -> None:
        self.last()
        for process in self.node.readers:
            os.killpg(process.pid, signal.SIGSTOP)

    def end(self) -> None:
        for process in self.node.readers:
            os.killpg(process.pid, signal.SIGCONT)


class FreezeWriters(Fault):
    """Between a COMMIT and what follows it, too."""

    kind = "writers stopped (SIGSTOP)"
    writer = "steady"

    def begin(self) -> None:
        self.last()
        for process in self.node.writers.values():
            process.signal(signal.SIGSTOP)

    def end(self) -> None:
        for process in self.node.writers.values():
            process.signal(signal.SIGCONT)


class RestartServer(Fault):
    kind = "server restarted"

    def begin(self) -> None:
        server = self.node.deployment.server
        server.stop(self.chance.choice(("fast", "immediate")))
        time.sleep(self.chance.choice((0.0, 0.5)))
        server.start()


KINDS: tuple[type[Fault], ...] = (
    CutConnection,
    RefuseConnections,
    Blackhole,
    DropFrames,
    TerminateBackend,
    Freeze,
    KillListener,
    TerminateListener,
    SecondListener,
    CutWriter,
    KillWriter,
    FreezeReaders,
    FreezeWriters,
    RestartServer,
)


def draw(nodes: list[Node], chance: random.Random, only: str = "") -> Iterator[Fault]:
    """Faults without end, every kind as often as any other.

    Raises:
        ValueError: no kind matches the regular expression ``only``.
    """
    kinds = [kind for kind in KINDS if re.search(only, kind.kind)]
    if not kinds:
        names = ", ".join(repr(kind.kind) for kind in KINDS)
        raise ValueError(f"no kind of fault matches {only!r}; there are {names}")
    while True:
        chance.shuffle(kinds)
        for kind in kinds:
            able = [n for n in nodes if not kind.on_listener or n.listener is not None]
            able = [n for n in able if kind.writer is None or kind.writer in n.writers]
            if able:
                yield kind(chance.choice(able), chance)
