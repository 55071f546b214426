"""What one browser is sent: events, signs of life in between, and what it may have missed."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db import DatabaseError, InterfaceError

from ..durable.cursor import TransactionIdsWentBack
from ..events import Action, Event
from ..exceptions import ListenError
from ..forwarding import Group, groups_of, plain_event
from ..listening.connection import first_line
from . import frames
from .hub import CannotBeShown, Hub, Item, Queue, stream_stats
from .permission import Subscriber
from .position import Position

logger = logging.getLogger("django_pgnotify.streams")

_AT_ONCE = 100
_CHUNK = 64 * 1024

Filter = Callable[[Event, Subscriber], bool]
Data = Callable[[Event], Any]


@dataclass(frozen=True, slots=True)
class Options:
    """Of a view, checked (see ``event_stream``)."""

    group: Group | None
    filter: Filter | None
    data: Data | None
    actions: frozenset[Action] | None
    heartbeat: float
    retry: float
    max_waiting: int
    max_age: float | None


class BrowserStream:
    """The body of a response, to be iterated over once.

    Args:
        hub: entered for it; it leaves.
        groups: those that it shows; None for every event.
        resume: where the browser was, if it says so: what :meth:`Positions.decode` gave.
        came_back: whether it says anything.
    """

    def __init__(
        self,
        hub: Hub,
        options: Options,
        subscriber: Subscriber,
        groups: frozenset[str] | None,
        resume: Position | None,
        came_back: bool,
    ) -> None:
        self._closed = False
        self._hub = hub
        self._options = options
        self._subscriber = subscriber
        self._groups = groups
        self._loop = asyncio.get_running_loop()
        self._queue = Queue(options.max_waiting)
        self._cursor = hub.cursor
        # Of now: the hub ends, and may begin again with another server, before this stream knows.
        self._epoch = hub.epoch
        self._resumes = False
        self._gaps: list[bytes] = []
        self._ends_at = None if options.max_age is None else time.monotonic() + options.max_age
        stream_stats.add("streams")
        if came_back:
            self._come_back(resume)
        if not self._resumes:
            hub.join(self._queue)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()

    def __del__(self) -> None:
        self.close()  # a middleware has put another response in its place

    def close(self) -> None:
        """Hear nothing more; from any thread, and as often as one likes."""
        if not self._closed:
            self._closed = True
            with suppress(RuntimeError):  # its loop has been closed
                self._loop.call_soon_threadsafe(_leave, self._hub, self._queue)

    # -- where it begins ----------------------------------------------------------------------

    def _come_back(self, resume: Position | None) -> None:
        since = None if resume is None else resume.at
        if self._hub.live_topics:
            cause = "the connection was lost, and live events are not kept"
            self._gaps.append(self._gap(self._hub.live_topics, since, cause))
        if self._hub.durable_topics:
            cause = (
                "the stream is not known here" if resume is None else self._hub.refuses(resume)
            ) or ""
            if cause:
                self._gaps.append(self._gap(self._hub.durable_topics, since, cause))
            else:
                assert resume is not None
                self._cursor, self._resumes = resume.cursor, True

    def _id(self) -> str | None:
        return self._hub.positions.now(self._epoch, self._cursor)

    # -- what it sends ------------------------------------------------------------------------

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            # The id comes first: whoever loses the connection before the first event resumes too.
            first = None if self._resumes else self._id()
            yield frames.block(id=first, retry=self._options.retry) + b"".join(self._gaps)
            if self._resumes:
                async for chunk in self._missed():
                    yield chunk
            async for chunk in self._heard():
                yield chunk
        except TransactionIdsWentBack as exc:
            logger.warning("A stream cannot be resumed: %s", exc)
            cause = "the server is another one, or was restored"
            self._cursor, self._epoch = self._hub.cursor, self._hub.epoch
            yield self._gap(self._hub.durable_topics, None, cause, id=self._id())
        except (DatabaseError, InterfaceError, ListenError) as exc:
            # The browser comes back, and is where it was.
            logger.warning("A stream ends: %s", first_line(exc))
        finally:
            self.close()

    async def _heard(self) -> AsyncIterator[bytes]:
        options, queue = self._options, self._queue
        while not self._closed:
            if self._left() <= 0:
                return
            items = queue.take(_AT_ONCE)
            if items:
                for chunk in self._blocks(items):
                    yield chunk
            elif queue.full and self._hub.live_topics:
                cause = "the browser did not keep up"
                since = queue.full_since
                yield self._gap(self._hub.live_topics, since, cause)
                return  # it has what the log can resume from
            elif queue.full:
                async for chunk in self._missed():
                    yield chunk
            elif queue.ended:
                return
            else:
                await queue.wait(min(options.heartbeat, self._left()))
                if not queue.has_something:
                    yield frames.COMMENT if self._cursor is None else frames.block(id=self._id())

    def _left(self) -> float:
        """Seconds until it has to end."""
        return math.inf if self._ends_at is None else self._ends_at - time.monotonic()

    async def _missed(self) -> AsyncIterator[bytes]:
        """What the log has that this browser has not, up to where its queue goes on."""
        assert self._cursor is not None
        async for items, end in self._hub.missed(self._cursor, self._queue):
            for chunk in self._blocks(items):
                yield chunk
            self._cursor = end
            yield frames.block(id=self._id())

    def _blocks(self, items: Iterable[Item]) -> Iterable[bytes]:
        """The blocks of those that this browser is to have, some of them at once."""
        parts: list[bytes] = []
        size = 0
        for item in items:
            block = self._block(item)
            if item.cursor is not None:
                self._cursor = item.cursor
            if block is not None:
                parts.append(block)
                size += len(block)
                stream_stats.add("shown")
            if size > _CHUNK:
                yield b"".join(parts)
                parts, size = [], 0
        if parts:
            yield b"".join(parts)

    def _block(self, item: Item) -> bytes | None:
        event, options = item.event, self._options
        if event.action == "gap":
            stream_stats.add("gaps")
            return frames.block(_json({"topics": [event.topic], **event.data}), event="gap")
        if options.actions is not None and event.action not in options.actions:
            return None
        try:
            if self._groups is not None and self._groups.isdisjoint(item.once(self._names)):
                return None
            if options.filter is not None and not options.filter(event, self._subscriber):
                return None
            return item.once(self._shown)
        except CannotBeShown:
            pass  # as was logged
        except Exception:
            logger.exception("The filter failed on event %s of topic %r", event.id, event.topic)
        at = event.published_at.timestamp()
        return self._gap((event.topic,), at, "an event cannot be shown")

    # The same for all streams of the view, so once for each event.

    def _names(self, item: Item) -> list[str]:
        assert self._options.group is not None
        return groups_of(self._options.group, item.event)

    def _shown(self, item: Item) -> bytes:
        make = self._options.data or plain_event
        return frames.block(_json(make(item.event)), id=item.id(self._hub.positions))

    def _gap(
        self, topics: Iterable[str], since: float | None, cause: str, id: str | None = None
    ) -> bytes:
        stream_stats.add("gaps")
        data = {
            "topics": list(topics),
            "since": None if since is None else datetime.fromtimestamp(since, UTC).isoformat(),
            "until": datetime.now(UTC).isoformat(),
            "cause": cause,
        }
        return frames.block(_json(data), event="gap", id=id)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _leave(hub: Hub, queue: Queue) -> None:
    hub.part(queue)
    hub.leave()
