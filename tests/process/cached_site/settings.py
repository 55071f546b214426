"""The tests' settings with a near cache; ``SITE_FOLDER`` is the node's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.settings import *  # noqa: F403

FOLDER = Path(os.environ["SITE_FOLDER"])
ROOT_URLCONF = "tests.process.cached_site.pages"
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
DATABASE_ROUTERS = []  # that of the tests knows real models only
MAX_STALENESS = 3.0
CACHES: dict[str, dict[str, Any]] = {  # type: ignore[no-redef]
    "default": {
        "BACKEND": "django_pgnotify.caching.NearCache",
        "TIMEOUT": None,
        "OPTIONS": {"MAX_STALENESS": MAX_STALENESS},
    },
}
PGNOTIFY_EPOCH_TABLE = str(FOLDER / "epochs")
PGNOTIFY_HEARTBEAT_INTERVAL = 0.5
PGNOTIFY_HEARTBEAT_TIMEOUT = 1.0
