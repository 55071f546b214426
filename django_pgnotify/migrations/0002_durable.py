"""The tables of durable topics: the event log, its consumers, and dead letters."""

from typing import Any

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import ProjectState

import django_pgnotify.models


class OnPostgreSQL(migrations.SeparateDatabaseAndState):
    """Operations that leave the other databases of a project alone."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, from_state, to_state)


TABLES: list[Any] = [
    migrations.CreateModel(
        name="Consumer",
        fields=[
            (
                "id",
                models.BigAutoField(
                    auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                ),
            ),
            (
                "name",
                models.TextField(
                    help_text="dispatch_uid of the receiver, or its name", unique=True
                ),
            ),
            ("topics", models.JSONField(default=list)),
            ("paused", models.BooleanField(default=False)),
            (
                "holder",
                models.TextField(default="", help_text="node:pid of the pglisten that runs it"),
            ),
            (
                "claim",
                models.BigIntegerField(
                    default=0,
                    help_text="Counts who has run it; whoever is not the last must not write.",
                ),
            ),
            (
                "revision",
                models.BigIntegerField(
                    default=0, help_text="Counts how often it was set by an operator."
                ),
            ),
            ("snapshot", models.TextField()),
            ("target", models.TextField(default="")),
            ("position", models.BigIntegerField(default=0)),
            (
                "epoch",
                models.TextField(help_text="Which server and database the cursor belongs to."),
            ),
            (
                "resync",
                models.TextField(default="", help_text="Why it waits for somebody to decide."),
            ),
            ("gap_since", models.DateTimeField(null=True)),
            ("gap_until", models.DateTimeField(null=True)),
            (
                "gap_cause",
                models.TextField(default="", help_text="What the receiver is to be told next."),
            ),
            (
                "gap_events",
                models.BigIntegerField(default=0, help_text="Events that it never got."),
            ),
            ("handled", models.BigIntegerField(default=0)),
            (
                "created_at",
                models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
            ),
            (
                "moved_at",
                models.DateTimeField(
                    db_default=django.db.models.functions.datetime.Now(),
                    help_text="When the cursor last moved.",
                ),
            ),
        ],
        options={
            "db_table": "pgnotify_consumer",
            "default_permissions": ("view", "change", "delete"),
        },
    ),
    migrations.CreateModel(
        name="LoggedEvent",
        fields=[
            ("id", models.BigAutoField(primary_key=True, serialize=False)),
            (
                "xid",
                django_pgnotify.models.XidField(
                    db_default=django_pgnotify.models.CurrentXid(), verbose_name="transaction"
                ),
            ),
            ("topic", models.TextField()),
            ("key", models.TextField(null=True)),
            ("source", models.TextField(help_text="node:pid of the publisher")),
            ("body", models.TextField(help_text="The event as JSON text.")),
            (
                "created_at",
                models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
            ),
        ],
        options={
            "verbose_name": "logged event",
            "db_table": "pgnotify_event_log",
            "default_permissions": ("view",),
            "indexes": [models.Index(fields=["topic", "xid", "id"], name="pgnotify_event_log_new")],
        },
    ),
    migrations.CreateModel(
        name="DeadLetter",
        fields=[
            (
                "id",
                models.BigAutoField(
                    auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                ),
            ),
            ("event_id", models.BigIntegerField(help_text="Its id in the event log.")),
            ("topic", models.TextField()),
            ("key", models.TextField(null=True)),
            ("source", models.TextField()),
            ("body", models.TextField(help_text="The event as JSON text.")),
            (
                "published_at",
                models.DateTimeField(help_text="When the event was written to the log."),
            ),
            ("attempts", models.IntegerField(default=0)),
            ("retry_at", models.DateTimeField(blank=True, null=True)),
            ("failed_at", models.DateTimeField(blank=True, null=True)),
            (
                "error",
                models.TextField(
                    blank=True, default="", help_text="Traceback of the last attempt."
                ),
            ),
            (
                "consumer",
                models.ForeignKey(
                    on_delete=django.db.models.deletion.CASCADE,
                    related_name="dead_letters",
                    to="django_pgnotify.consumer",
                ),
            ),
        ],
        options={
            "db_table": "pgnotify_dead_letter",
            "default_permissions": ("view", "change", "delete"),
            "indexes": [
                models.Index(fields=["consumer", "retry_at"], name="pgnotify_dead_letter_due")
            ],
            "constraints": [
                models.UniqueConstraint(
                    fields=("consumer", "event_id"), name="pgnotify_dead_letter_once"
                )
            ],
        },
    ),
]

# The log is only ever written at its end and deleted from its beginning, so a block range index
# of a few pages finds a stretch of time. Vacuum comes often and has little to do each time; the
# insert threshold keeps the visibility map fresh for index-only scans of a backlog.
TUNING = migrations.RunSQL(
    [
        """
        CREATE INDEX pgnotify_event_log_time ON pgnotify_event_log
        USING brin (created_at) WITH (pages_per_range = 32)
        """,
        """
        ALTER TABLE pgnotify_event_log SET (
            autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000,
            autovacuum_vacuum_insert_scale_factor = 0.01,
            autovacuum_vacuum_insert_threshold = 50000
        )
        """,
        # A cursor moves many times a second: room on its page keeps each update heap-only.
        """
        ALTER TABLE pgnotify_consumer SET (
            fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500
        )
        """,
    ],
    migrations.RunSQL.noop,
)


class Migration(migrations.Migration):
    dependencies = [("django_pgnotify", "0001_initial")]

    operations = [
        OnPostgreSQL(database_operations=[*TABLES, TUNING], state_operations=TABLES),
    ]
