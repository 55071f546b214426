"""``publish()`` and its kin: refuse bad input, encode, and hand to the tier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from asgiref.sync import sync_to_async
from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from ..conf import conf
from ..durable.log import append
from ..events import Action, Delivery, Topic, check_delivery, check_topic
from ..exceptions import InvalidArgument
from ..stats import publishing_stats
from ..wire import Outgoing, encode_event
from .buffer import CommitBuffer
from .sender import check_alias, send

logger = logging.getLogger("django_pgnotify.publishing")

_BUFFER = "_pgnotify_commit_buffer"
_django_json = DjangoJSONEncoder()


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
    name, tier, alias = _destination(topic, delivery, using)
    event_id, event = encode(name, "published", data=data, key=_check_key(key))
    deliver(event, tier, connections[alias], alias)
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
    name, tier, alias = _destination(topic, delivery, using)
    ids, events = [], []
    for item in items:
        own_key = _check_key(key(item) if callable(key) else key)
        event_id, event = encode(name, "published", data=item, key=own_key)
        ids.append(event_id)
        events.append(event)
    if events:
        _deliver_many(events, tier, connections[alias], alias)
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
) -> tuple[str, Delivery, str]:
    """The checked name of a topic, the tier and the database alias."""
    if isinstance(topic, Topic):
        name, delivery = topic.name, delivery or topic.delivery
    else:
        name = check_topic(topic)
    tier = conf.DELIVERY if delivery is None else check_delivery(delivery)
    return name, tier, check_alias(conf.DATABASE if using is None else using)


def _check_key(key: object) -> str | None:
    if key is not None and (not isinstance(key, str) or not key):
        raise InvalidArgument(f"key= takes a non-empty string; got {key!r}.")
    return key


def encode(
    topic: str,
    action: Action,
    *,
    data: Any,
    model: str | None = None,
    pk: Any = None,
    key: str | None = None,
    changed: Iterable[str] | None = None,
) -> tuple[str, Outgoing]:
    """Encode an event of now; returns its id and the event as it is sent."""
    return encode_event(
        topic,
        action,
        data=data,
        model=model,
        pk=pk,
        key=key,
        changed=changed,
        published_at=datetime.now(UTC),
        to_plain=to_plain,
    )


def to_plain(value: Any) -> Any:
    """What JSON has no word for, as DjangoJSONEncoder writes it, but with microseconds kept."""
    if isinstance(value, datetime):
        return value.isoformat()
    return _django_json.default(value)


def deliver(event: Outgoing, tier: Delivery, connection: BaseDatabaseWrapper, using: str) -> None:
    """Send ``event`` on alias ``using`` as ``tier`` asks; ``connection`` has the transaction."""
    if tier == "durable" and connection.alias == using:
        append([event], using)
    if tier == "atomic" and connection.alias == using:
        send([event], using)
    elif not connection.in_atomic_block and not _autocommit(connection):
        # Nobody tells us of a commit made by hand; inside the transaction PostgreSQL does.
        send([event], using)
    else:
        _buffer_of(connection).add(event, using)


def _deliver_many(
    events: Sequence[Outgoing], tier: Delivery, connection: BaseDatabaseWrapper, using: str
) -> None:
    """As :func:`deliver` for events published together, on the alias of ``connection``."""
    if tier == "durable" and outside_transaction(connection):
        with transaction.atomic(using):
            _deliver_many(events, tier, connection, using)
        return
    if tier == "durable":
        append(events, using)
    if tier == "atomic" or not (connection.in_atomic_block or _autocommit(connection)):
        send(events, using)
    elif connection.in_atomic_block:
        buffer = _buffer_of(connection)
        for event in events:
            buffer.add(event, using)
    else:
        try:
            send(events, using)
        except Exception as exc:  # noqa: BLE001 - reported, as for one event
            report_unsent(events, using, exc)


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
        buffer = CommitBuffer(connection, send, report_unsent)
        setattr(connection, _BUFFER, buffer)
    return buffer


def report_unsent(events: Sequence[Outgoing], using: str, exc: Exception) -> None:
    """Count and log events that could not be sent after their commit; payloads are not logged."""
    publishing_stats.add("publish_failed", len(events))
    topics = sorted({event.topic for event in events})
    logger.error(
        "%d event(s) of topic(s) %s could not be sent on database %r after the commit: %s",
        len(events),
        ", ".join(topics),
        using,
        exc,
        exc_info=exc,
        extra={"topics": topics, "count": len(events), "using": using},
    )
