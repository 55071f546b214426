"""Read your own writes: at its commit, what an event invalidates is stale on the writer's node.

Not before the commit: a value that is loaded between the two would be the old one with the new
epoch. And if nobody knows whether a COMMIT took place, all the same: to bump for nothing costs a
miss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ..epochs.names import EVERYTHING
from ..epochs.node import node_table
from ..epochs.rules import heard_topics, names_of
from ..epochs.use import is_in_use
from ..events import default_key
from ..wire import Outgoing
from .buffer import Noted, Run
from .row_event import RowEvent

logger = logging.getLogger("django_pgnotify.caching")


def committed(runs: Iterable[Run]) -> None:
    """The events of ``runs`` have been committed."""
    bump(names_of_events(events_of(runs)))


def bump(names: set[str]) -> None:
    """Make ``names`` stale on this node. Never raises: the commit stands."""
    if not names:
        return
    try:
        if EVERYTHING in names:
            node_table().bump_all()
        else:
            node_table().bump(names)
    except Exception:
        logger.exception("The epoch table could not be bumped after a commit")


def events_of(runs: Iterable[Run]) -> list[Noted]:
    """The events of ``runs``, to be looked at once they are committed.

    None where nobody on this node asks for what they invalidate.
    """
    runs = list(runs)
    try:
        if not runs or not is_in_use():
            return []
    except Exception:  # a commit must not fail for its caches
        logger.exception("Whether anybody depends on the epoch table cannot be told")
    for run in runs:
        run.told = True
    return [event for run in runs for event in (*run.sent, *run.events)]


def names_of_events(events: Iterable[Noted]) -> set[str]:
    """What ``events`` invalidate; everything, where one of them cannot be read."""
    names: set[str] = set()
    topics: set[str] | None = None
    for event in events:
        try:
            if isinstance(event, RowEvent):
                names.update(_names_of_row(event))
            elif isinstance(event, Outgoing):
                topics = heard_topics() if topics is None else topics
                if event.topic in topics:
                    names.update(_names_of_body(event))
        except Exception:
            logger.exception("What an event invalidates cannot be told, so everything is")
            names.add(EVERYTHING)
    return names


def _names_of_row(event: RowEvent) -> Sequence[str]:
    publication = event.publication
    return names_of(
        publication.topic, event.action, publication.label, event.pk, partial(_row_fields, event)
    )


def _row_fields(event: RowEvent) -> dict[str, Any]:
    publication = event.publication
    return _fields(
        {
            "id": event.event_id,
            "action": event.action,
            "model": publication.label,
            "pk": event.pk,
            "data": event.data,
            "changed": event.changed,
        },
        publication.topic,
    )


def _names_of_body(event: Outgoing) -> Sequence[str]:
    body = json.loads(event.body)
    fields = _fields(body, event.topic)
    return names_of(event.topic, body["action"], body.get("model"), body.get("pk"), lambda: fields)


def _fields(body: dict[str, Any], topic: str) -> dict[str, Any]:
    """The fields of an event as a listener has them, of what it is sent as."""
    pk, model, changed = body.get("pk"), body.get("model"), body.get("changed")
    return {
        "id": body["id"],
        "topic": topic,
        "action": body["action"],
        "model": model,
        "pk": tuple(pk) if isinstance(pk, list) else pk,
        "data": body.get("data"),
        "key": body.get("key") or default_key(model, pk),
        "source": "",
        "published_at": None,
        "changed": None if changed is None else tuple(changed),
        "using": None,
    }


def pending_names(runs: Sequence[Run]) -> set[str]:
    """What the commit of the open transaction will invalidate."""
    return names_of_events(event for run in runs for event in (*run.sent, *run.events))
