"""``publish()`` and its kin: refuse bad input, encode, and hand to the tier."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from ..conf import conf
from ..durable.log import append
from ..events import Delivery, Topic, check_delivery, check_topic, new_event_id
from ..exceptions import InvalidArgument
from ..wire import Outgoing, encode_event
from . import background
from .buffer import CommitBuffer, Noted, Run, encoded, portions
from .committed import committed
from .plain import ENCODER
from .riding import let_events_ride
from .sender import is_default_transport, postgres_connection, send
from .unsent import announce_events, report_unsent

_BUFFER = "_pgnotify_commit_buffer"


def publish(
    topic: str | Topic,
    data: Any = None,
    *,
    key: str | None = None,
    using: str | None = None,
    delivery: Delivery | None = None,
) -> str:
    """Publish ``data`` on a topic.

    Inside a transaction it leaves after the commit, and never after a rollback, of the whole or
    of the savepoint it was published in. A NOTIFY that then fails is logged and counted, because
    the commit stands; with ``delivery="atomic"`` the NOTIFY is part of the transaction and a
    failure raises; with ``delivery="durable"`` the event is a row of the event log, written at
    once in the transaction, where a failure raises too.

    Args:
        topic: name of the topic, or a :class:`Topic`.
        data: any JSON value; dates, times, Decimal and UUID become text as DjangoJSONEncoder
            writes them. Any size: what NOTIFY cannot carry travels by reference.
        key: receivers handle events with the same key in order.
        using: database alias to publish on; default ``PGNOTIFY_DATABASE``.
        delivery: tier; default that of the Topic, else ``PGNOTIFY_DELIVERY``.

    Returns:
        The id of the event.

    Raises:
        InvalidTopic, InvalidDelivery, EventDataError, InvalidArgument: bad input.
        UnsupportedDatabase: ``using`` is not a PostgreSQL alias.
    """
    name, tier, connection = _destination(topic, delivery, using)
    event_id = new_event_id()
    event = _encode(name, data, _check_key(key), event_id)
    deliver(event, tier, connection, connection.alias)
    return event_id


async def apublish(
    topic: str | Topic,
    data: Any = None,
    *,
    key: str | None = None,
    using: str | None = None,
    delivery: Delivery | None = None,
) -> str:
    """As :func:`publish`, from async code."""
    return await sync_to_async(publish)(topic, data, key=key, using=using, delivery=delivery)


def publish_many(
    topic: str | Topic,
    items: Iterable[Any],
    *,
    key: str | Callable[[Any], str | None] | None = None,
    using: str | None = None,
    delivery: Delivery | None = None,
) -> list[str]:
    """Publish each of ``items`` on a topic, in order, in as few statements as fit.

    All of it is checked before anything is sent. What :func:`publish` says of transactions holds
    for each event; ``"durable"`` events are written to the log together, all of them or none.

    Args:
        topic: name of the topic, or a :class:`Topic`.
        items: the ``data`` of the events, as for :func:`publish`.
        key: the key of all of them, or a function of an item that returns its key or None.
        using: database alias to publish on; default ``PGNOTIFY_DATABASE``.
        delivery: tier; default that of the Topic, else ``PGNOTIFY_DELIVERY``.

    Returns:
        The ids of the events, in the order of the items.

    Raises:
        InvalidTopic, InvalidDelivery, EventDataError, InvalidArgument: bad input.
        UnsupportedDatabase: ``using`` is not a PostgreSQL alias.
    """
    name, tier, connection = _destination(topic, delivery, using)
    ids, events = [], []
    for item in items:
        own_key = _check_key(key(item) if callable(key) else key)
        ids.append(new_event_id())
        events.append(_encode(name, item, own_key, ids[-1]))
    if events:
        _deliver_many(events, tier, connection)
    return ids


async def apublish_many(
    topic: str | Topic,
    items: Iterable[Any],
    *,
    key: str | Callable[[Any], str | None] | None = None,
    using: str | None = None,
    delivery: Delivery | None = None,
) -> list[str]:
    """As :func:`publish_many`, from async code."""
    return await sync_to_async(publish_many)(topic, items, key=key, using=using, delivery=delivery)


def _destination(
    topic: str | Topic, delivery: Delivery | None, using: str | None
) -> tuple[str, Delivery, BaseDatabaseWrapper]:
    """The checked name of a topic, the tier, and Django's connection to the database."""
    if isinstance(topic, Topic):
        name, delivery = topic.name, delivery or topic.delivery
    else:
        name = check_topic(topic)
    tier = conf.DELIVERY if delivery is None else check_delivery(delivery)
    return name, tier, postgres_connection(conf.DATABASE if using is None else using)


