"""What waits for one channel of an event loop. Used on that loop only, so it needs no lock."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

Body = bytes | dict[Any, Any]
"""A packed message; or one as it is, which others hold as well, so that it must be copied."""


class Mailbox:
    """Messages of one channel, in order.

    Args:
        capacity: messages that may wait; further ones are refused.
        channel: its name.
    """

    __slots__ = (
        *("_capacity", "_waiters", "channel", "gap_groups", "groups", "messages", "missed"),
        *("overflowed", "read_at", "readers"),
    )

    def __init__(self, capacity: int, channel: str = "") -> None:
        self.channel = channel
        self.readers = 0
        """How many receive; kept by its owner."""
        self.read_at = 0.0
        """When somebody last stopped to receive (monotonic); kept by its owner."""
        self.groups = 0
        """How many groups the channel is in; kept by its owner."""
        self.gap_groups = 0
        """How many of them have it told of gaps; kept by its owner."""
        self.missed = 0
        """Messages that expired unread, of which its owner has told nobody yet; reset by it."""
        self.overflowed = False
        """Whether the last thing put in says that others were missed."""
        self.messages: deque[tuple[float, Body]] = deque()
        """What waits, each with the moment when it expires (monotonic)."""
        self._capacity = capacity
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, message: tuple[float, Body]) -> bool:
        """Add a message and when it expires; False if there is no room."""
        messages = self.messages
        if len(messages) >= self._capacity:
            return False
        messages.append(message)
        self.overflowed = False
        waiters = self._waiters
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        return True

    def force(self, message: tuple[float, Body]) -> None:
        """Add a message even if there is no room for it."""
        self.messages.append(message)
        self._wake_one()

    def put_back(self, message: tuple[float, Body]) -> None:
        """Have a message that was taken, and not read, be the next one again."""
        self.messages.appendleft(message)
        self._wake_one()

    def pop(self) -> Body | None:
        """The next message, now; None if there is none that has not expired."""
        messages = self.messages
        while messages:
            expires, body = messages.popleft()
            if expires > time.monotonic():
                return body
            self.missed += 1
        return None

    def first_expires(self) -> float:
        """When the next message expires."""
        return self.messages[0][0]

    def waiter(self) -> asyncio.Future[None]:
        """A future that the next message resolves; then :meth:`pop`, or :meth:`pass_on`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Have a future that waits elsewhere as well be resolved by the next message."""
        self._waiters.append(waiter)

    def remove_waiter(self, waiter: asyncio.Future[None]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def pass_on(self, waiter: asyncio.Future[None]) -> None:
        """Wait no more: if it was our turn, it is the next one's."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif self.messages:
            self._wake_one()

    def expire(self, now: float) -> int:
        """Drop messages that nobody read in time; returns how many."""
        messages, before = self.messages, len(self.messages)
        while messages and messages[0][0] <= now:
            messages.popleft()
        return before - len(messages)

    @property
    def abandoned(self) -> bool:
        """Whether nobody needs it: no message, no reader, no group."""
        return not (self.messages or self.readers or self.groups)

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
