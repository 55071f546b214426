"""From the JSON objects of a frame to events: checked, and with defaults for what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, cast

from .events import ACTIONS, Event, EventDraft, new_event_id
from .exceptions import FrameError
from .wire import Reference, reference_of

_SENT_ACTIONS = frozenset(ACTIONS) - {"gap"}
_IS_ID = re.compile(r"[!-~]{1,64}").fullmatch  # it stands in logs
_FIRST_TIME = datetime(1, 1, 1, tzinfo=UTC).timestamp()
_LAST_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()

Resolve = Callable[[str, Any], tuple[str, Any]]


def event_from(
    raw: Any,
    *,
    topic: str,
    source: str,
    received_at: datetime,
    using: str | None = None,
    resolve: Resolve | None = None,
) -> Event:
    """Build the event that a frame's JSON object describes.

    What another program may leave out has a default: id, time, key, data.

    Args:
        resolve: given a model label and a primary key as JSON value, returns both as Django
            knows them, or raises FrameError if there is no such model or key.

    Raises:
        FrameError: a member has the wrong type or value.
    """
    return _event(raw, topic, source, received_at, using, resolve)


def events_from(
    raws: Iterable[Any],
    broken: Callable[[FrameError], None],
    *,
    topic: str,
    source: str,
    received_at: datetime,
    using: str | None = None,
    resolve: Resolve | None = None,
) -> list[Event | Reference]:
    """The events of one frame, or the references to them, in order.

    Args:
        broken: told of each that is wrong; it does not take the others of its frame with it.
    """
    found: list[Event | Reference] = []
    for raw in raws:
        try:
            if type(raw) is dict and "ref" in raw:
                found.append(reference_of(raw))
            else:
                found.append(_event(raw, topic, source, received_at, using, resolve))
        except FrameError as exc:
            broken(exc)
    return found


def _event(
    raw: Any,
    topic: str,
    source: str,
    received_at: datetime,
    using: str | None,
    resolve: Resolve | None,
) -> Event:
    # The longest part of an event's way to its receiver: no call that can be done without.
    if type(raw) is not dict:
        raise FrameError("an event is not a JSON object")
    get = raw.get
    action, model, pk, key, data = get("action"), get("model"), None, get("key"), get("data")
    if model is None:
        if action != "published" and action is not None:
            raise FrameError(
                f"an event is {action!r} and names no model"
                if type(action) is str and action in _SENT_ACTIONS
                else "an event has an unknown action"
            )
        action = "published"
    else:
        if action is None:
            action = "published"
        elif type(action) is not str or action not in _SENT_ACTIONS:
            raise FrameError("an event has an unknown action")
        if type(model) is not str:
            raise FrameError("an event's model is not text")
        pk = get("pk")
        if resolve is not None:
            model, pk = resolve(model, pk)
        if data is None:
            data = {}
    event = EventDraft()
    if key is not None or model is None:
        if key is not None and type(key) is not str:
            raise FrameError("an event's key is not text")
        event.key = key
    event_id = get("id")
    if event_id is None:
        event_id = new_event_id()
    elif type(event_id) is not str or not _IS_ID(event_id):
        raise FrameError("an event's id is not text of 1 to 64 visible ASCII characters")
    changed = get("changed")
    if changed is not None:
        if type(changed) is not list or not all(type(name) is str for name in changed):
            raise FrameError("an event's list of changed fields is not a list of text")
        changed = tuple(changed)
    at = get("at")
    if at is None:
        event.published_at = received_at
    elif type(at) is not float and type(at) is not int:
        raise FrameError("an event's time is not a number of seconds")
    elif _FIRST_TIME <= at <= _LAST_TIME:
        event.sent_at = at
    else:
        raise FrameError("an event's time is out of range")
    event.id = event_id
    event.topic = topic
    event.action = action
    event.model = model
    event.pk = pk
    event.data = data
    event.source = source
    event.changed = changed
    event.using = using
    event.__class__ = Event  # type: ignore[assignment]
    return cast("Event", event)


def foreign_event(
    value: Any, *, topic: str, source: str, received_at: datetime, using: str | None = None
) -> Event:
    """The event that a payload of somebody else's stands for."""
    return Event(
        new_event_id(),
        topic,
        "published",
        None,
        None,
        value,
        None,
        source,
        received_at,
        None,
        using,
    )


def gap_event(
    topic: str, *, since: datetime | None, until: datetime, cause: str, using: str | None = None
) -> Event:
    """The event that tells a receiver of ``topic`` that it may have missed something."""
    data = {
        "since": None if since is None else since.isoformat(),
        "until": until.isoformat(),
        "cause": cause,
    }
    return Event(
        new_event_id(), topic, "gap", None, None, data, None, "listener", until, None, using
    )
