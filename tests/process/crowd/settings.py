"""The tests' settings, and a layer whose consumers are told of gaps."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS as _INSTALLED_APPS

INSTALLED_APPS = [*_INSTALLED_APPS, "tests.process.crowd"]
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "django_pgnotify.layers.PostgresChannelLayer",
        "CONFIG": {
            "prefix": os.environ.get("CROWD_PREFIX", "crowd"),
            "gap_messages": True,
            # Nothing is dropped because two cores are slow: only a gap may lose messages here.
            "capacity": 10_000,
        },
    }
}
PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
