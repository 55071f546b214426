"""What the layers of one event loop share: a listener, the connection for rows, and the way out.

Everything here runs on that loop. It is made by the first use of a layer on the loop, and ends with
the loop: as a task that is cancelled, or when the loop is closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol

from ..backoff import Backoff
from ..conf import conf
from ..exceptions import ListenError
from ..listening.connection import Notification
from .connection import LayerConnection, LayerListener
from .outgoing import Outgoing
from .rows import Rows

logger = logging.getLogger("django_pgnotify.layers")

_REVIVAL_BASE, _REVIVAL_CAP = 0.5, 30.0
"""Upper bounds, in seconds, of the first and of any pause before a listener that ended."""


class Hearer(Protocol):
    """Who hears wire channels: a layer on this loop."""

    def hear(self, payload: bytes) -> None: ...
    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None: ...


class Hub:
    """See the module. Get one with :func:`django_pgnotify.layers.loops.hub_of`.

    Args:
        publish_alias: database to send on where nobody listens, and to keep rows in.
        listen_alias: database to listen on, and to send on while established.
    """

    def __init__(self, publish_alias: str, listen_alias: str) -> None:
        self.loop = asyncio.get_running_loop()
        self._heard: frozenset[str] = frozenset()
        self.rows = Rows(publish_alias)
        self._listen_alias = listen_alias
        self._ports: dict[str, list[Hearer]] = {}
        self._listener: LayerListener | None = None
        self._task: asyncio.Task[None] | None = None
        self._was_lost = False
        self._revival = Backoff(_REVIVAL_BASE, _REVIVAL_CAP)
        self._waiting: list[tuple[frozenset[str], asyncio.Future[None]]] = []
        self.out = Outgoing(self.rows, lambda: self.direct)
        self.closed = False

    # -- ports --------------------------------------------------------------------------------

    def want(self, port: Hearer, channels: frozenset[str]) -> None:
        """Have a port hear exactly these wire channels."""
        for channel, ports in list(self._ports.items()):
            if port in ports and channel not in channels:
                ports.remove(port)
                if not ports:
                    del self._ports[channel]
        for channel in channels:
            ports = self._ports.setdefault(channel, [])
            if port not in ports:
                ports.append(port)
        wanted = frozenset(self._ports)
        # What is about to be left must not count as heard for whoever comes next.
        self._heard &= wanted
        if self._task is not None and not self._task.done() and self._listener is not None:
            self._listener.want(wanted)
        elif wanted:
            self._listen(wanted)

    async def until_heard(self, channels: frozenset[str]) -> None:
        """Return once whatever is sent on these from now on will arrive.

        Raises:
            ListenError: that is not so within ``PGNOTIFY_CONNECT_TIMEOUT``.
        """
        if channels <= self.heard:
            return
        timeout = conf.CONNECT_TIMEOUT
        waiter = self.loop.create_future()
        entry = (channels, waiter)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            raise ListenError(
                f"Database {self._listen_alias!r} is not heard after {timeout:g} s; "
                f"'manage.py pglisten --check' tells why."
            ) from None
        finally:
            with suppress(ValueError):
                self._waiting.remove(entry)

    @property
    def idle(self) -> bool:
        """Whether no port wants to hear anything."""
        return not self._ports

    # -- the listener -------------------------------------------------------------------------

    @property
    def direct(self) -> LayerConnection | None:
        """The listening connection, while it is proven."""
        if not self._heard or self._listener is None:
            return None
        connection = self._listener.connection
        return connection if connection is not None and connection.usable else None

    @property
    def heard(self) -> frozenset[str]:
        """Wire channels on which whatever is sent from now on will arrive."""
        # Not after the connection is known to be lost, though the listener has yet to see to it.
        return frozenset() if self.direct is None else self._heard

    @property
    def backend_pid(self) -> int | None:
        """Pid of the PostgreSQL backend that listens, None while there is none."""
        return None if self._listener is None else self._listener.backend_pid

    def _listen(self, channels: frozenset[str]) -> None:
        self._listener = LayerListener(
            self._listen_alias, channels, self, gap_on_start=self._was_lost
        )
        self._task = self.loop.create_task(self._listener.run(), name="pgnotify-layer-listener")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._heard = frozenset()
        self._was_lost = True
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
        if error is not None:
            logger.error("The channel layer's listener ended", exc_info=error)
        for _, waiter in self._waiting:
            if not waiter.done():
                refusal = ListenError(f"The channel layer does not listen: {error or 'stopped'}")
                refusal.__cause__ = error
                waiter.set_exception(refusal)
        if self._ports and not self.closed:
            # It may be that somebody cancels all tasks, and the loop goes on: whoever waits for
            # messages must not be deaf then. Where the loop ends, this comes too late for it.
            self.loop.call_later(self._revival.next(), self._revive)

    def _revive(self) -> None:
        if self._ports and not self.closed and self._task is not None and self._task.done():
            self._listen(frozenset(self._ports))

    # -- sink of the listener -----------------------------------------------------------------

    def established(self, channels: frozenset[str]) -> None:
        connection = None if self._listener is None else self._listener.connection
        if connection is None or not connection.usable:
            return  # lost since, which the listener has yet to see
        self._heard = channels & self._ports.keys()
        for wanted, waiter in self._waiting:
            if wanted <= self._heard and not waiter.done():
                waiter.set_result(None)

    def lost(self, cause: str, retry_in: float) -> None:
        self._heard = frozenset()

    def led(self, leader: bool) -> None:
        """Never: this listener does not compete."""

    def status(self) -> dict[str, Any]:
        return {
            "node": conf.NODE,
            "pid": os.getpid(),
            "backend": self.backend_pid,
            "database": self._listen_alias,
            "role": "in process",
            "established": False,
            **({} if self._listener is None else self._listener.status()),
            "topics": sorted(self._heard),
        }

    def notified(self, notifications: Sequence[Notification]) -> None:
        for channel, payload, _ in notifications:
            for port in self._ports.get(channel, ()):
                try:
                    port.hear(payload)
                except Exception:
                    # One layer's mistake must not deafen the others.
                    logger.exception("A channel layer failed at what it heard")

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        for port in {id(port): port for ports in self._ports.values() for port in ports}.values():
            port.note_gap(since, until, cause)

    # -- the end ------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the connections; what is under way is told so."""
        self.closed = True
        await self.out.aclose()
        task, listener = self._task, self._listener
        if task is not None and listener is not None and not task.done():
            listener.stop()
            await asyncio.wait([task])
        self.rows.close()

    def close_at_once(self) -> None:
        """Close the connections without the loop, which does not run any more."""
        self.closed = True
        if self._listener is not None and self._listener.connection is not None:
            self._listener.connection.close()
        self.rows.close()
