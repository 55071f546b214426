"""The application: connects model signals, finds receivers, registers the system checks."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_migrate
from django.utils.module_loading import autodiscover_modules


class PgNotifyConfig(AppConfig):
    name = "django_pgnotify"
    label = "django_pgnotify"
    verbose_name = "PostgreSQL notifications"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks
        from .epochs.use import look_up_backends
        from .publishing import model_signals

        checks.register()
        look_up_backends()
        post_migrate.connect(_register_consumers, sender=self, dispatch_uid="django_pgnotify")
        model_signals.track_configured_models()
        autodiscover_modules("receivers")


def _register_consumers(using: str, apps: Any = None, **kwargs: Any) -> None:
    """Durable consumers exist from ``migrate`` on: what is published before the first
    ``pglisten`` starts, they will get."""
    from .conf import conf
    from .durable.state import register
    from .registry import registry

    if apps is not None and "consumer" not in apps.all_models["django_pgnotify"]:
        return  # migrated back to before there were any
    if using != conf.rows_database(conf.listen_database):
        return
    for receiver in registry.receivers:
        topics = registry.durable_topics(receiver, conf.DELIVERY)
        if topics:
            register(receiver.uid, topics, receiver.start, using)
