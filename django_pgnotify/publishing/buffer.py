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

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import cast

from django.db.backends.base.base import BaseDatabaseWrapper

from ..wire import Outgoing

logger = logging.getLogger("django_pgnotify.publishing")

Send = Callable[[Sequence[Outgoing], str], None]

_Hook = tuple[set[str | None], Callable[[], None], bool]


class CommitBuffer:
    """The buffer of one Django connection.

    Args:
        connection: whose transactions the events belong to.
        send: sends events on an alias; whatever it raises is given to ``failed``.
        failed: told of events that could not be sent; must not raise.
    """

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        send: Send,
        failed: Callable[[Sequence[Outgoing], str, Exception], None],
    ) -> None:
        self.connection = connection
        self._send = send
        self._failed = failed
        self._released: list[tuple[str, Outgoing]] = []
        self._place = 0

    def add(self, event: Outgoing, using: str) -> None:
        """Send ``event`` on alias ``using`` after the commit; at once outside a transaction."""
        if not self.connection.in_atomic_block:
            self._released.append((using, event))
            self.flush()
            return
        savepoints = tuple(self.connection.savepoint_ids)
        hooks = _hooks(self.connection)
        run = _Run(self, savepoints, (using, event))
        release: _Hook = (set(savepoints), run.release, True)
        flush: _Hook = (set(), self.flush, True)
        if _in_testcase(self.connection):
            # captureOnCommitCallbacks() looks at hooks that were added at the end.
            hooks += [release, flush]
            return
        place = self._own_hooks(hooks)
        if place == 0:
            hooks[:0] = [release, flush]
            self._place = 2
            return
        latest = getattr(hooks[place - 2][1], "__self__", None) if place > 1 else None
        if isinstance(latest, _Run) and latest.savepoints == savepoints:
            latest.events.append((using, event))
        else:
            hooks.insert(place - 1, release)
            self._place = place + 1

    def _own_hooks(self, hooks: list[_Hook]) -> int:
        """How many hooks at the head of the list are ours; the last of them is ``flush``."""
        place = self._place
        if not (0 < place <= len(hooks) and hooks[place - 1][1] == self.flush):
            # Another transaction, or a savepoint took some of them with it.
            flushes = (n for n, hook in enumerate(hooks, 1) if hook[1] == self.flush)
            self._place = place = next(flushes, 0)
        return place

    def release(self, events: list[tuple[str, Outgoing]]) -> None:
        self._released += events

    def flush(self) -> None:
        """Send what has been released, alias by alias; never raises."""
        released, self._released = self._released, []
        for using, pairs in groupby(released, itemgetter(0)):
            events = [event for _, event in pairs]
            try:
                self._send(events, using)
            except Exception as exc:  # noqa: BLE001 - reported; the commit stands
                self._failed(events, using, exc)


class _Run:
    """Events published one after the other under the same savepoints."""

    def __init__(
        self, buffer: CommitBuffer, savepoints: tuple[str | None, ...], first: tuple[str, Outgoing]
    ) -> None:
        self.buffer = buffer
        self.savepoints = savepoints
        self.events = [first]

    def release(self) -> None:
        self.buffer.release(self.events)


def pending(connection: BaseDatabaseWrapper) -> list[tuple[str, Outgoing]]:
    """Events that would leave if the open transaction committed now, as (alias, event)."""
    events: list[tuple[str, Outgoing]] = []
    for _, hook, _ in _hooks(connection):
        if getattr(hook, "__func__", None) is _Run.release:
            events += hook.__self__.events  # type: ignore[attr-defined]
    return events


def _in_testcase(connection: BaseDatabaseWrapper) -> bool:
    blocks: list[object] = getattr(connection, "atomic_blocks", [])
    return bool(blocks) and getattr(blocks[0], "_from_testcase", False)


def _hooks(connection: BaseDatabaseWrapper) -> list[_Hook]:
    return cast("list[_Hook]", connection.run_on_commit)
