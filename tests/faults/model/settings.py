"""Settings of the writers and the listeners of a model check; the timing is short."""

from __future__ import annotations

import os

from tests.settings import database_settings

DATABASES = {"default": database_settings(os.environ["DATABASE_URL"])}
SECRET_KEY = "of the model check only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_pgnotify", "tests.faults.model"]

PGNOTIFY_SWEEP_INTERVAL = 0.2
PGNOTIFY_LEADER_POLL_INTERVAL = 0.1
PGNOTIFY_RECONNECT_MAX_DELAY = 0.5
PGNOTIFY_CONNECT_TIMEOUT = 2.0

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    # Failures on purpose come with a traceback each.
    "loggers": {"django_pgnotify": {"handlers": ["console"], "level": "CRITICAL"}},
}
