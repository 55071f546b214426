"""Settings of the driver, the clients and the listeners: nothing that is not needed.

A process with ``BENCHMARK_DATABASE`` has that one database, as ``default``. The driver has one
alias for each variant that it measures beside the others. The app of a peer is there for its own
listener, and for the driver, which makes its tables and saves its rows. ``BENCHMARK_SETTINGS`` are
switched on. msgspec counts as not installed, unless ``BENCHMARK_FAST`` is set.

With ``BENCHMARK_CACHES`` a database has an epoch table in ``BENCHMARK_FOLDER``, so the processes
with the same two are a node.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

HOST = "127.0.0.1"
TEMPLATE = "template_of_benchmarks"
ALIASES = [f"variant{number}" for number in range(16)]

_PORT = os.environ.get("BENCHMARK_PORT", "0")
_DATABASE = os.environ.get("BENCHMARK_DATABASE")


def _entry(name: str) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": HOST,
        "PORT": _PORT,
        "USER": "postgres",
        "NAME": name,
    }


DATABASES = {"default": _entry(_DATABASE or TEMPLATE)}
if _DATABASE is None:
    DATABASES |= {alias: _entry(alias) for alias in ALIASES}

_CORE = "django.core.cache.backends"
CACHES = {"default": {"BACKEND": f"{_CORE}.locmem.LocMemCache"}}
if "BENCHMARK_CACHES" in os.environ:
    # Only where caches are measured: a table in use costs publishers a little.
    PGNOTIFY_EPOCH_TABLE = os.path.join(os.environ["BENCHMARK_FOLDER"], f"epochs-of-{_DATABASE}")
    CACHES["near"] = {"BACKEND": "django_pgnotify.caching.NearCache"}
    if "BENCHMARK_REDIS" in os.environ:
        CACHES["redis"] = {
            "BACKEND": f"{_CORE}.redis.RedisCache",
            "LOCATION": os.environ["BENCHMARK_REDIS"],
        }

SECRET_KEY = "of the benchmarks only"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_pgnotify", "benchmarks.shop"]

PUBSUB_INSTALLED = importlib.util.find_spec("pgpubsub") is not None
if PUBSUB_INSTALLED and (_DATABASE is None or os.environ.get("BENCHMARK_PEER") == "pubsub"):
    INSTALLED_APPS += ["pgtrigger", "pgpubsub", "benchmarks.peers.pubsub"]
    PGTRIGGER_INSTALL_ON_MIGRATE = True
    os.environ["PGPUBSUB_USE_PSYCOPG_V3"] = "True"

CHANNELS_POSTGRES_INSTALLED = importlib.util.find_spec("channels_postgres") is not None
if CHANNELS_POSTGRES_INSTALLED and (
    _DATABASE is None or os.environ.get("BENCHMARK_PEER") == "channels_postgres"
):
    INSTALLED_APPS += ["channels_postgres"]

if "BENCHMARK_FAST" not in os.environ:
    sys.modules["msgspec"] = None  # type: ignore[assignment]

globals().update(dict.fromkeys(os.environ.get("BENCHMARK_SETTINGS", "").split(), True))

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"django_pgnotify": {"handlers": ["console"], "level": "WARNING"}},
}
