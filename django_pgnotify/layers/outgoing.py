"""The way out of an event loop: at once when idle, together while a statement is in flight."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from psycopg import pq

from ..conf import conf
from ..exceptions import ListenError, PgNotifyError, PublishError
from ..listening.connection import first_line
from ..stats import Stats
from .codec import GROUP, Codec
from .connection import LayerConnection, NotSent
from .rows import Rows

logger = logging.getLogger("django_pgnotify.layers")

_BATCH_COUNT = 1000
_BATCH_BYTES = 64 * 1024
_CLOSE_TIMEOUT = 2.0


class Sender(Protocol):
    """Whose entries these are: a layer on this loop."""

    @property
    def codec(self) -> Codec: ...
    @property
    def stats(self) -> Stats: ...

    async def store(self, body: bytes | str) -> int:
        """Keep what is too large for a frame; returns the number of its row."""

    async def reach_normal_members(self, group: str, body: bytes | str) -> None:
        """Hand a group's message on to the normal channels in it."""


class Parcel:
    """One entry on its way; ``future`` is done when the server has it."""

    __slots__ = ("body", "channel", "future", "kind", "name", "packed", "retried", "sender")

    def __init__(
        self,
        future: asyncio.Future[None],
        sender: Sender,
        channel: bytes,
        kind: int,
        name: str,
        body: bytes | str,
    ) -> None:
        self.future = future
        self.sender = sender
        self.channel = channel
        self.kind = kind
        self.name = name
        self.body = body
        self.packed: bytes = sender.codec.entry(kind, name, body)
        self.retried = False


