"""Settings of every process of a cache check; what takes a minute in production takes a second.

``CHECK_FOLDER`` is the node's own, with its epoch table and its files; what is in the database or
in Redis, the nodes share. Listeners connect by ``LISTEN_URL``, through the node's proxy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.settings import database_settings

FOLDER = Path(os.environ["CHECK_FOLDER"])
REDIS = os.environ.get("CHECK_REDIS")
NAIVE = "CHECK_NAIVE" in os.environ
CACHE_TABLE = "check_cache"
MAX_STALENESS = 2.0

DATABASES = {
    "default": database_settings(os.environ["DATABASE_URL"]),
    "listen": database_settings(os.environ.get("LISTEN_URL") or os.environ["DATABASE_URL"]),
}
for entry in DATABASES.values():
    # Where the way leads through a proxy that is cut: fail soon.
    entry["OPTIONS"].setdefault("connect_timeout", "2")
SECRET_KEY = "of the cache check only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_pgnotify", "tests.faults.caches"]

_NEAR = "django_pgnotify.caching.NearCache"
_CORE = "django.core.cache.backends"

CACHES: dict[str, dict[str, Any]] = {
    "default": {"BACKEND": f"{_CORE}.dummy.DummyCache"},
    "near": {
        "BACKEND": _NEAR,
        "LOCATION": "near",
        "TIMEOUT": None,
        "OPTIONS": {"MAX_STALENESS": MAX_STALENESS},
    },
    "near-database": {
        "BACKEND": _NEAR,
        "LOCATION": "near-database",
        "TIMEOUT": None,
        "OPTIONS": {"MAX_STALENESS": MAX_STALENESS, "SECOND_LEVEL": "database"},
    },
    "file": {
        "BACKEND": f"{_CORE}.filebased.FileBasedCache",
        "LOCATION": str(FOLDER / "file"),
        "TIMEOUT": None,
    },
    "database": {
        "BACKEND": f"{_CORE}.db.DatabaseCache",
        "LOCATION": CACHE_TABLE,
        "TIMEOUT": None,
    },
    "local": {"BACKEND": f"{_CORE}.locmem.LocMemCache", "LOCATION": "local", "TIMEOUT": None},
    "naive": {"BACKEND": f"{_CORE}.locmem.LocMemCache", "LOCATION": "naive", "TIMEOUT": None},
}
if REDIS:
    CACHES["redis"] = {
        "BACKEND": f"{_CORE}.redis.RedisCache",
        "LOCATION": REDIS,
        "TIMEOUT": None,
    }
    CACHES["near-redis"] = {
        "BACKEND": _NEAR,
        "LOCATION": "near-redis",
        "TIMEOUT": None,
        "OPTIONS": {"MAX_STALENESS": MAX_STALENESS, "SECOND_LEVEL": "redis"},
    }

PGNOTIFY_LISTEN_DATABASE = "listen"
PGNOTIFY_EPOCH_TABLE = None if os.environ.get("CHECK_LONE") else str(FOLDER / "epochs")
PGNOTIFY_MAX_STALENESS = MAX_STALENESS
PGNOTIFY_NODE = FOLDER.name
PGNOTIFY_HEARTBEAT_INTERVAL = 0.3
PGNOTIFY_HEARTBEAT_TIMEOUT = 0.5
PGNOTIFY_CONNECT_TIMEOUT = 1.0
PGNOTIFY_RECONNECT_MAX_DELAY = 0.3

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    # Failures on purpose are many.
    "loggers": {"django_pgnotify": {"handlers": ["console"], "level": "CRITICAL"}},
}
