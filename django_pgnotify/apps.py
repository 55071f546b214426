"""The application: connects model signals, finds receivers, registers the system checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class PgNotifyConfig(AppConfig):
    name = "django_pgnotify"
    label = "django_pgnotify"
    verbose_name = "PostgreSQL notifications"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks
        from .publishing import model_signals

        checks.register()
        model_signals.track_configured_models()
        autodiscover_modules("receivers")
