"""The commit buffer: events wait for COMMIT, vanish with their savepoint, and leave together.

Django keeps one list of commit hooks per connection, each with the savepoints it belongs to, and
drops a hook when one of its savepoints rolls back. The buffer has its hooks at the head of it:

``release``, one for each run of events published under the same savepoints
    belongs to those savepoints, so it disappears with them; when it runs, its events are cleared
    to leave.
``flush``, one behind all of them
    belongs to no savepoint, so only a full rollback removes it. It sends what was released.

That is why a thousand nested atomic blocks still leave in a handful of statements, in order, and
before a commit hook of somebody else can fail and have Django drop the hooks behind it. Which
hooks are pending is read off Django's list each time: a copy of our own could miss a rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol, cast

from django.db.backends.base.base import BaseDatabaseWrapper

from ..wire import Outgoing

FIRST_PORTION = 250
LAST_PORTION = 2000


class Unencoded(Protocol):
    """An event that is encoded when it leaves; what it says is settled."""

    def encode(self) -> Outgoing | None:
        """The event as it is sent; None where it cannot be, which it has reported."""


Noted = Outgoing | Unencoded
Send = Callable[[Sequence[Noted], str], None]

_Hook = tuple[set[str | None], Callable[[], None], bool]


class CommitBuffer:
    """The buffer of one Django connection.

    Args:
        connection: whose transactions the events belong to.
        send: sends events on an alias; must not raise, because the commit stands.
        committed: told of runs whose commit nobody else has told of; must not raise either.
    """

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        send: Send,
        committed: Callable[[Sequence[Run]], None] = lambda runs: None,
    ) -> None:
        self.connection = connection
        self._send = send
        self._committed = committed
        self.released: list[Run] = []
        self.by_hand: list[Noted] = []
        """Events that have left in a transaction that Django knows nothing of."""
        self._flush = self.flush  # one object, so that a look tells which hook is ours
        self._place = 0
        """How many hooks at the head of the list are ours; the last of them is ``flush``."""

    def add(self, event: Noted, using: str) -> None:
        """Send ``event`` on alias ``using`` after the commit; at once outside a transaction."""
        connection = self.connection
        if not connection.in_atomic_block:
            self._committed([Run(self, [], using, event)])
            self._send([event], using)
            return
        self.run_for(using).events.append(event)

    def sent(self, event: Noted, using: str) -> None:
        """Note an event of the open transaction that has left, for what its commit means."""
        self.run_for(using).sent.append(event)

    def run_for(self, using: str) -> Run:
        """The run that an event belongs to which is published now; there must be a transaction."""
        connection = self.connection
        hooks = _hooks(connection)
        if _in_testcase(connection):
            # captureOnCommitCallbacks() looks at hooks that were added at the end.
            run = Run(self, connection.savepoint_ids, using)
            hooks += self._hooks_of(run)
            return run
        place = self._place
        if not (0 < place <= len(hooks) and hooks[place - 1][1] is self._flush):
            # Another transaction, or a savepoint took some of our hooks with it.
            flushes = (n for n, hook in enumerate(hooks, 1) if hook[1] is self._flush)
            self._place = place = next(flushes, 0)
        last: Any = getattr(hooks[place - 2][1], "__self__", None) if place > 1 else None
        if (
            type(last) is Run
            and last.using == using
            and last.savepoints == connection.savepoint_ids
        ):
            return last
        run = Run(self, connection.savepoint_ids, using)
        if place == 0:
            hooks[:0] = self._hooks_of(run)
            self._place = 2
        else:
            hooks.insert(place - 1, self._hooks_of(run)[0])
            self._place = place + 1
        return run

    def _hooks_of(self, run: Run) -> list[_Hook]:
        """The hooks of a new run: its release, and the flush behind it."""
        return [(set(run.savepoints), run.release, True), (set(), self._flush, True)]

    def flush(self) -> None:
        """Send what has been released, alias by alias."""
        released, self.released = self.released, []
        if any(not run.told for run in released):
            self._committed([run for run in released if not run.told])
        for using, runs in groupby(released, attrgetter("using")):
            events = [event for run in runs for event in run.events]
            if events:
                self._send(events, using)


class Run:
    """Events for one alias, published one after the other under the same savepoints.

    Attributes:
        events: that are still to be sent.
        sent: that left inside the transaction.
        told: whether somebody has been told of the commit of its events.
    """

    def __init__(
        self, buffer: CommitBuffer, savepoints: list[str], using: str, *events: Noted
    ) -> None:
        self.buffer = buffer
        self.savepoints = savepoints.copy()
        self.using = using
        self.events = list(events)
        self.sent: list[Noted] = []
        self.told = False

    def release(self) -> None:
        self.buffer.released.append(self)


def pending(connection: BaseDatabaseWrapper) -> list[tuple[str, Outgoing]]:
    """Events that would leave if the open transaction committed now, as (alias, event)."""
    events: list[tuple[str, Outgoing]] = []
    for run in runs_of(connection):
        sent = encoded(run.events)
        run.events[:] = sent
        events += [(run.using, event) for event in sent]
    return events


def runs_of(connection: BaseDatabaseWrapper) -> list[Run]:
    """The events that would leave if the open transaction committed now, run by run."""
    owners = (getattr(hook[1], "__self__", None) for hook in _hooks(connection))
    return [owner for owner in owners if isinstance(owner, Run)]


def encoded(events: Sequence[Noted]) -> list[Outgoing]:
    """``events`` as they are sent."""
    found = (event if isinstance(event, Outgoing) else event.encode() for event in events)
    return [event for event in found if event is not None]


def portions(events: Sequence[Noted]) -> Iterator[Sequence[Noted]]:
    """``events`` in portions to encode and send one after the other.

    Small ones first, so that a listener works on the beginning of a large transaction while the
    rest is encoded.
    """
    begin, size = 0, FIRST_PORTION
    while begin < len(events):
        yield events[begin : begin + size]
        begin, size = begin + size, min(size * 2, LAST_PORTION)


def _in_testcase(connection: BaseDatabaseWrapper) -> bool:
    blocks: list[object] = getattr(connection, "atomic_blocks", [])
    return bool(blocks) and getattr(blocks[0], "_from_testcase", False)


def _hooks(connection: BaseDatabaseWrapper) -> list[_Hook]:
    return cast("list[_Hook]", connection.run_on_commit)
