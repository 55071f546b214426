"""The tests' settings with a NearCache, and the epoch table of the environment."""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import CACHES

CACHES["near"] = {"BACKEND": "django_pgnotify.caching.NearCache"}
PGNOTIFY_EPOCH_TABLE = os.environ["EPOCH_TABLE"] or None
PGNOTIFY_HEARTBEAT_INTERVAL = 1.0
if os.environ.get("NEVER_BYPASSED"):
    PGNOTIFY_MAX_STALENESS = None
