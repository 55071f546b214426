"""Settings of the publisher and the listeners of a fault run: small, so that they start quickly.

The timing is short, so that what takes a minute in production takes a second here.
"""

from __future__ import annotations

import os

from tests.settings import database_settings

DATABASES = {"default": database_settings(os.environ["DATABASE_URL"])}
SECRET_KEY = "of the fault runs only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_pgnotify", "tests.faults.project"]
# Where DATABASE_URL leads to a proxy that is cut: fail soon, as the listener does.
DATABASES["default"]["OPTIONS"].setdefault("connect_timeout", "2")

if os.environ.get("PGNOTIFY_FAULTS_MEMORY") is None:
    PGNOTIFY_HEARTBEAT_INTERVAL = 0.5
    PGNOTIFY_HEARTBEAT_TIMEOUT = 0.5
    PGNOTIFY_CONNECT_TIMEOUT = 1.0
    PGNOTIFY_RECONNECT_MAX_DELAY = 0.5
    PGNOTIFY_LEADER_POLL_INTERVAL = 0.2
    # Small enough for floods to overflow it.
    PGNOTIFY_QUEUE_MAX_EVENTS = 3000

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "filters": {"quiet": {"()": "tests.faults.project.recording.NoFailures"}},
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "filters": ["quiet"],
        },
        "record": {"class": "tests.faults.project.recording.LeadershipHandler"},
    },
    "loggers": {
        "django_pgnotify": {"handlers": ["console", "record"], "level": "INFO"},
        # Errors on purpose, thousands of them; the publisher counts what it could not send.
        "django_pgnotify.publishing": {"level": "CRITICAL"},
    },
}
