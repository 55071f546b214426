"""The threads that sync receivers run in: idle ones wait for work, and there are never too many.

Not an executor: a future, and a loop woken for each result, would cost more than most receivers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class Threads:
    """Up to ``most`` threads, started when they are needed.

    They are daemons, because a receiver that hangs must not keep a process from ending.

    Args:
        at_end: called by each thread before it ends.
    """

    def __init__(self, most: int, name: str, at_end: Work) -> None:
        self._most = most
        self._name = name
        self._at_end = at_end
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[threading.Thread] = []

    def run(self, work: Work) -> None:
        """Have a thread call ``work``, which must not raise."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._most:
                name = f"{self._name}-{len(self._threads) + 1}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._work.put(work)

    def close(self, *, wait: bool) -> None:
        """Let the threads end once they have nothing to do, and ``wait`` for it or not."""
        for _ in self._threads:
            self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            with self._lock:
                self._idle += 1
        self._at_end()
