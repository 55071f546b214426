"""The one table of the bus: events that were too big for a NOTIFY payload."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class StoredEvent(models.Model):
    """An event that travels by reference: its frame names this row.

    ``pglisten`` removes rows older than ``PGNOTIFY_STORED_RETENTION``.
    """

    id = models.BigAutoField(primary_key=True)
    body = models.TextField(help_text="The event as JSON text.")
    created_at = models.DateTimeField(db_default=Now(), db_index=True)

    class Meta:
        db_table = "pgnotify_stored_event"
        default_permissions = ()

    def __str__(self) -> str:
        return f"stored event {self.pk}"
