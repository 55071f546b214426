"""What waits for one channel: filled from the listener's thread, emptied on any event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque


class Mailbox:
    """Packed messages of one channel, in order.

    Args:
        capacity: messages that may wait; further ones are refused.
    """

    def __init__(self, capacity: int) -> None:
        self.readers = 0
        """How many are on their way into :meth:`get`; kept by the layer."""
        self._capacity = capacity
        self._lock = threading.Lock()
        self._messages: deque[tuple[float, bytes]] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, packed: bytes, expiry: float) -> bool:
        """Add a message that is worth reading for ``expiry`` seconds; False if there is no room."""
        with self._lock:
            if len(self._messages) >= self._capacity:
                return False
            self._messages.append((time.monotonic() + expiry, packed))
            self._wake_one()
            return True

    async def get(self) -> bytes:
        """The next message that has not expired, as soon as there is one."""
        while True:
            with self._lock:
                while self._messages:
                    expires, packed = self._messages.popleft()
                    if expires > time.monotonic():
                        return packed
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
                    elif self._messages:
                        self._wake_one()  # it was our turn, and we do not take it
                raise

    def expire(self) -> bool:
        """Drop messages that nobody read in time; tells whether there were any."""
        with self._lock:
            before = len(self._messages)
            while self._messages and self._messages[0][0] <= time.monotonic():
                self._messages.popleft()
            return len(self._messages) < before

    def clear(self) -> None:
        """Drop what waits; readers go on waiting."""
        with self._lock:
            self._messages.clear()

    @property
    def abandoned(self) -> bool:
        """Whether nothing waits here, neither messages nor readers."""
        with self._lock:
            return not (self._messages or self._waiters or self.readers)

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            try:
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:
                continue  # its loop has been closed
            return


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
