"""The threads that sync receivers run in: idle ones wait for work, and there are never too many.

Not an executor: a future, and a loop woken for each result, would cost more than most receivers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger("django_pgnotify.dispatching")

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
        """Threads that wait for work, less works that wait for a thread."""
        self._threads: list[threading.Thread] = []

    def run(self, work: Work) -> None:
        """Have a thread call ``work``, which must not raise.

        Raises:
            RuntimeError: no thread can be started, and there is none.
        """
        with self._lock:
            if self._idle > 0 or len(self._threads) >= self._most or not self._start():
                self._idle -= 1
        self._work.put(work)

    def _start(self) -> bool:
        """Start a thread for the work at hand; False where it has to wait for another's end."""
        name = f"{self._name}-{len(self._threads) + 1}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            if not self._threads:
                raise
            logger.warning("%d thread(s) have to do for receivers: %s", len(self._threads), exc)
            return False
        self._threads.append(thread)
        return True

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
