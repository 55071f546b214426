"""The tables of the channel layer: messages that NOTIFY cannot keep or carry, and members."""

import importlib
from typing import Any

from django.db import migrations, models

OnPostgreSQL = importlib.import_module("django_pgnotify.migrations.0002_durable").OnPostgreSQL

TABLES: list[Any] = [
    migrations.CreateModel(
        name="LayerMessage",
        fields=[
            ("id", models.BigAutoField(primary_key=True, serialize=False)),
            ("layer", models.TextField(help_text="Wire channel of the layer.")),
            (
                "channel",
                models.TextField(help_text="Empty where the message travels by reference."),
            ),
            ("body", models.BinaryField()),
            ("expires_at", models.DateTimeField()),
        ],
        options={"db_table": "pgnotify_layer_message", "default_permissions": ()},
    ),
    migrations.CreateModel(
        name="LayerMember",
        fields=[
            ("id", models.BigAutoField(primary_key=True, serialize=False)),
            ("layer", models.TextField(help_text="Wire channel of the layer.")),
            ("group_name", models.TextField()),
            ("channel", models.TextField()),
            ("expires_at", models.DateTimeField()),
        ],
        options={"db_table": "pgnotify_layer_member", "default_permissions": ()},
    ),
    migrations.AddIndex(
        model_name="layermessage",
        index=models.Index(fields=["layer", "channel", "id"], name="pgnotify_layer_message_next"),
    ),
    migrations.AddIndex(
        model_name="layermessage",
        index=models.Index(fields=["expires_at"], name="pgnotify_layer_message_old"),
    ),
    migrations.AddIndex(
        model_name="layermember",
        index=models.Index(fields=["expires_at"], name="pgnotify_layer_member_old"),
    ),
    migrations.AddConstraint(
        model_name="layermember",
        constraint=models.UniqueConstraint(
            fields=["layer", "group_name", "channel"], name="pgnotify_layer_member_once"
        ),
    ),
]


# What a layer loses when the server crashes it may lose, so it need not be written twice. Rows come
# and go all the time: vacuum comes often, and has little to do each time.
TUNING = migrations.RunSQL(
    [
        "ALTER TABLE pgnotify_layer_message SET UNLOGGED",
        """
        ALTER TABLE pgnotify_layer_message SET (
            autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000
        )
        """,
        "ALTER TABLE pgnotify_layer_member SET UNLOGGED",
    ],
    migrations.RunSQL.noop,
)


class Migration(migrations.Migration):
    dependencies = [("django_pgnotify", "0002_durable")]

    operations = [
        OnPostgreSQL(database_operations=TABLES, state_operations=TABLES),
        OnPostgreSQL(database_operations=[TUNING]),
    ]
