"""``publish()`` and ``apublish()``: refuse bad input, encode, and hand to the tier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.db.backends.base.base import BaseDatabaseWrapper

from ..conf import conf
from ..events import Delivery, Topic, check_delivery, check_topic, new_event_id
from ..exceptions import InvalidArgument
from ..wire import encode_event
from . import background
from .buffer import CommitBuffer, Noted, encoded, portions
from .plain import ENCODER
from .riding import let_events_ride
from .sender import is_default_transport, postgres_connection, report_unsent, send

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
    failure raises.

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
    if isinstance(topic, Topic):
        name, delivery = topic.name, delivery or topic.delivery
    else:
        name = check_topic(topic)
    if key is not None and (not isinstance(key, str) or not key):
        raise InvalidArgument(f"key= takes a non-empty string; got {key!r}.")
    tier = conf.DELIVERY if delivery is None else check_delivery(delivery)
    connection = postgres_connection(conf.DATABASE if using is None else using)
    event_id = new_event_id()
    event = encode_event(
        name,
        "published",
        data=data,
        at=time.time(),
        encoder=ENCODER,
        event_id=event_id,
        key=key,
    )
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


def deliver(event: Noted, tier: Delivery, connection: BaseDatabaseWrapper, using: str) -> None:
    """Send ``event`` on alias ``using`` as ``tier`` asks; ``connection`` has the transaction."""
    if tier == "atomic" and connection.alias == using:
        send(encoded([event]), using)
    elif not connection.in_atomic_block and not _autocommit(connection):
        # Nobody tells us of a commit made by hand; inside the transaction PostgreSQL does.
        send(encoded([event]), using)
    else:
        _buffer_of(connection).add(event, using)


def _autocommit(connection: BaseDatabaseWrapper) -> bool:
    if connection.connection is None:  # not connected yet, and no reason to connect for this
        return bool(connection.settings_dict["AUTOCOMMIT"])
    return bool(connection.autocommit)


def _buffer_of(connection: BaseDatabaseWrapper) -> CommitBuffer:
    # Kept on the connection itself: it is per thread, as the transaction is.
    buffer: CommitBuffer | None = getattr(connection, _BUFFER, None)
    if buffer is None:
        buffer = CommitBuffer(connection, send_committed)
        setattr(connection, _BUFFER, buffer)
        let_events_ride(connection)
    return buffer


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
