"""The intake: turns notifications into events, in order, and hands them on in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, cast

from asgiref.sync import sync_to_async
from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import DatabaseError, close_old_connections

from .. import signing
from ..conf import conf
from ..decoding import event_from, events_from, foreign_event
from ..events import Event
from ..exceptions import FrameError
from ..stats import Stats
from ..wire import Reference, decode_frame, stored_body, wire_channel
from .connection import Notification

logger = logging.getLogger("django_pgnotify.listening")

_FETCH_ATTEMPTS = 3


class Consumer(Protocol):
    """What events go to. Called on the loop; must return at once."""

    def dispatch(self, events: Sequence[Event], size: int) -> None: ...

    def gap(
        self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool
    ) -> None: ...

    def led(self, leader: bool) -> None: ...


class _Pending(NamedTuple):
    """An event of a frame that is stored elsewhere and has to be fetched."""

    reference: Reference
    topic: str
    source: str


class Intake:
    """The sink of a listener that hears events.

    Args:
        topics: names of the topics listened to.
        using: alias that stored events are fetched from, and that events say they came from.
        consumer: what receives the events.
        stats: ``received``, ``foreign``, ``broken`` and ``gaps`` are counted here.
        on_broken: told of what nobody can be told of: it was heard and could not be understood.
    """

    def __init__(
        self,
        topics: Sequence[str],
        using: str,
        consumer: Consumer,
        stats: Stats,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        self._topics = {wire_channel(topic, conf.CHANNEL_PREFIX): topic for topic in topics}
        self._using = using
        self._consumer = consumer
        self._stats = stats
        self._on_broken = on_broken
        self._verify = signing.verify if conf.SIGNING else None
        # While a stored event is being fetched, everything behind it waits here, in order.
        self._waiting: deque[Callable[[], Any]] = deque()
        self._fetching: asyncio.Task[None] | None = None

    @property
    def channels(self) -> frozenset[str]:
        """The wire channels of the topics."""
        return frozenset(self._topics)

    def take_in(
        self, topics: Iterable[str], consumer: Consumer, on_broken: Callable[[], None]
    ) -> None:
        """Take in these topics too, and hand all of it on to ``consumer``, from here on."""
        self._topics |= {wire_channel(topic, conf.CHANNEL_PREFIX): topic for topic in topics}
        self._consumer = consumer
        self._on_broken = on_broken

    def notified(self, notifications: Sequence[Notification]) -> None:
        if self._fetching is not None:
            self._waiting.append(lambda: self._take(notifications))
        else:
            self._take(notifications)

    def gap(self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool) -> None:
        self._stats.add("gaps")
        logger.warning(
            "%s may have missed frames from %s to %s: %s",
            "Receivers of the leader" if for_leader else "This listener",
            since or "the last listener's end",
            until,
            cause,
            extra={"since": since, "until": until, "cause": cause},
        )
        self._in_turn(lambda: self._consumer.gap(since, until, cause, for_leader=for_leader))

    def led(self, leader: bool) -> None:
        self._in_turn(lambda: self._consumer.led(leader))

    def in_turn(self, action: Callable[[], None]) -> None:
        """Do something once everything taken in so far has been handed on; at once, mostly."""
        self._in_turn(action)

    async def settled(self) -> None:
        """Wait until everything taken in so far has been handed on."""
        while self._fetching is not None:
            await asyncio.wait([self._fetching])

    def _in_turn(self, action: Callable[[], None]) -> None:
        if self._fetching is not None:
            self._waiting.append(action)
        else:
            action()

    def _take(self, notifications: Sequence[Notification]) -> None:
        entries = self._decode(notifications)
        if _Pending in map(type, entries):
            self._fetching = asyncio.create_task(self._fetch(entries), name="pgnotify-fetch")
        elif entries:
            size = sum(len(notification.payload) for notification in notifications)
            self._hand_on(entries, size)  # type: ignore[arg-type]

    def _hand_on(self, events: list[Event], size: int) -> None:
        if events:
            self._stats.add("received", len(events))
            self._consumer.dispatch(events, size)

    def _decode(self, notifications: Sequence[Notification]) -> list[Event | _Pending]:
        now, using = datetime.now(UTC), self._using
        entries: list[Event | _Pending] = []
        for channel, payload, backend in notifications:
            topic = self._topics.get(channel)
            if topic is None:
                continue  # unsubscribed a moment ago
            try:
                frame = decode_frame(payload.decode(), channel, self._verify)
            except (FrameError, UnicodeDecodeError) as exc:
                self._report(topic, backend, len(payload), exc)
                continue
            source = frame.source or f"backend:{backend}"
            if frame.foreign:
                self._stats.add("foreign")
                entries.append(
                    foreign_event(
                        frame.events[0], topic=topic, source=source, received_at=now, using=using
                    )
                )
                continue
            found = events_from(
                frame.events,
                partial(self._report, topic, backend, len(payload), ours=True),
                topic=topic,
                source=source,
                received_at=now,
                using=using,
                resolve=resolve_row,
            )
            if Reference in map(type, found):
                entries += [
                    _Pending(one, topic, source) if isinstance(one, Reference) else one
                    for one in found
                ]
            else:
                entries += cast("list[Event]", found)
        return entries

    async def _fetch(self, entries: list[Event | _Pending]) -> None:
        try:
            self._hand_on(*await self._resolved(entries))
        finally:
            self._fetching = None
            while self._waiting and self._fetching is None:
                self._waiting.popleft()()

    async def _resolved(self, entries: list[Event | _Pending]) -> tuple[list[Event], int]:
        """The entries as events, and the bytes of those that were fetched."""
        wanted = [entry.reference.row for entry in entries if isinstance(entry, _Pending)]
        bodies = await self._fetch_rows(wanted)
        now, events = datetime.now(UTC), []
        for entry in entries:
            if isinstance(entry, Event):
                events.append(entry)
                continue
            try:
                body = bodies.get(entry.reference.row)
                if body is None:
                    raise FrameError(f"stored event {entry.reference.row} is gone")
                events.append(
                    event_from(
                        stored_body(body, entry.reference.digest),
                        topic=entry.topic,
                        source=entry.source,
                        received_at=now,
                        using=self._using,
                        resolve=resolve_row,
                    )
                )
            except FrameError as exc:
                self._report(entry.topic, 0, 0, exc, ours=True)
        return events, sum(map(len, bodies.values()))

    async def _fetch_rows(self, ids: list[int]) -> dict[int, str]:
        from ..publishing.store import fetch

        def fetch_rows() -> dict[int, str]:
            close_old_connections()
            try:
                return fetch(ids, self._using)
            finally:
                close_old_connections()

        for attempt in range(1, _FETCH_ATTEMPTS + 1):
            try:
                return await sync_to_async(fetch_rows)()
            except DatabaseError:
                if attempt == _FETCH_ATTEMPTS:
                    logger.exception("%d stored event(s) could not be fetched", len(ids))
                else:
                    await asyncio.sleep(0.2 * attempt)
        return {}

    def _report(
        self, topic: str, backend: int, size: int, exc: Exception, *, ours: bool = False
    ) -> None:
        """Count and log what could not be read; ``ours`` says that its frame was."""
        self._stats.add("broken")
        # With signing on, what is not ours must not be able to empty caches.
        if self._on_broken is not None and (ours or self._verify is None):
            self._on_broken()
        logger.warning(
            "Skipped a frame or event on topic %r from backend %d (%d bytes): %s",
            topic,
            backend,
            size,
            exc if isinstance(exc, FrameError) else "not UTF-8",
            extra={"topic": topic, "backend": backend, "size": size},
        )


def resolve_row(label: str, pk: Any) -> tuple[str, Any]:
    """A model label and a primary key from JSON as Django knows them.

    Raises:
        FrameError: there is no such model, or the value cannot be a key of it.
    """
    label, plain, convert = _model(label)
    if type(pk) is plain:
        return label, pk
    try:
        if isinstance(pk, (bool, dict)) or (isinstance(pk, (float, list)) and plain is not None):
            raise TypeError(pk)  # to_python() would make a key of it, and so name another row
        value = convert(pk)
    except (ValidationError, TypeError, ValueError, OverflowError):
        value = None
    if value is None:
        raise FrameError("an event's primary key is not one of its model")
    return label, value


@lru_cache(maxsize=1024)
def _model(label: str) -> tuple[str, type | None, Callable[[Any], Any]]:
    """Label, the JSON type that needs no conversion, and the conversion, of a model."""
    try:
        meta = apps.get_model(label)._meta
    except (LookupError, ValueError):
        raise FrameError("an event names a model that does not exist") from None
    fields = meta.pk_fields
    if len(fields) > 1:

        def convert(value: Any) -> Any:
            parts = [field.to_python(part) for field, part in zip(fields, value, strict=True)]
            return None if None in parts else tuple(parts)

        return meta.label_lower, None, convert
    internal = fields[0].get_internal_type()
    plain: type | None = None
    if internal.endswith(("AutoField", "IntegerField")):
        plain = int
    elif internal in ("CharField", "TextField", "SlugField", "EmailField"):
        plain = str
    return meta.label_lower, plain, fields[0].to_python
