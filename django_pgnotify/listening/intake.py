"""The intake: turns notifications into events, in order, and hands them on in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, cast

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import Error

from .. import signing
from ..conf import conf
from ..decoding import event_from, events_from, foreign_event
from ..events import Event
from ..exceptions import FrameError
from ..stats import Stats
from ..wire import Reference, decode_frame, stored_body, wire_channel
from .connection import Notification
from .fetching import Fetcher

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


class _Missed(NamedTuple):
    """What was dropped because a fetch took too long: since when, and whether as the leader."""

    since: datetime
    as_leader: bool


class Intake:
    """The sink of a listener that hears events.

    While a stored event is being fetched, everything behind it waits here, in order: up to
    ``PGNOTIFY_QUEUE_MAX_EVENTS`` frames and ``PGNOTIFY_QUEUE_MAX_BYTES`` of them. Further ones are
    dropped into a gap.

    Args:
        topics: names of the topics listened to.
        using: alias that stored events are fetched from, and that events say they came from.
        consumer: what receives the events.
        stats: ``received``, ``foreign``, ``broken``, ``dropped`` and ``gaps`` are counted here.
        on_broken: told of what nobody can be told of: it was heard and could not be understood.
        overflowed: told of the gap (since, until, cause) of what was dropped here.
    """

    def __init__(
        self,
        topics: Sequence[str],
        using: str,
        consumer: Consumer,
        stats: Stats,
        on_broken: Callable[[], None] | None = None,
        overflowed: Callable[[datetime, datetime, str], None] | None = None,
    ) -> None:
        self._topics = {wire_channel(topic, conf.CHANNEL_PREFIX): topic for topic in topics}
        self._using = using
        self._consumer = consumer
        self._stats = stats
        self._on_broken = on_broken
        self._overflowed = overflowed
        self._verify = signing.verify if conf.SIGNING else None
        self._waiting: deque[Callable[[], Any]] = deque()
        self._frames = self._bytes = 0
        self._missed: _Missed | None = None
        self._leads = False
        self._fetching: asyncio.Task[None] | None = None
        self._fetching_since = datetime.now(UTC)
        self._fetcher = Fetcher(using)

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
        if self._fetching is None:
            self._take(notifications)
            return
        frames, size = len(notifications), sum(len(one.payload) for one in notifications)
        # Once one is dropped, so is all that follows, until the gap that tells of it is in.
        if (
            self._missed is not None
            or self._frames + frames > conf.QUEUE_MAX_EVENTS
            or self._bytes + size > conf.QUEUE_MAX_BYTES
        ):
            self._drop(notifications)
            return
        self._frames += frames
        self._bytes += size

        def take() -> None:
            self._frames -= frames
            self._bytes -= size
            self._take(notifications)

        self._waiting.append(take)

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
        self._leads = leader
        self._in_turn(lambda: self._consumer.led(leader))

    def in_turn(self, action: Callable[[], None]) -> None:
        """Do something once everything taken in so far has been handed on; at once, mostly."""
        self._in_turn(action)

    async def settled(self, timeout: float) -> bool:
        """Wait until everything taken in so far has been handed on; whether it was in time."""
        try:
            async with asyncio.timeout(timeout):
                while self._fetching is not None:
                    await asyncio.wait([self._fetching])
        except TimeoutError:
            logger.error(
                "A stored event, and %d frame(s) behind it, dropped: not fetched within %g s",
                self._frames,
                timeout,
            )
            self._stats.add("dropped", self._frames)
            self._waiting.clear()
            return False
        return True

    def _in_turn(self, action: Callable[[], None]) -> None:
        if self._fetching is not None:
            self._waiting.append(action)
        else:
            action()

    def _take(self, notifications: Sequence[Notification]) -> None:
        entries = self._decode(notifications)
        if _Pending in map(type, entries):
            self._fetching_since = datetime.now(UTC)
            self._fetching = asyncio.create_task(self._fetch(entries), name="pgnotify-fetch")
        elif entries:
            size = sum(len(notification.payload) for notification in notifications)
            self._hand_on(entries, size)  # type: ignore[arg-type]

    def _drop(self, notifications: Sequence[Notification]) -> None:
        events = [one for one in self._decode(notifications) if isinstance(one, Event)]
        # From when the first of them was published: we may have been late to read it.
        since = min([self._fetching_since, *(event.published_at for event in events)])
        self._stats.add("dropped", len(notifications))
        if self._missed is None:
            logger.error(
                "A stored event is not fetched, and %d frame(s) wait for it: "
                "what follows is dropped into a gap",
                self._frames,
            )
            self._missed = _Missed(since, self._leads)
            self._waiting.append(self._tell_missed)
        else:
            self._missed = _Missed(
                min(since, self._missed.since), self._leads or self._missed.as_leader
            )

    def _tell_missed(self) -> None:
        # All that was dropped came before now, whatever has queued up behind this meanwhile.
        missed, self._missed = self._missed, None
        assert missed is not None
        until, cause = datetime.now(UTC), "a stored event took too long to fetch"
        if self._overflowed is not None:
            self._overflowed(missed.since, until, cause)
        self.gap(missed.since, until, cause, for_leader=False)
        if missed.as_leader:
            self._consumer.gap(missed.since, until, cause, for_leader=True)

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
        for attempt in range(1, _FETCH_ATTEMPTS + 1):
            try:
                return await self._fetcher.fetch(ids)
            except Exception as exc:
                if attempt == _FETCH_ATTEMPTS or not isinstance(exc, Error):
                    logger.exception("%d stored event(s) could not be fetched", len(ids))
                    break
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