def _check_key(key: object) -> str | None:
    if key is not None and (not isinstance(key, str) or not key):
        raise InvalidArgument(f"key= takes a non-empty string; got {key!r}.")
    return key


def _encode(topic: str, data: Any, key: str | None, event_id: str) -> Outgoing:
    return encode_event(
        topic,
        "published",
        data=data,
        at=time.time(),
        encoder=ENCODER,
        event_id=event_id,
        key=key,
    )


def deliver(event: Noted, tier: Delivery, connection: BaseDatabaseWrapper, using: str) -> None:
    """Send ``event`` on alias ``using`` as ``tier`` asks; ``connection`` has the transaction."""
    if tier == "durable" and connection.alias == using:
        logged = encoded([event])
        if not logged:
            return  # it cannot be carried, which has been reported
        append(logged, using)
        event = logged[0]
    by_hand = not connection.in_atomic_block and not _autocommit(connection)
    if by_hand or (tier == "atomic" and connection.alias == using):
        # Nobody tells us of a commit made by hand; inside the transaction PostgreSQL does.
        _send_now(encoded([event]), connection, using)
    else:
        _buffer_of(connection).add(event, using)


def _deliver_many(
    events: Sequence[Outgoing], tier: Delivery, connection: BaseDatabaseWrapper
) -> None:
    """As :func:`deliver` for events published together."""
    using = connection.alias
    if tier == "durable" and outside_transaction(connection):
        with transaction.atomic(using):
            _deliver_many(events, tier, connection)
        return
    if tier == "durable":
        append(events, using)
    if tier == "atomic" or not (connection.in_atomic_block or _autocommit(connection)):
        _send_now(events, connection, using)
    elif connection.in_atomic_block:
        buffer = _buffer_of(connection)
        for event in events:
            buffer.add(event, using)
    else:
        committed([Run(_buffer_of(connection), [], using, *events)])
        send_committed(events, using)


def _send_now(events: Sequence[Outgoing], connection: BaseDatabaseWrapper, using: str) -> None:
    """Send, in the open transaction if there is one, and note what its commit will mean here."""
    buffer = _buffer_of(connection)
    if outside_transaction(connection):
        run = Run(buffer, [], using, *events)
        committed([run])
        try:
            send(events, using)
        except Exception:
            announce_events(events)
            raise
        return
    send(events, using)
    if connection.in_atomic_block:
        for event in events:
            buffer.sent(event, using)
    else:
        buffer.by_hand += events


def outside_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether each statement on ``connection`` commits by itself."""
    return not connection.in_atomic_block and _autocommit(connection)


def _autocommit(connection: BaseDatabaseWrapper) -> bool:
    if connection.connection is None:  # not connected yet, and no reason to connect for this
        return bool(connection.settings_dict["AUTOCOMMIT"])
    return bool(connection.autocommit)


def _buffer_of(connection: BaseDatabaseWrapper) -> CommitBuffer:
    # Kept on the connection itself: it is per thread, as the transaction is.
    buffer: CommitBuffer | None = getattr(connection, _BUFFER, None)
    if buffer is None:
        buffer = CommitBuffer(connection, send_committed, committed)
        setattr(connection, _BUFFER, buffer)
        let_events_ride(connection, buffer)
    return buffer


def sent_by_hand(connection: BaseDatabaseWrapper) -> Sequence[Noted]:
    """The events that have left in an open transaction which Django knows nothing of."""
    buffer: CommitBuffer | None = getattr(connection, _BUFFER, None)
    return () if buffer is None else buffer.by_hand


def send_committed(events: Sequence[Noted], using: str) -> None:
    """Send events whose transaction has been committed: here and now, or in the background."""
    in_background = conf.BACKGROUND_SENDER and is_default_transport()
    if in_background and background.sender.put(events, using):
        return
    for part in portions(events):
        sent = encoded(part)
        try:
            send(sent, using)
        except Exception as exc:  # noqa: BLE001 - reported; the commit stands
            report_unsent(sent, using, exc)
