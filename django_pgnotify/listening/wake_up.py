"""What a task waits for between one look and the next."""

from __future__ import annotations

import asyncio


class WakeUp:
    """Asked for at any time, on the loop; whoever waits then, or next, looks."""

    def __init__(self) -> None:
        self._asked = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def awaited(self) -> bool:
        """Whether the task waits, and nobody has asked for it yet."""
        return self._waiter is not None and not self._asked

    def ask(self) -> None:
        self._asked = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, until: float | None) -> None:
        """Return once asked, at once if that was before; or at ``until``, of the loop's clock."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            self._waiter = loop.create_future()
            alarm = None if until is None else loop.call_at(until, self.ask)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if alarm is not None:
                    alarm.cancel()
        self._asked = False
