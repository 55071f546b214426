"""The announcer: a thread that tells all nodes what is stale, for as long as it takes.

For what no event in a NOTIFY tells of: keys that were changed in a cache with a second level, and
rows whose NOTIFY failed after their commit. Names are idempotent, so unlike events they are sent
again until it is known that they have arrived. The thread has a connection of its own, so what it
sends is not part of anybody's transaction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from django.db import Error, connections

from ..at_end import at_end
from ..backoff import Backoff
from ..conf import conf
from ..epochs.names import EVERYTHING, INVALIDATIONS
from ..epochs.node import node_table
from ..epochs.rules import announcement
from ..events import new_event_id
from ..wire import Outgoing, encode_event
from .plain import ENCODER
from .sender import send_by_notify

logger = logging.getLogger("django_pgnotify.caching")

MOST_NAMES = 10_000
"""Names that may wait to be announced. Beyond them everything is stale, which is one name."""

NAMES_PER_EVENT = 50
EXIT_TIMEOUT = 5.0
"""Seconds that the end of a process waits for what has not been announced."""

_IDLE_FOR = 1.0
_BACKOFF_BASE, _BACKOFF_CAP = 0.1, 5.0

_IS_GONE = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"


class Announcer:
    """Sends names in the order in which they were put, roughly. Any thread may put."""

    _changed: threading.Condition
    _names: dict[str, None]
    _doubtful: list[tuple[int, frozenset[str]]]
    _in_hand: int
    _ending: bool
    _thread: threading.Thread | None
    _used: dict[threading.Thread, Any]

    def __init__(self) -> None:
        self._inherited: list[Any] = []
        self._used = {}
        self._registered = False
        self._changed = threading.Condition()
        self._begin_anew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def put(self, names: Iterable[str], *, behind: int | None = None) -> None:
        """Have ``names`` announced.

        Args:
            behind: pid of a server process that may still be carrying out the commit that they
                are about; they are announced, and bumped here again, once it is gone.
        """
        with self._changed:
            if behind is not None:
                self._doubtful.append((behind, frozenset(names)))
            else:
                self._names.update(dict.fromkeys(names))
            if len(self._names) > MOST_NAMES:
                self._names = {EVERYTHING: None}
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._start()

    def flush(self, timeout: float) -> bool:
        """Wait until everything put so far has been sent; tells whether it was."""
        with self._changed:
            return self._changed.wait_for(self._is_done, timeout)

    def close(self, timeout: float = EXIT_TIMEOUT) -> None:
        """Send what waits, within ``timeout`` seconds, and end the thread. It may be used again."""
        with self._changed:
            thread, self._ending = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout)
        with self._changed:
            if thread is not None and self._thread is not thread:
                self._ending = False
                return  # put() has started another one, because this one had ended
            left = self._in_hand + _count(self._names, self._doubtful)
            if left:
                logger.error("%d invalidation(s) could not be told to other nodes", left)
            self._begin_anew()
            self._changed.notify_all()

    def _begin_anew(self) -> None:
        self._names = {}
        self._doubtful = []
        self._in_hand = 0
        self._ending = False
        self._thread = None  # one that still runs sees that it was given up

    def _forked(self) -> None:
        """In a child: what waits is the parent's to send, and so is its connection."""
        self._inherited += self._used.values()
        self._used = {}
        self._registered = False
        self._changed = threading.Condition()  # another thread of the parent may have held it
        self._begin_anew()

    def _has_work(self) -> bool:
        return bool(self._names or self._doubtful)

    def _is_done(self) -> bool:
        return not self._has_work() and not self._in_hand

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="pgnotify-announcer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:  # the process is ending
            logger.error("%d invalidation(s) cannot be told any more: %s", len(self._names), exc)
            self._thread = None
        if not self._registered:
            self._registered = True
            at_end(self.close)

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(_BACKOFF_BASE, _BACKOFF_CAP)
        try:
            while True:
                with self._changed:
                    waited = self._changed.wait_for(self._wakes, _IDLE_FOR)
                    if not waited:
                        self._disconnect()
                        self._changed.wait_for(self._wakes)
                    if self._is_given_up():
                        return
                    if not self._has_work():
                        self._thread = None
                        return
                    names, self._names = self._names, {}
                    doubtful, self._doubtful = self._doubtful, []
                    self._in_hand = _count(names, doubtful)
                waiting, again = doubtful, names
                try:
                    waiting, again = self._send(names, doubtful), {}
                    backoff.reset()
                except Exception as exc:
                    if not isinstance(exc, Error):
                        logger.exception("Invalidations could not be announced")
                    else:
                        logger.warning("Invalidations wait for the database: %s", exc)
                    self._disconnect()
                finally:
                    with self._changed:
                        if not self._is_given_up():  # else close() has told of them
                            self._names = again | self._names
                            self._doubtful += waiting
                            self._in_hand = 0
                            self._changed.notify_all()
                with self._changed:
                    if self._has_work() and self._ending:
                        return
                    if self._has_work():
                        self._changed.wait_for(self._is_to_end, backoff.next())
        finally:
            self._disconnect()

    def _is_given_up(self) -> bool:
        return self._thread is not threading.current_thread()

    def _is_to_end(self) -> bool:
        return self._ending or self._is_given_up()

    def _wakes(self) -> bool:
        return self._has_work() or self._is_to_end()

    def _send(
        self, names: dict[str, None], doubtful: list[tuple[int, frozenset[str]]]
    ) -> list[tuple[int, frozenset[str]]]:
        """Announce names, and those in doubt whose outcome is settled; returns the others."""
        connection = self._used[threading.current_thread()] = connections[conf.DATABASE]
        if connection.vendor != "postgresql":
            return []  # nobody can be told, as a system check says
        connection.ensure_connection()
        if not connection.get_autocommit():
            connection.set_autocommit(True)
        settled, waiting = set(names), []
        for pid, those in doubtful:
            with connection.cursor() as cursor:
                cursor.execute(_IS_GONE, [pid])
                [gone] = cursor.fetchone()
            if gone:
                # What was loaded meanwhile may be what the commit has replaced.
                node_table().bump(those)
                settled |= those
            else:
                waiting.append((pid, those))
        if settled:
            send_by_notify(_events(sorted(settled)), conf.DATABASE)
        return waiting

    def _disconnect(self) -> None:
        connection = self._used.pop(threading.current_thread(), None)
        if connection is not None:
            connection.close()


def _count(names: dict[str, None], doubtful: list[tuple[int, frozenset[str]]]) -> int:
    return len(names) + sum(len(those) for _, those in doubtful)


def _events(names: list[str]) -> list[Outgoing]:
    table = node_table()
    return [
        encode_event(
            INVALIDATIONS,
            "published",
            data=announcement(names[start : start + NAMES_PER_EVENT], table),
            at=time.time(),
            encoder=ENCODER,
            event_id=new_event_id(),
        )
        for start in range(0, len(names), NAMES_PER_EVENT)
    ]


announcer = Announcer()
"""The announcer of this process."""
