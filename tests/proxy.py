"""A TCP proxy in front of the server, so that tests can break real connections.

It forwards until told otherwise:

* :meth:`TCPProxy.disconnect` drops the connections of now; new ones are served.
* :meth:`TCPProxy.close` also stops listening: new ones are refused.
* :meth:`TCPProxy.open` listens again, on the same port.
* :meth:`TCPProxy.blackhole` holds back every byte without closing anything, as
  a cut cable does; new connections are accepted and met with silence.
* :meth:`TCPProxy.resume` lets the held bytes through.
* :meth:`TCPProxy.swallow` loses what the server sends, for good: the connections of now are cut
  when that ends, since no TCP goes on after a loss.

The proxy's own kernel acknowledges what a black hole swallows, so
``tcp_user_timeout`` never fires through it: only an application's deadline does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

_CHUNK = 1 << 16
#: SO_LINGER on with zero seconds: close() sends RST rather than FIN.
_RESET = struct.pack("ii", 1, 0)


class TCPProxy:
    """Forwards 127.0.0.1:``port`` to ``host``:``target_port``; a context manager."""

    def __init__(self, host: str, target_port: int, *, timeout: float = 10.0) -> None:
        self.target = (host, target_port)
        self.host = "127.0.0.1"
        self.port = 0
        self.timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._swallowing = False
        self._flowing: asyncio.Event
        self._changed: asyncio.Condition
        self.accepted = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._close(reset=False))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self.timeout)
        self._loop.close()

    def url(self, dsn: str) -> str:
        """The URL ``dsn`` with its address replaced by the proxy's."""
        parts = urlsplit(dsn)
        userinfo = parts.netloc.rpartition("@")[0]
        address = f"{self.host}:{self.port}"
        netloc = f"{userinfo}@{address}" if userinfo else address
        return urlunsplit(parts._replace(netloc=netloc))

    @property
    def connections(self) -> int:
        """How many connections are open through the proxy now."""
        return len(self._links)

    def disconnect(self, *, reset: bool = False) -> int:
        """Drop the connections of now, with RST when ``reset``; how many they were."""
        return self._call(self._disconnect(reset=reset))

    def close(self, *, reset: bool = False) -> None:
        """Drop all connections and refuse new ones until :meth:`open`."""
        self._call(self._close(reset=reset))

    def open(self) -> None:
        """Listen again on the same port."""
        self._call(self._listen())

    def blackhole(self) -> None:
        """Hold back every byte in both directions; nothing is closed."""
        self._call(self._flow(False))

    def resume(self) -> None:
        """Let bytes through again, the held ones first."""
        self._call(self._flow(True))

    def swallow(self) -> None:
        """Lose every byte that the server sends; nothing is closed."""
        self._swallowing = True

    def end_swallowing(self, *, reset: bool = False) -> None:
        """Drop the connections that lost bytes, and forward again."""
        self._call(self._end_swallowing(reset=reset))

    def wait_for_connections(self, count: int, *, timeout: float | None = None) -> None:
        """Wait until exactly ``count`` connections are open through the proxy."""
        self._wait(lambda: len(self._links) == count, f"{count} open connections", timeout)

    def wait_for_accepted(self, count: int, *, timeout: float | None = None) -> None:
        """Wait until ``count`` connections have been accepted since the start."""
        self._wait(lambda: self.accepted >= count, f"{count} accepted connections", timeout)

    # From here on, everything runs on the proxy's own loop.

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(self.timeout)

    def _wait(self, predicate: Callable[[], bool], what: str, timeout: float | None) -> None:
        limit = self.timeout if timeout is None else timeout

        async def wait() -> bool:
            async with self._changed:
                try:
                    async with asyncio.timeout(limit):
                        await self._changed.wait_for(predicate)
                except TimeoutError:
                    return False
            return True

        future = asyncio.run_coroutine_threadsafe(wait(), self._loop)
        if not future.result():
            raise TimeoutError(
                f"no {what} within {limit} s: {len(self._links)} open, {self.accepted} accepted"
            )

    async def _start(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._changed = asyncio.Condition()
        await self._listen()

    async def _listen(self) -> None:
        if self._server is not None:
            return
        self._server = await asyncio.start_server(
            self._accept, self.host, self.port, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _flow(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _disconnect(self, *, reset: bool) -> int:
        links = list(self._links)
        for link in links:
            link.cut(reset=reset)
        async with self._changed:
            await self._changed.wait_for(lambda: self._links.isdisjoint(links))
        return len(links)

    async def _end_swallowing(self, *, reset: bool) -> None:
        cutting = asyncio.create_task(self._disconnect(reset=reset))
        await asyncio.sleep(0)  # those of now are marked as cut, before anything is forwarded
        self._swallowing = False
        await cutting

    async def _close(self, *, reset: bool) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._disconnect(reset=reset)
        if server is not None:
            await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = _Link(task, [writer])
        self._links.add(link)
        self.accepted += 1
        try:
            async with self._changed:
                self._changed.notify_all()
            await self._serve(link, reader, writer)
        except (asyncio.CancelledError, OSError):
            pass  # cut, or a peer that went away: both end the link
        finally:
            for each in link.writers:
                each.transport.abort() if link.is_cut else each.close()
            self._links.discard(link)
            async with self._changed:
                self._changed.notify_all()

    async def _serve(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._flowing.wait()
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        link.writers.append(far_writer)
        pumps = {
            asyncio.create_task(self._pump(reader, far_writer), name="proxy up"),
            asyncio.create_task(self._pump(far_reader, writer, link), name="proxy down"),
        }
        try:
            # One side's end is the whole link's: PostgreSQL never half-closes.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        down: _Link | None = None,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._flowing.wait()
                if down is not None and (self._swallowing or down.is_cut):
                    continue
                writer.write(data)
                await writer.drain()
        # A cut cable does not carry the end of a connection either.
        await self._flowing.wait()


class _Link:
    """One connection through the proxy: its task and the two sockets' writers."""

    def __init__(self, task: asyncio.Task[None], writers: list[asyncio.StreamWriter]) -> None:
        self.task = task
        self.writers = writers
        self.is_cut = False

    def cut(self, *, reset: bool) -> None:
        self.is_cut = True
        for writer in self.writers:
            if reset:
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.task.cancel()
