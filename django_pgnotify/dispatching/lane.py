"""A lane: the events that wait for one receiver, and the rule which of them may run next.

Pure scheduling; who calls the receiver lives in ``runner``. Events with the same key run one
after the other, in order; with ``concurrency`` 1 all events do. A gap marker runs alone: after
everything before it, before anything behind it. Any thread may take and finish.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..events import Event
from ..registry import Receiver


class _Waiting(NamedTuple):
    event: Event
    size: int


class Lane:
    """The queue of one receiver.

    Args:
        receiver: whose lane it is.
        max_waiting: how many events may wait.
        max_bytes: how many bytes of payload they may have come in together.
    """

    def __init__(self, receiver: Receiver, max_waiting: int, max_bytes: int) -> None:
        self.receiver = receiver
        self.max_waiting = max_waiting
        self.max_bytes = max_bytes
        self.coalesced = 0
        """Updates that a later change of the same row has replaced while they waited."""
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._parked: dict[str, deque[_Waiting]] = {}
        self._busy: set[str] = set()
        self._waiting = 0
        self._bytes = 0
        self._workers = 0
        self._running = 0
        self._in_gap = False

    def put(self, events: Sequence[Event], size: int = 0) -> int:
        """Queue events in order; returns how many of the last ones there was no room for.

        Where there is too little room, updates of a row that is updated or deleted again later
        in the queue give way first.

        Args:
            size: bytes of payload the events came in.
        """
        share = size // len(events) if events else 0
        with self._lock:
            for event in events:
                self._queue.append(_Waiting(event, share))
            self._waiting += len(events)
            self._bytes += share * len(events)
            if self._fits():
                return 0
            self._coalesce()
            dropped = 0
            while dropped < len(events) and self._queue and not self._fits():
                if self._queue[-1].event.action == "gap":
                    break  # it is there so that nothing is lost in silence
                self._forget(self._queue.pop())
                dropped += 1
            return dropped

    def put_gap(self, event: Event) -> None:
        """Queue a gap marker; there is always room for one."""
        with self._lock:
            self._queue.append(_Waiting(event, 0))
            self._waiting += 1

    def hire(self) -> int:
        """How many more workers the queue is worth now; each must call :meth:`take`."""
        with self._lock:
            if not self._queue or self._held_up():
                return 0
            wanted = min(self.receiver.concurrency - self._workers, len(self._queue))
            if self._queue[0].event.action == "gap":
                wanted = min(wanted, 1)
            self._workers += max(0, wanted)
            return max(0, wanted)

    def take(self) -> Event | None:
        """The next event that may run, for a hired worker; None dismisses the worker."""
        with self._lock:
            while self._queue and not self._held_up():
                waiting = self._queue.popleft()
                event = waiting.event
                if event.action == "gap":
                    self._in_gap = True
                elif event.key is not None:
                    if event.key in self._busy:
                        self._parked.setdefault(event.key, deque()).append(waiting)
                        continue
                    self._busy.add(event.key)
                self._forget(waiting)
                self._running += 1
                return event
            self._workers -= 1
            return None

    def done(self, event: Event) -> None:
        """``event`` has been handled; the next one of its key may run."""
        with self._lock:
            self._running -= 1
            if event.action == "gap":
                self._in_gap = False
            elif event.key is not None:
                self._busy.discard(event.key)
                self._queue.extendleft(reversed(self._parked.pop(event.key, ())))

    def leave(self) -> None:
        """A hired worker goes without having been dismissed by :meth:`take`."""
        with self._lock:
            self._workers -= 1

    def clear(self) -> int:
        """Forget what waits; returns how many events that were."""
        with self._lock:
            dropped, self._waiting, self._bytes = self._waiting, 0, 0
            self._queue.clear()
            self._parked.clear()
            return dropped

    @property
    def waiting(self) -> int:
        """Events that wait to be run."""
        return self._waiting

    @property
    def running(self) -> int:
        """Events that run now."""
        return self._running

    @property
    def idle(self) -> bool:
        with self._lock:
            return self._waiting == 0 and self._running == 0 and self._workers == 0

    def _held_up(self) -> bool:
        """Whether nothing may start: a gap runs, or is next and something before it still runs."""
        return self._in_gap or (self._queue[0].event.action == "gap" and self._running > 0)

    def _fits(self) -> bool:
        return self._waiting <= self.max_waiting and self._bytes <= self.max_bytes

    def _forget(self, waiting: _Waiting) -> None:
        self._waiting -= 1
        self._bytes -= waiting.size

    def _coalesce(self) -> None:
        """Drop updates that the same row's later update or deletion has made old news."""
        kept: deque[_Waiting] = deque()
        superseded: set[str] = set()
        for waiting in reversed(self._queue):
            event = waiting.event
            if event.action == "gap":
                superseded.clear()  # nothing may move across the marker
            if event.action == "updated" and event.key in superseded:
                self._forget(waiting)
                self.coalesced += 1
                continue
            if event.action in ("updated", "deleted") and event.key is not None:
                superseded.add(event.key)
            kept.appendleft(waiting)
        self._queue = kept
