"""The vocabulary of the bus: topics, deliveries, actions and events."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from .exceptions import InvalidAction, InvalidDelivery, InvalidTopic

Action = Literal["created", "updated", "deleted", "m2m_changed", "published", "gap"]
ACTIONS: tuple[Action, ...] = get_args(Action)
MODEL_ACTIONS: tuple[Action, ...] = ("created", "updated", "deleted", "m2m_changed")

Delivery = Literal["after_commit", "atomic", "durable"]
DELIVERIES: tuple[Delivery, ...] = get_args(Delivery)


def check_topic(name: object) -> str:
    """Return ``name`` if it can name a topic.

    Raises:
        InvalidTopic: it is not a string, is empty or blank, or has a character that PostgreSQL
            cannot carry in an identifier (NUL, a lone surrogate).
    """
    if not isinstance(name, str):
        raise InvalidTopic(f"A topic is a non-empty string; got {name!r} ({type(name).__name__}).")
    if not name.strip():
        raise InvalidTopic(f"A topic is a non-empty string; got {name!r}.")
    if "\x00" in name:
        raise InvalidTopic(f"PostgreSQL cannot carry NUL in a channel name: topic {name!r}.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidTopic(f"Topic {name!r} cannot be encoded as UTF-8.") from None
    return name


def check_delivery(value: object) -> Delivery:
    """Return ``value`` if it is a delivery tier; raise :exc:`InvalidDelivery` otherwise."""
    if value not in DELIVERIES:
        raise InvalidDelivery(f"Unknown delivery {value!r}; choose one of {', '.join(DELIVERIES)}.")
    return value


def check_actions(
    values: Iterable[str] | None, valid: tuple[Action, ...] = ACTIONS
) -> frozenset[Action] | None:
    """Return ``values`` as a set if all are valid actions, None (meaning all) for None.

    Raises:
        InvalidAction: one of them is not in ``valid``, or none was given.
    """
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidAction(
            f"actions= takes a list of actions, such as ['created']; got {values!r}."
        )
    chosen = list(values)
    for value in chosen:
        if value not in valid:
            raise InvalidAction(f"Unknown action {value!r}; choose from {', '.join(valid)}.")
    if not chosen:
        raise InvalidAction(f"actions= is empty, so nothing would match; name some of {valid}.")
    return frozenset(cast("list[Action]", chosen))


@dataclass(frozen=True, slots=True)
class Topic:
    """A named stream of events, with the delivery tier its events take.

    Args:
        name: any non-empty text without NUL, such as ``"jobs"`` or ``"shop.order"``.
        delivery: one of ``DELIVERIES``; None takes the ``PGNOTIFY_DELIVERY`` setting.

    Raises:
        InvalidTopic: the name cannot name a topic.
        InvalidDelivery: the delivery is unknown.
    """

    name: str
    delivery: Delivery | None = None

    def __post_init__(self) -> None:
        check_topic(self.name)
        if self.delivery is not None:
            check_delivery(self.delivery)

    def __str__(self) -> str:
        return self.name


class _Sent:
    """What stands on the wire for ``published_at``: seconds since the epoch."""

    __slots__ = ("sent_at",)
    sent_at: float


@dataclass(frozen=True, slots=True)
class Event(_Sent):
    """One fact: something happened to a row, or somebody published something.

    Attributes:
        id: unique among all events of all processes.
        topic: name of the topic it arrived on.
        action: one of ``ACTIONS``.
        model: lower-case label of the model (``"shop.order"``), None for a published event.
        pk: the row's primary key as the model's own Python type (a tuple for a composite key).
        data: JSON value: what was published; the chosen ``fields`` of a row by name; for
            ``m2m_changed`` the keys ``field``, ``operation`` (add, remove or clear) and ``pks``;
            for ``gap`` the keys ``since``, ``until`` (ISO 8601 or None) and ``cause``.
        key: events with the same key are handled in order. Default: model and pk.
        source: ``node:pid`` of the publisher, or ``backend:PID`` for a NOTIFY sent without
            this package.
        published_at: when ``publish()`` or ``save()`` was called, an aware datetime in UTC.
        changed: names of the fields an update changed, None where that is not known.
        using: alias of the database it was heard from, None outside a listener.
    """

    id: str
    topic: str
    action: Action
    model: str | None
    pk: Any
    data: Any
    key: str | None
    source: str
    published_at: datetime
    changed: tuple[str, ...] | None = None
    using: str | None = None

    if not TYPE_CHECKING:  # where it would allow every name

        def __getattr__(self, name: str) -> Any:
            """Fill in what its draft has left out (see :class:`EventDraft`)."""
            if name == "published_at":
                value = datetime.fromtimestamp(self.sent_at, UTC)
            elif name == "key":
                value = default_key(self.model, self.pk)
            else:
                raise AttributeError(f"An Event has no {name!r}.", name=name, obj=self)
            object.__setattr__(self, name, value)
            return value

    def instance(self, using: str | None = None) -> Any:
        """The row as it is now, as a model instance; None once it is gone or if there is none."""
        query = self._row(using)
        return None if query is None else query.first()

    async def ainstance(self, using: str | None = None) -> Any:
        """As :meth:`instance`, for async receivers."""
        query = self._row(using)
        return None if query is None else await query.afirst()

    def _row(self, using: str | None) -> Any:
        if self.model is None or self.pk is None:
            return None
        from django.apps import apps

        rows = apps.get_model(self.model)._base_manager.all()
        alias = using or self.using
        if alias is not None:
            rows = rows.using(alias)
        return rows.filter(pk=self.pk)


def default_key(model: str | None, pk: Any) -> str | None:
    """The key of an event that was given none: its row."""
    return None if model is None else f"{model}:{pk}"


EVENT_FIELDS: tuple[str, ...] = tuple(Event.__dataclass_fields__)


class EventDraft(_Sent):
    """An Event that is being decoded: once filled, it is one by ``draft.__class__ = Event``.

    A frozen dataclass is filled through ``object.__setattr__``, field by field, which takes seven
    times as long. ``sent_at`` may be set instead of ``published_at``, and ``key`` left out where it
    is the default one of a row: Event makes them of it at their first use.
    """

    __slots__ = tuple(Event.__slots__)
    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...


class _EventIds:
    """Ids of the form ``<64 random bits>-<counter>``, the random part new in every process."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            # A forked child would otherwise count on from its parent under the same prefix.
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self._prefix = secrets.token_hex(8)
        self._counter = itertools.count(1)

    def __call__(self) -> str:
        return f"{self._prefix}-{next(self._counter):x}"


new_event_id = _EventIds()
