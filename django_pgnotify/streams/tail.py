"""The end of the event log, read once for all the streams of a process that show it.

A tail is a cursor that follows the log (see ``durable.cursor``). Somebody who comes back is given
exactly what the tail has passed and he has not: a cursor from his snapshot to that of the tail, at
a moment between two sweeps. Everything after it he gets from the tail, like everybody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from django.db import DatabaseError, InterfaceError, connections

from ..backoff import Backoff
from ..conf import conf
from ..durable.cursor import Cursor, LogReader, Page, Snapshot, TransactionIdsWentBack
from ..durable.entries import prepare
from ..durable.epoch import current_epoch
from ..durable.log import reason
from ..events import Event
from ..exceptions import ListenError

logger = logging.getLogger("django_pgnotify.streams")

PAGE_SIZE = 500
_LONGEST_PAUSE = 5.0

T = TypeVar("T")

Found = tuple[Event, Cursor]
"""An event, and the cursor of whoever has got it and all before it."""


class LogTail:
    """Follows the log of alias ``using`` for some topics; made and used on one event loop.

    It reads in a thread of its own, with a connection of its own.

    Args:
        deliver: given each page of new events, on the loop.
    """

    def __init__(
        self, topics: Sequence[str], using: str, deliver: Callable[[list[Found]], None]
    ) -> None:
        self.cursor = Cursor("")
        """Everything before it has been delivered."""
        self.epoch = ""
        """Stands for the server that it reads."""
        self._topics = tuple(topics)
        self._using = using
        self._deliver = deliver
        self._closed = False
        self._doubtful = False
        """Whether it may be another server by now: a connection to it was lost."""
        self._awake = asyncio.Event()
        self._joining: list[tuple[asyncio.Future[str], Callable[[], None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pgnotify-stream")

    async def start(self) -> None:
        """Begin at what is committed now.

        Raises:
            django.db.Error: the database could not be asked.
        """
        snapshot, self.epoch = await self._run(self._look)
        self.cursor = Cursor(snapshot)

    def wake(self) -> None:
        """There may be something new."""
        self._awake.set()

    def doubt(self) -> None:
        """Whoever listens has lost the server: it may be another one by now."""
        self._doubtful = True
        self._awake.set()

    async def follow(self) -> None:
        """Deliver what is new, until cancelled.

        Raises:
            TransactionIdsWentBack: the server is not the one that it was.
        """
        reader = LogReader(self._using, self._topics, PAGE_SIZE)
        pauses = Backoff(0.1, _LONGEST_PAUSE)
        while True:
            # Both before the sweep: whoever asks during it is meant by the next one.
            self._awake.clear()
            meant = len(self._joining)
            try:
                await self._sweep(reader)
            except (DatabaseError, InterfaceError) as exc:
                logger.warning("The event log cannot be read: %s", reason(exc, self._using))
                reader.reset()
                await asyncio.sleep(pauses.next())
                continue
            pauses.reset()
            # No await from here on: what follows is delivered to those who join, too.
            joining, self._joining = self._joining[:meant], self._joining[meant:]
            for joined, join in joining:
                if not joined.done():
                    join()
                    joined.set_result(self.cursor.snapshot)
            try:
                async with asyncio.timeout(conf.SWEEP_INTERVAL):
                    await self._awake.wait()
            except TimeoutError:
                pass

    def close(self) -> None:
        """Let go of the connection and the thread; whoever waits gets ListenError."""
        self._closed = True
        for joined, _ in self._joining:
            if not joined.done():
                joined.set_exception(_ended())
        with suppress(RuntimeError):  # the interpreter ends
            self._thread.submit(connections.close_all)
        self._thread.shutdown(wait=False)

    # -- for those who come back --------------------------------------------------------------

    async def missed(
        self, cursor: Cursor, join: Callable[[], None]
    ) -> AsyncIterator[tuple[list[Found], Cursor]]:
        """The pages between ``cursor`` and the tail; ``join`` is called where the tail takes over.

        Each with the cursor behind it, which is further on than its last event where others
        follow that nobody has asked for.

        Raises:
            ListenError: the tail has been closed.
            django.db.Error: the database could not be read.
            TransactionIdsWentBack: the cursor is not of this server's time.
        """
        reader = LogReader(self._using, self._topics, PAGE_SIZE)
        while True:  # in his own time, until he is close to the end
            page, found = await self._read(reader, cursor)
            cursor = page.end
            yield found, cursor
            if not cursor.target and len(page.events) < PAGE_SIZE:
                break
        joined: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._joining.append((joined, join))
        self.wake()
        target = await joined
        if Snapshot.parse(target).xmax < Snapshot.parse(cursor.snapshot).xmax:
            raise TransactionIdsWentBack(f"from {cursor.snapshot} to {target}")
        reader.reset()
        cursor = cursor._replace(target=target)
        while cursor.target:
            page, found = await self._read(reader, cursor)
            cursor = page.end
            yield found, cursor

    # -- reading ------------------------------------------------------------------------------

    async def _sweep(self, reader: LogReader) -> None:
        while True:
            under_way = self.cursor.target
            page, found = await self._read(reader, self.cursor)
            self.cursor = page.end
            if found:
                self._deliver(found)
            # Of a sweep that began before, what came since is to be read, too.
            if not self.cursor.target and not under_way:
                return

    async def _read(self, reader: LogReader, cursor: Cursor) -> tuple[Page, list[Found]]:
        try:
            return await self._run(lambda: self._page(reader, cursor))
        except TransactionIdsWentBack:
            self._awake.set()  # whoever reads, the tail itself must find out
            raise

    def _page(self, reader: LogReader, cursor: Cursor) -> tuple[Page, list[Found]]:
        try:
            if self._doubtful:
                self._make_sure()
            page = reader.next_page(cursor)
            bodies = [reader.body(logged) for logged in page.events]
        except (DatabaseError, InterfaceError):
            self._doubtful = True
            connections[self._using].close()  # it may be broken
            raise
        found = []
        for logged, body in zip(page.events, bodies, strict=True):
            entry = prepare(logged, body, self._using)
            if entry.event is None:
                logger.error("Event %d of the log cannot be shown: %s", logged.id, entry.problem)
            else:
                found.append((entry.event, page.after(logged)))
        return page, found

    def _make_sure(self) -> None:
        """Ask whether it is the same server still.

        One that was promoted gives the transaction ids again that it did not get in time: what
        they write now the cursor takes for seen, and no id of it looks wrong.
        """
        self._doubtful = False  # before it asks: a doubt that comes meanwhile is another one
        if self._look_at_epoch() != self.epoch:
            self._doubtful = True
            raise TransactionIdsWentBack("the server is another one, or was restored or promoted")

    def _look(self) -> tuple[str, str]:
        epoch = self._look_at_epoch()
        with connections[self._using].cursor() as cursor:
            cursor.execute("SELECT pg_current_snapshot()::text")
            [snapshot] = cursor.fetchone()
        return snapshot, epoch

    def _look_at_epoch(self) -> str:
        epoch = str(current_epoch(self._using))
        return hashlib.blake2b(epoch.encode(), digest_size=6).hexdigest()

    async def _run(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise _ended()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _ended() -> ListenError:
    return ListenError("The streams of this process have ended.")
