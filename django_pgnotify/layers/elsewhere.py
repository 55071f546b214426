"""Channels that belong to another process, or to another loop, and the groups they are in.

Their own process is asked, and answers once it is done. Whom a request or its answer does not reach
is connecting again, for a moment; so it is repeated until it is answered, and does no harm twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import Protocol

from ..conf import conf
from . import codec as wire
from .hub import Hub
from .local import Local
from .options import Options
from .outgoing import Sender

logger = logging.getLogger("django_pgnotify.layers")

ASK_AGAIN = 0.5
"""Seconds until what was not answered is asked again."""


class Asker(Sender, Protocol):
    """Where the answers are heard, and our own channels are: a layer on this loop."""

    hub: Hub
    local: Local

    async def listen(self) -> None:
        """Return once whatever is sent to our channels arrives."""

    async def join(self, group: str, channel: str) -> None:
        """Have a channel of ours join, once whatever is sent to the group arrives."""


class Elsewhere:
    """See the module. Used on the loop of its port only."""

    def __init__(self, port: Asker, options: Options) -> None:
        self._port = port
        self._options = options
        self._answers: dict[str, asyncio.Future[None]] = {}
        """What waits for an answer, by the nonce of the request."""
        self._asking: dict[tuple[str, str], list[tuple[int, asyncio.Future[None]]]] = {}
        """The same, by group and channel, with what is asked for."""
        self._joining: dict[tuple[str, str], dict[str, asyncio.Task[None]]] = {}
        """What we have been asked and do, by group and channel, and the nonce of the request."""

    # -- asking ---------------------------------------------------------------------------------

    async def ask(self, kind: int, group: str, channel: str) -> None:
        """Have the process of a channel add it to a group, or discard it.

        Returns once it has, or with a warning when it has not answered in time: there is no
        telling a process that has ended, whose channel is in no group, from one that is cut off.

        Args:
            kind: ``ADD`` or ``DISCARD``.
        """
        there = self._options.wire_of_owner(channel)
        if there is None:
            return  # it is no channel that new_channel() made
        port = self._port
        await port.listen()
        answer = port.hub.loop.create_future()
        asking = self._asking.setdefault((group, channel), [])
        for other, superseded in asking:
            if other != kind and not superseded.done():
                # The last word counts, so the one before must not be repeated behind it.
                superseded.set_result(None)
        nonce = secrets.token_hex(8)
        self._answers[nonce] = answer
        asking.append((kind, answer))
        request = f"{channel} {nonce} {port.local.token}"
        try:
            await port.hub.out.send(port, there, kind, group, request)
            async with asyncio.timeout(conf.HEARTBEAT_TIMEOUT):
                while not (await asyncio.wait([answer], timeout=ASK_AGAIN))[0]:
                    await port.hub.out.send(port, there, kind, group, request)
        except TimeoutError:
            logger.warning("The process of channel %r does not answer; it may have ended", channel)
        finally:
            del self._answers[nonce]
            asking.remove((kind, answer))
            if not asking:
                del self._asking[group, channel]

    def answered(self, nonce: str) -> None:
        waiter = self._answers.get(nonce)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- being asked ----------------------------------------------------------------------------

    def asked(self, kind: int, group: str, request: str) -> None:
        """Add a channel of ours to a group, or discard it, and answer."""
        channel, _, sender = request.partition(" ")
        nonce, _, token = sender.partition(" ")
        if not self._port.local.is_ours(channel):
            if not token:
                self._port.local.note_broken()
            return
        if kind == wire.ADD:
            joining = self._joining.setdefault((group, channel), {})
            if nonce not in joining:  # else it is under way, and asked for again
                task = self._port.hub.loop.create_task(
                    self._join(group, channel, nonce, token), name="pgnotify-layer-join"
                )
                joining[nonce] = task
                task.add_done_callback(partial(self._joined, group, channel, nonce))
        else:
            for task in self._joining.pop((group, channel), {}).values():
                task.cancel()
            self._port.local.leave(group, channel)
            self._answer(nonce, token)

    async def _join(self, group: str, channel: str, nonce: str, token: str) -> None:
        await self._port.join(group, channel)
        self._answer(nonce, token)

    def _joined(self, group: str, channel: str, nonce: str, task: asyncio.Task[None]) -> None:
        joining = self._joining.get((group, channel), {})
        if joining.get(nonce) is task:
            del joining[nonce]
            if not joining:
                del self._joining[group, channel]
        _note_failure(task)

    def _answer(self, nonce: str, token: str) -> None:
        if token:
            there = self._options.wire_of(token).encode()
            told = self._port.hub.out.send(self._port, there, wire.DONE, nonce, b"")
            told.add_done_callback(_note_failure)


def _note_failure(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("What another process asked of a channel here failed: %s", error)
