"""A lane: the events that wait for one receiver, and the rule which of them may run next.

Pure scheduling; who calls the receiver lives in ``runner``. Events with the same key run one
after the other, in order; with ``concurrency`` 1 all events do. Any thread may take and finish.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from ..events import Event
from ..registry import Receiver


class Lane:
    """The queue of one receiver.

    Args:
        receiver: whose lane it is.
        max_waiting: how many events may wait; further ones are refused.
    """

    def __init__(self, receiver: Receiver, max_waiting: int) -> None:
        self.receiver = receiver
        self.max_waiting = max_waiting
        self._lock = threading.Lock()
        self._queue: deque[Event] = deque()
        self._parked: dict[str, deque[Event]] = {}
        self._busy: set[str] = set()
        self._waiting = 0
        self._workers = 0
        self._running = 0

    def put(self, events: Sequence[Event]) -> int:
        """Queue events in order; returns how many of the last ones there was no room for."""
        with self._lock:
            room = max(0, self.max_waiting - self._waiting)
            self._queue.extend(events[:room])
            taken = min(room, len(events))
            self._waiting += taken
            return len(events) - taken

    def put_gap(self, event: Event) -> None:
        """Queue a gap marker; there is always room for one."""
        with self._lock:
            self._queue.append(event)
            self._waiting += 1

    def hire(self) -> int:
        """How many more workers the queue is worth now; each must call :meth:`take`."""
        with self._lock:
            wanted = min(self.receiver.concurrency - self._workers, len(self._queue))
            self._workers += max(0, wanted)
            return max(0, wanted)

    def take(self) -> Event | None:
        """The next event that may run, for a hired worker; None dismisses the worker."""
        with self._lock:
            while self._queue:
                event = self._queue.popleft()
                key = event.key
                if key is not None and key in self._busy:
                    self._parked.setdefault(key, deque()).append(event)
                    continue
                if key is not None:
                    self._busy.add(key)
                self._waiting -= 1
                self._running += 1
                return event
            self._workers -= 1
            return None

    def done(self, event: Event) -> None:
        """``event`` has been handled; the next one of its key may run."""
        with self._lock:
            self._running -= 1
            if event.key is None:
                return
            self._busy.discard(event.key)
            parked = self._parked.pop(event.key, None)
            if parked:
                self._queue.extendleft(reversed(parked))

    def leave(self) -> None:
        """A hired worker goes without having been dismissed by :meth:`take`."""
        with self._lock:
            self._workers -= 1

    def clear(self) -> int:
        """Forget what waits; returns how many events that were."""
        with self._lock:
            dropped, self._waiting = self._waiting, 0
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
