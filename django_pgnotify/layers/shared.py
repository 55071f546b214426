"""The receivers of one normal channel on one event loop: rows, taken as they are asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from ..backoff import Backoff
from ..exceptions import PublishError
from .rows import Rows, Taken

logger = logging.getLogger("django_pgnotify.layers")

_BACKOFF_BASE, _BACKOFF_CAP = 0.1, 5.0


class SharedChannel:
    """See the module. Only as many rows are taken as there are receivers that wait.

    Args:
        layer: what the rows of the layer are marked with.
        channel: name of the channel.
        rows: returns where they are.
        wake: wire channel and payload that tell receivers to look.
        on_idle: called when nobody waits any more and nothing is under way.
    """

    def __init__(
        self,
        layer: str,
        channel: str,
        *,
        rows: Callable[[], Rows],
        wake: tuple[bytes, bytes],
        on_idle: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._layer = layer
        self._channel = channel
        self._rows = rows
        self._wake = wake
        self._on_idle = on_idle
        self._waiters: deque[asyncio.Future[Taken]] = deque()
        self._news = False
        """Whether there may be rows that nobody has looked for."""
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing is under way."""
        return not self._waiters and self._task is None

    def wake(self) -> None:
        """Rows may have come."""
        self._news = True
        if self._waiters and self._task is None:
            self._task = self._loop.create_task(self._take(), name="pgnotify-layer-take")

    async def get(self) -> bytes:
        """The next message, which nobody else gets."""
        waiter: asyncio.Future[Taken] = self._loop.create_future()
        self._waiters.append(waiter)
        self.wake()
        try:
            return (await waiter).body
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                await self._hand_on(waiter.result())  # it was our turn, and we do not take it
            raise

    async def _take(self) -> None:
        backoff = Backoff(_BACKOFF_BASE, _BACKOFF_CAP)
        try:
            while self._waiters and self._news:
                self._news = False
                wanted = len(self._waiters)
                try:
                    found = await self._rows().take(self._layer, self._channel, wanted, self._wake)
                except PublishError as exc:
                    logger.warning("Cannot look for messages of %r: %s", self._channel, exc)
                    self._news = True
                    await asyncio.sleep(backoff.next())
                    continue
                backoff.reset()
                self._news = self._news or len(found) == wanted
                for taken in found:
                    await self._hand_on(taken)
        except Exception as exc:  # noqa: BLE001 - whoever waits must be told, whatever it was
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(exc)
            self._waiters.clear()
        finally:
            self._task = None
        if self._news:
            self.wake()
        if self.idle:
            self._on_idle()

    async def _hand_on(self, taken: Taken) -> None:
        """Give a message to whoever waits here; to the others, if nobody does any more."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(taken)
                return
        await self._rows().put_back(self._layer, self._channel, taken, self._wake)
