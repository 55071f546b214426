"""Events that could not be sent after their commit: counted, logged, and announced to caches."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from django.db.backends.base.base import BaseDatabaseWrapper

from ..epochs.use import is_in_use
from ..stats import publishing_stats
from ..wire import Outgoing
from .announcer import announcer
from .committed import bump, names_of_events
from .sender import lost_backend

logger = logging.getLogger("django_pgnotify.publishing")


def report_unsent(events: Sequence[Outgoing], using: str, exc: Exception) -> None:
    """Count and log events that could not be sent after their commit; payloads are not logged.

    No listener knows of them, so none would tell its caches by a gap: what they invalidate is sent
    again, until it arrives.
    """
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
    announce_events(events)


def in_doubt(names: set[str], connection: BaseDatabaseWrapper) -> None:
    """A statement that would have changed rows failed: unless the server said so itself, what they
    invalidate is stale, and once more when the server has certainly come to an end with it."""
    pid = lost_backend(connection)
    if names and pid is not None:
        bump(names)
        announcer.put(names, behind=pid)


def announce_events(events: Sequence[Outgoing]) -> None:
    """Have what events invalidate told to all nodes, since the events themselves will not be."""
    names = names_of_events(events) if is_in_use() else set()
    if names:
        announcer.put(names)