class Outgoing:
    """See the module. One for each hub, on its loop.

    Args:
        rows: whose connection sends while no other does.
        direct: returns the connection that listens, while it is proven.
    """

    def __init__(self, rows: Rows, direct: Callable[[], LayerConnection | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._rows = rows
        self._direct = direct
        self._pending: deque[Parcel] = deque()
        self._busy = False
        """Whether a batch is under way; the next waits for it, and so keeps its place."""
        self._sending: list[Parcel] = []
        self._in_line: LayerConnection | None = None
        self._sending_on: LayerConnection | None = None
        self._sending_since = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_rows = asyncio.Lock()

    def send(
        self, sender: Sender, channel: bytes, kind: int, name: str, body: bytes | str
    ) -> asyncio.Future[None]:
        """Tell everybody who hears ``channel``.

        The future is done when the server has it, or fails with PublishError. Entries for one
        channel keep their order.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append(Parcel(future, sender, channel, kind, name, body))
        if not self._busy:
            self._pump()
        return future

    async def aclose(self) -> None:
        """Wait a moment for what is under way, then refuse the rest."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_CLOSE_TIMEOUT)
        if under_way := [parcel.future for parcel in (*self._sending, *self._pending)]:
            await asyncio.wait(under_way, timeout=_CLOSE_TIMEOUT)
        for task in set(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._finish(list(self._pending), PublishError("The channel layer has been stopped."))
        self._pending.clear()

    # -- batches --------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what waits, if that is possible now."""
        if self._busy or not self._pending:
            return
        connection = self._direct() or self._rows.connection
        if connection is None:
            self._busy = True
            self.spawn(self._connect(), "pgnotify-layer-connect")
        elif not connection.free:
            if self._in_line is not connection:
                self._in_line = connection
                connection.when_free(partial(self._my_turn, connection))
        else:
            batch = self._take()
            if not batch:
                return
            self._busy = True
            if connection.utf8 and len(batch) == 1 and len(batch[0].packed) < 3900:
                large = False  # as nearly always; no need to look closer
            else:
                large = not all(
                    one.sender.codec.fits(one.packed, utf8=connection.utf8) for one in batch
                )
            if large:
                self.spawn(self._store_and_notify(batch, utf8=connection.utf8), "pgnotify-store")
            else:
                self._notify(connection, batch)

    def _my_turn(self, connection: LayerConnection) -> None:
        self._in_line = None
        self._pump()

    def _take(self) -> list[Parcel]:
        batch: list[Parcel] = []
        size = 0
        while self._pending and len(batch) < _BATCH_COUNT and size < _BATCH_BYTES:
            parcel = self._pending.popleft()
            if not parcel.future.done():
                batch.append(parcel)
                size += len(parcel.packed)
        return batch

    def _notify(self, connection: LayerConnection, batch: list[Parcel]) -> None:
        if len(batch) == 1:
            [parcel] = batch
            frames = parcel.sender.codec.frames([parcel.packed], utf8=connection.utf8)
            pairs = [(parcel.channel, frames[0])]
            groups = parcel.kind == GROUP
        else:
            together: dict[tuple[bytes, Any], list[bytes]] = {}
            groups = False
            for parcel in batch:
                key = (parcel.channel, parcel.sender.codec)
                together.setdefault(key, []).append(parcel.packed)
                groups = groups or parcel.kind == GROUP
            pairs = []
            for (channel, codec), entries in together.items():
                frames = codec.frames(entries, utf8=connection.utf8, first=len(pairs))
                pairs += [(channel, frame) for frame in frames]
        self._sending = batch
        self._sending_on, self._sending_since = connection, self._loop.time()
        if self._watchdog is None:
            self._watch(conf.CONNECT_TIMEOUT)
        groups = groups and connection.has_tables
        connection.notify(pairs, partial(self._sent, batch, groups), groups=groups)

    def _sent(
        self,
        batch: list[Parcel],
        groups: bool,
        error: Exception | None,
        result: pq.abc.PGresult | None,
    ) -> None:
        self._sending, self._sending_on = [], None
        self._busy = False
        again = isinstance(error, NotSent) and not batch[0].retried
        if again:
            for parcel in batch:
                parcel.retried = True
            self._pending.extendleft(reversed(batch))
        elif groups and result is not None and _has_members(result):
            self.spawn(self._reach_rows(batch), "pgnotify-layer-members")
        else:
            self._finish(batch, error)
        if self._pending:
            if error is None:
                self._pump()
            else:
                self._loop.call_soon(self._pump)  # once whoever lost the connection is done

    def _finish(self, batch: list[Parcel], error: BaseException | None) -> None:
        for parcel in batch:
            parcel.sender.stats.add("sent" if error is None else "failed")
            if parcel.future.done():
                continue
            if error is None:
                parcel.future.set_result(None)
            elif isinstance(error, PgNotifyError) and not isinstance(
                error, (PublishError, ListenError)
            ):
                parcel.future.set_exception(error)
            else:
                refusal = PublishError(f"The channel layer could not send: {first_line(error)}")
                refusal.__cause__ = error
                parcel.future.set_exception(refusal)

    # -- what takes longer ------------------------------------------------------------------------

    async def _connect(self) -> None:
        try:
            await self._rows.connected()
        except Exception as exc:  # noqa: BLE001 - whoever waits must be told, whatever it was
            # All of them: each would wait for as long again, one after the other.
            batch = list(self._pending)
            self._pending.clear()
            self._finish(batch, exc)
        finally:
            self._busy = False
        self._pump()

    async def _store_and_notify(self, batch: list[Parcel], *, utf8: bool) -> None:
        """Store what is too large for a frame; in its frame is then the number of its row."""
        ready: list[Parcel] = []
        try:
            for parcel in batch:
                sender = parcel.sender
                try:
                    if not sender.codec.fits(parcel.packed, utf8=utf8):
                        number = await sender.store(parcel.body)
                        parcel.packed = sender.codec.entry(parcel.kind, parcel.name, number)
                    ready.append(parcel)
                except Exception as exc:  # noqa: BLE001 - whoever waits must be told
                    self._finish([parcel], exc)
        finally:
            self._busy = False
            self._pending.extendleft(reversed(ready))
            self._pump()

    async def _reach_rows(self, batch: list[Parcel]) -> None:
        """Hand messages to groups on to the normal channels among their members."""
        async with self._to_rows:  # in the order of the batches
            for parcel in batch:
                error: Exception | None = None
                if parcel.kind == GROUP:
                    try:
                        await parcel.sender.reach_normal_members(parcel.name, parcel.body)
                    except Exception as exc:  # noqa: BLE001 - whoever waits must be told
                        error = exc
                self._finish([parcel], error)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task that :meth:`aclose` waits for."""
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- a server that does not answer ----------------------------------------------------------

    def _watch(self, seconds: float) -> None:
        self._watchdog = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._watchdog = None
        connection = self._sending_on
        if connection is None:
            return
        limit = conf.CONNECT_TIMEOUT
        remaining = self._sending_since + limit - self._loop.time()
        if remaining > 0:
            self._watch(remaining)
        else:
            connection.lose(f"no answer within {limit:g} s")


def _has_members(result: pq.abc.PGresult) -> bool:
    return result.get_value(0, result.nfields - 1) == b"t"
