"""Slots: how many receivers may run at once, threads and coroutines together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Slots:
    """``count`` slots, handed on in the order in which they were asked for. Any thread may call.

    A slot is asked for with a function that begins something. It is called at once where a slot
    is free, or later, by whoever releases one; it must return at once, and never raise.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._asking: deque[Callable[[], None]] = deque()

    def ask(self, begin: Callable[[], None]) -> None:
        with self._lock:
            if self._free == 0:
                self._asking.append(begin)
                return
            self._free -= 1
        begin()

    def release(self) -> None:
        with self._lock:
            if not self._asking:
                self._free += 1
                return
            begin = self._asking.popleft()
        begin()

    def wanted(self) -> bool:
        """Whether somebody waits for a slot."""
        return bool(self._asking)
