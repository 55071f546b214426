"""The background sender: a thread that sends what was committed, so that no save waits for it.

One for each process, with connections of its own, started by the first event. An event leaves at
once when none has left in the last moments; what comes while a statement is in flight, or within
``PACE`` of the one before, leaves together. It keeps at what certainly was not sent: while the
database cannot be reached it waits and tries again. What was under way when a connection broke may
have arrived, so that is not repeated.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from ..at_end import at_end
from ..backoff import Backoff
from ..conf import conf
from ..exceptions import PublishError
from ..stats import publishing_stats
from .buffer import Noted, encoded, portions
from .sender import send_by_notify
from .unsent import report_unsent

logger = logging.getLogger("django_pgnotify.publishing")

EXIT_TIMEOUT = 5.0
"""Seconds that the end of a process waits for what has not been sent."""

PACE = 0.005
"""Seconds between two statements of a sender that is busy. To wake a thread for each save, and the
server and the listener with it, costs a process that saves without a pause more than the NOTIFY."""

_BACKOFF_BASE = 0.1
_BACKOFF_CAP = 5.0


# poll() where there is one: select() takes small file numbers only.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)

_Part = tuple[str, Sequence[Noted]]
"""An alias and events for it."""


class BackgroundSender:
    """Sends events in the order in which they were put, alias by alias. Any thread may put."""

    _changed: threading.Condition
    _queue: deque[_Part]
    _under_way: deque[_Part]
    _waiting: int
    _idle: bool
    _stopping: bool
    _thread: threading.Thread | None
    _given_up: threading.Thread | None
    _closes_at_exit: bool
    _ended: bool
    _used: dict[str, BaseDatabaseWrapper]

    def __init__(self) -> None:
        self._inherited: list[Any] = []
        self._begin_anew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def put(self, events: Sequence[Noted], using: str) -> bool:
        """Have events sent; those that there is no room for are counted and logged.

        False, and nothing done, where there can be no thread: the process is ending, or has none.
        """
        with self._changed:
            if self._ended:
                return False
            if self._thread is not None and not self._thread.is_alive():
                self._bury()
            room = max(0, conf.QUEUE_MAX_EVENTS - self._waiting)
            if events[:room]:
                self._queue.append((using, events[:room]))
                self._waiting += len(events[:room])
            if self._idle:
                self._idle = False
                self._changed.notify_all()
            if self._thread is None and not self._start():
                self._queue.clear()
                self._waiting = 0
                return False
        if events[room:]:
            full = PublishError(f"{conf.QUEUE_MAX_EVENTS} events wait for the background sender")
            report_unsent(encoded(events[room:]), using, full)
        return True

    def flush(self, timeout: float) -> bool:
        """Wait until everything put so far has been sent or given up; tells whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, timeout)

    def close(self, timeout: float = EXIT_TIMEOUT) -> None:
        """Send what waits, within ``timeout`` seconds, and end the thread. It may be used again."""
        with self._changed:
            thread, self._stopping = self._thread, True
            self._idle = False
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout)
        with self._changed:
            self._stopping = False
            if self._thread is not thread:
                return  # put() has started another one, because this one had ended
            self._thread = None
            if thread is not None and thread.is_alive():
                self._given_up = thread
            elif not self._under_way and self._queue and self._start():
                return  # they were put while the thread was ending
            left = [*self._under_way, *self._queue]
            self._queue, self._under_way = deque(), deque()
            self._waiting = 0
            self._changed.notify_all()  # flush() has nothing to wait for
        for using, events in left:
            late = PublishError(f"not done {timeout:g} s after the process was told to end")
            report_unsent(encoded(events), using, late)

    def _close_at_exit(self) -> None:
        with self._changed:
            self._ended = True
        self.close()

    def _bury(self) -> None:
        """Make room for another thread: this one has ended, perhaps by an error."""
        self._thread = None
        self._waiting -= sum(len(events) for _, events in self._under_way)
        self._under_way.clear()

    def _start(self) -> bool:
        thread = threading.Thread(
            target=self._run, args=(self._given_up,), name="pgnotify-sender", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:
            logger.warning("The background sender cannot be started: %s", exc)
            return False
        self._thread, self._given_up = thread, None
        if not self._closes_at_exit:
            self._closes_at_exit = True
            at_end(self._close_at_exit)
        return True

    def _begin_anew(self) -> None:
        self._changed = threading.Condition()
        self._queue = deque()
        self._under_way = deque()
        self._waiting = 0
        self._idle = False
        self._stopping = False
        self._thread = self._given_up = None
        self._closes_at_exit = False
        self._ended = False
        self._used = {}

    def _forked(self) -> None:
        """In a child: what waits is the parent's to send, and so are its connections."""
        # To collect a connection could end the parent's session.
        self._inherited += self._used.values()
        self._begin_anew()

    # -- the thread -------------------------------------------------------------------------

    def _run(self, predecessor: threading.Thread | None) -> None:
        if predecessor is not None:
            predecessor.join()  # what it has under way must not be overtaken
        paced_until = 0.0
        try:
            while True:
                with self._changed:
                    pause = max(0.0, paced_until - time.monotonic())
                    self._changed.wait_for(self._is_to_end, pause)
                    while not self._queue and not self._is_to_end():
                        self._idle = True
                        self._changed.wait()
                    if self._is_given_up() or not self._queue:
                        return
                    self._under_way, self._queue = self._queue, deque()
                    batch = list(self._under_way)
                for using, parts in groupby(batch, itemgetter(0)):
                    self._send([event for _, events in parts for event in events], using)
                paced_until = time.monotonic() + PACE
                with self._changed:
                    if self._is_given_up():
                        return
                    self._waiting -= sum(len(events) for _, events in self._under_way)
                    self._under_way.clear()
                    self._changed.notify_all()
        finally:
            connections.close_all()

    def _is_to_end(self) -> bool:
        return self._stopping or self._is_given_up()

    def _is_given_up(self) -> bool:
        return self._thread is not threading.current_thread()

    def _send(self, noted: Sequence[Noted], using: str) -> None:
        for part in portions(noted):
            if self._is_given_up():
                return  # close() has reported them
            events = encoded(part)
            try:
                self._connect(using)
                if self._is_given_up():
                    return
                send_by_notify(events, using)
            except Exception as exc:  # noqa: BLE001 - reported; the commits stand
                report_unsent(events, using, exc)
                connections[using].close()

    def _connect(self, using: str) -> None:
        """Connect where need be, for as long as it takes; once the process ends, one attempt."""
        connection = self._used[using] = connections[using]
        if connection.connection is not None and _has_ended(connection.connection):
            connection.close()
        backoff = Backoff(_BACKOFF_BASE, _BACKOFF_CAP)
        while connection.connection is None:
            try:
                connection.ensure_connection()
            except Error as exc:
                if self._is_to_end():
                    raise
                logger.warning("The background sender waits for database %r: %s", using, exc)
                publishing_stats.add("sender_waited")
                with self._changed:
                    self._changed.wait_for(self._is_to_end, backoff.next())
        if not connection.get_autocommit():
            connection.set_autocommit(True)  # whatever AUTOCOMMIT says: nobody commits here


def _has_ended(raw: Any) -> bool:
    """Whether the server has closed an idle connection: its socket has something to read."""
    with _Selector() as selector:
        selector.register(raw.fileno(), selectors.EVENT_READ)
        return bool(selector.select(0))


sender = BackgroundSender()
"""The sender of this process."""
