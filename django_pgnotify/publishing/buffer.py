"""The commit buffer: events wait for COMMIT, vanish with their savepoint, and leave together.

Django keeps one list of commit hooks per connection, each with the savepoints it belongs to, and
drops a hook when one of its savepoints rolls back. The buffer adds two hooks per run of events:

``release``
    belongs to the savepoints that are open now, so it disappears with them; when it runs, its
    events are cleared to leave.
``flush``
    belongs to no savepoint, so only a full rollback removes it. The last of them in a transaction
    sends everything that was released.

That is why a thousand nested atomic blocks still leave in a handful of statements, in order. Which
hooks are pending is read off Django's list each time: a copy of our own could miss a rollback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
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

    def add(self, event: Outgoing, using: str) -> None:
        """Send ``event`` on alias ``using`` after the commit; at once outside a transaction."""
        if not self.connection.in_atomic_block:
            # A commit hook that publishes must not overtake what the transaction published.
            self._released.append((using, event))
            self.send_released()
            return
        savepoints = tuple(self.connection.savepoint_ids)
        latest = next(_runs(self.connection), None)
        if latest is not None and latest.is_open_for(savepoints):
            latest.events.append((using, event))
            return
        run = _Run(self, savepoints, (using, event))
        if latest is not None:
            latest.is_last = False
        self.connection.on_commit(run.release, robust=True)
        _hooks(self.connection).append((set(), run.flush, True))

    def release(self, events: list[tuple[str, Outgoing]]) -> None:
        self._released += events

    def send_released(self) -> None:
        """Send what has been released, alias by alias; never raises."""
        released, self._released = self._released, []
        for using, pairs in groupby(released, itemgetter(0)):
            events = [event for _, event in pairs]
            try:
                self._send(events, using)
            except Exception as exc:  # noqa: BLE001 - reported; the commit stands
                self._failed(events, using, exc)


class _Run:
    """Events published one after the other under the same savepoints, and their two hooks."""

    def __init__(
        self, buffer: CommitBuffer, savepoints: tuple[str | None, ...], first: tuple[str, Outgoing]
    ) -> None:
        self.buffer = buffer
        self.savepoints = savepoints
        self.events = [first]
        self.is_last = True

    def is_open_for(self, savepoints: tuple[str | None, ...]) -> bool:
        connection = self.buffer.connection
        return (
            savepoints == self.savepoints
            # Anything registered since must run after these events and before the next.
            and _hooks(connection)[-1][1] == self.flush
            # captureOnCommitCallbacks() sees only hooks that were added inside it.
            and not _in_testcase(connection)
        )

    def release(self) -> None:
        self.buffer.release(self.events)

    def flush(self) -> None:
        if self.is_last:
            self.buffer.send_released()


def _runs(connection: BaseDatabaseWrapper) -> Iterator[_Run]:
    """The runs pending on a connection, latest first, those of rolled-back savepoints included."""
    for _, hook, _ in reversed(_hooks(connection)):
        if getattr(hook, "__func__", None) is _Run.flush:
            yield hook.__self__  # type: ignore[attr-defined]


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
