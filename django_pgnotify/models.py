"""The tables of the bus: what NOTIFY cannot carry, and what must not be lost.

Those of durable topics (migration 0002) and of the channel layer (0003) are on PostgreSQL only.
"""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
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


class XidField(models.BigIntegerField):  # type: ignore[type-arg]
    """A transaction id of 64 bits, which never wraps around (``xid8``)."""

    def db_type(self, connection: BaseDatabaseWrapper) -> str:
        return "xid8"

    def from_db_value(self, value: Any, *args: Any) -> int | None:
        return None if value is None else int(value)


class CurrentXid(models.Func):
    """The id of the transaction that writes."""

    template = "%(function)s()"
    function = "pg_current_xact_id"
    output_field = XidField()


class LoggedEvent(models.Model):
    """An event of a durable topic, written in the transaction that it tells of."""

    # Ids are given out before a transaction commits, so neither their order nor that of the xids
    # is the order of commits: see durable/cursor.py for how the log is read.
    id = models.BigAutoField(primary_key=True)
    xid = XidField("transaction", db_default=CurrentXid())
    topic = models.TextField()
    key = models.TextField(null=True)  # noqa: DJ001 - an event without a key has none
    source = models.TextField(help_text="node:pid of the publisher")
    # Text and not jsonb: nobody looks into it in SQL, it is smaller, and quicker to read.
    body = models.TextField(help_text="The event as JSON text.")
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "pgnotify_event_log"
        default_permissions = ("view",)
        verbose_name = "logged event"
        indexes = (models.Index(fields=["topic", "xid", "id"], name="pgnotify_event_log_new"),)

    def __str__(self) -> str:
        return f"event {self.pk} of {self.topic}"


class Consumer(models.Model):
    """A durable receiver, and how far it has come in the log."""

    name = models.TextField(unique=True, help_text="dispatch_uid of the receiver, or its name")
    topics: models.JSONField[Any, Any] = models.JSONField(default=list)
    paused = models.BooleanField(default=False)
    holder = models.TextField(default="", help_text="node:pid of the pglisten that runs it")
    claim = models.BigIntegerField(
        default=0, help_text="Counts who has run it; whoever is not the last must not write."
    )
    revision = models.BigIntegerField(
        default=0, help_text="Counts how often it was set by an operator."
    )
    # The cursor. Everything visible in `snapshot` is behind it. In the middle of a sweep `target`
    # is the snapshot that the sweep goes up to, and `position` the last id it has handled.
    snapshot = models.TextField()
    target = models.TextField(default="")
    position = models.BigIntegerField(default=0)
    epoch = models.TextField(help_text="Which server and database the cursor belongs to.")
    resync = models.TextField(default="", help_text="Why it waits for somebody to decide.")
    gap_since = models.DateTimeField(null=True)
    gap_until = models.DateTimeField(null=True)
    gap_cause = models.TextField(default="", help_text="What the receiver is to be told next.")
    gap_events = models.BigIntegerField(default=0, help_text="Events that it never got.")
    handled = models.BigIntegerField(default=0)
    created_at = models.DateTimeField(db_default=Now())
    moved_at = models.DateTimeField(db_default=Now(), help_text="When the cursor last moved.")

    held: bool | None = None
    """Whether a process has its lock, where that was looked up: ``holder`` outlives a SIGKILL."""

    class Meta:
        db_table = "pgnotify_consumer"
        default_permissions = ("view", "change", "delete")

    def __str__(self) -> str:
        return self.name


class DeadLetter(models.Model):
    """An event that a consumer is to get outside the order of the log, or never got.

    With ``retry_at`` it is waiting: it failed and will be tried again, or somebody asked for it.
    Without, all attempts are used up, and it stays until it is requeued or discarded.
    """

    consumer = models.ForeignKey(Consumer, on_delete=models.CASCADE, related_name="dead_letters")
    event_id = models.BigIntegerField(help_text="Its id in the event log.")
    topic = models.TextField()
    key = models.TextField(null=True)  # noqa: DJ001 - an event without a key has none
    source = models.TextField()
    body = models.TextField(help_text="The event as JSON text.")
    published_at = models.DateTimeField(help_text="When the event was written to the log.")
    attempts = models.IntegerField(default=0)
    retry_at = models.DateTimeField(null=True, blank=True)
    failed_at = models.DateTimeField(null=True, blank=True)
    error = models.TextField(default="", blank=True, help_text="Traceback of the last attempt.")

    class Meta:
        db_table = "pgnotify_dead_letter"
        default_permissions = ("view", "change", "delete")
        constraints = (
            models.UniqueConstraint(
                fields=["consumer", "event_id"], name="pgnotify_dead_letter_once"
            ),
        )
        indexes = (models.Index(fields=["consumer", "retry_at"], name="pgnotify_dead_letter_due"),)

    def __str__(self) -> str:
        return f"event {self.event_id} of {self.topic} for {self.consumer.name}"


class LayerMessage(models.Model):
    """A message of the channel layer: to a normal channel, or too large for a NOTIFY.

    The table is not logged (migration 0003): a layer may lose messages when the server crashes,
    and these do not outlive their ``expiry``.
    """

    id = models.BigAutoField(primary_key=True)
    layer = models.TextField(help_text="Wire channel of the layer.")
    channel = models.TextField(help_text="Empty where the message travels by reference.")
    body = models.BinaryField()
    expires_at = models.DateTimeField()

    class Meta:
        db_table = "pgnotify_layer_message"
        default_permissions = ()
        indexes = (
            models.Index(fields=["layer", "channel", "id"], name="pgnotify_layer_message_next"),
            models.Index(fields=["expires_at"], name="pgnotify_layer_message_old"),
        )

    def __str__(self) -> str:
        return f"message {self.pk}"


class LayerMember(models.Model):
    """A normal channel that is in a group of the channel layer; not logged either."""

    id = models.BigAutoField(primary_key=True)
    layer = models.TextField(help_text="Wire channel of the layer.")
    group_name = models.TextField()
    channel = models.TextField()
    expires_at = models.DateTimeField()

    class Meta:
        db_table = "pgnotify_layer_member"
        default_permissions = ()
        constraints = (
            models.UniqueConstraint(
                fields=["layer", "group_name", "channel"], name="pgnotify_layer_member_once"
            ),
        )
        indexes = (models.Index(fields=["expires_at"], name="pgnotify_layer_member_old"),)

    def __str__(self) -> str:
        return f"{self.channel} in {self.group_name}"
