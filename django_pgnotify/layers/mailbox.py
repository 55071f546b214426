"""What waits for one channel of an event loop. Used on that loop only, so it needs no lock."""

from __future__ import annotations

import asyncio
import time
from collections import deque


class Mailbox:
    """Packed messages of one channel, in order.

    Args:
        capacity: messages that may wait; further ones are refused.
    """

    __slots__ = ("_capacity", "_messages", "_waiters", "groups", "missed", "overflowed", "readers")

    def __init__(self, capacity: int) -> None:
        self.readers = 0
        """How many are in :meth:`get`."""
        self.groups = 0
        """How many groups the channel is in; kept by the port."""
        self.missed = 0
        """Messages that expired when a reader came for them; reset by the port."""
        self.overflowed = False
        """Whether the last thing put in says that others were refused."""
        self._capacity = capacity
        self._messages: deque[tuple[float, bytes]] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, packed: bytes, expires: float) -> bool:
        """Add a message that is worth reading until then (monotonic); False if there is no room."""
        if len(self._messages) >= self._capacity:
            return False
        self.overflowed = False
        self._messages.append((expires, packed))
        if self._waiters:
            self._wake_one()
        return True

    def force(self, packed: bytes, expires: float) -> None:
        """Add a message even if there is no room for it."""
        self._messages.append((expires, packed))
        self._wake_one()

    def put_back(self, packed: bytes, expires: float) -> None:
        """Have a message that was taken, and not read, be the next one again."""
        self._messages.appendleft((expires, packed))
        self._wake_one()

    def pop(self, now: float) -> bytes | None:
        """The next message, now; None if there is none that has not expired."""
        while self._messages:
            expires, packed = self._messages.popleft()
            if expires > now:
                return packed
            self.missed += 1
        return None

    def first_expires(self) -> float:
        """When the next message expires."""
        return self._messages[0][0]

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Have a future be resolved by the next message; :meth:`pop` is then up to its owner."""
        self._waiters.append(waiter)

    def remove_waiter(self, waiter: asyncio.Future[None]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def pass_on(self, waiter: asyncio.Future[None]) -> None:
        """Undo :meth:`add_waiter`: if it was our turn, it is the next one's."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif self._messages:
            self._wake_one()

    async def get(self) -> bytes:
        """The next message that has not expired, as soon as there is one."""
        self.readers += 1
        try:
            while True:
                if self._messages and (packed := self.pop(time.monotonic())) is not None:
                    return packed
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                try:
                    await waiter
                except BaseException:
                    self.pass_on(waiter)
                    raise
        finally:
            self.readers -= 1

    def expire(self, now: float) -> int:
        """Drop messages that nobody read in time; returns how many."""
        messages, before = self._messages, len(self._messages)
        while messages and messages[0][0] <= now:
            messages.popleft()
        return before - len(messages)

    def clear(self) -> None:
        """Drop what waits; readers go on waiting."""
        self._messages.clear()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def abandoned(self) -> bool:
        """Whether nobody needs it: no message, no reader, no group."""
        return not (self._messages or self.readers or self.groups)

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
