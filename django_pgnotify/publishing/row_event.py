"""A change of a row: noted while it is saved, encoded when it leaves.

Inside a transaction the save pays for the note only. The encoding comes after the commit, in one
go for all events of the transaction, when the locks are gone; after a rollback it never comes.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ..events import Action, new_event_id
from ..exceptions import EventDataError
from ..registry import Publication
from ..stats import publishing_stats
from ..wire import Outgoing, encode_event
from .plain import ENCODER

logger = logging.getLogger("django_pgnotify.publishing")


class RowEvent:
    """An event of a model, as of now.

    Args:
        data: by name; its values are plain, and nobody changes them any more.
        pk: the primary key as a JSON value.
    """

    __slots__ = ("action", "at", "changed", "data", "event_id", "pk", "publication")

    def __init__(
        self,
        publication: Publication,
        action: Action,
        pk: Any,
        data: dict[str, Any],
        changed: tuple[str, ...] | None,
    ) -> None:
        self.publication = publication
        self.action: Action = action
        self.pk = pk
        self.data = data
        self.changed = changed
        self.event_id = new_event_id()
        self.at = time.time()

    def encode(self) -> Outgoing | None:
        """The event as it is sent: without its values where those cannot be carried.

        A row that changed in silence would be worse. None, and a report, where not even the
        primary key can be.
        """
        for data in (self.data, {}):
            try:
                return self._encode(data)
            except EventDataError as exc:
                report_change(self.publication, exc)
        return None

    def _encode(self, data: dict[str, Any]) -> Outgoing:
        publication = self.publication
        return encode_event(
            publication.topic,
            self.action,
            data=data,
            at=self.at,
            encoder=ENCODER,
            event_id=self.event_id,
            model=publication.label,
            pk=self.pk,
            changed=self.changed,
        )


def report_change(publication: Publication, exc: Exception) -> None:
    """Count and log a change that could not be published as it should."""
    publishing_stats.add("publish_failed")
    logger.error(
        "A change of %s could not be published as it should: %s",
        publication.label,
        exc,
        exc_info=exc,
        extra={"model": publication.label, "topic": publication.topic},
    )
