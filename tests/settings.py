"""Django settings of the tests and of the processes that tests start.

The server comes from the environment: ``DATABASE_URL`` for ``default`` and
``OTHER_DATABASE_URL`` for ``other`` (by default a second database of the same
server). :mod:`tests.plugin` sets the first one before these settings are read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

DATABASE_VARIABLES = {"default": "DATABASE_URL", "other": "OTHER_DATABASE_URL"}


def database_settings(url: str) -> dict[str, Any]:
    """The ``DATABASES`` entry of a ``postgresql://`` URL; its query becomes OPTIONS."""
    parts = urlsplit(url)
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ValueError(f"not a PostgreSQL URL: scheme {parts.scheme!r}")
    query = dict(parse_qsl(parts.query))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")) or "postgres",
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        # A unix socket's directory has no place in a URL's authority.
        "HOST": query.pop("host", None) or parts.hostname or "",
        "PORT": str(parts.port or ""),
        "OPTIONS": query,
    }


def database_url(entry: Mapping[str, Any]) -> str:
    """The inverse of :func:`database_settings`."""
    host, options = entry["HOST"], dict(entry["OPTIONS"])
    if host.startswith("/"):
        options["host"], host = host, ""
    elif ":" in host:
        host = f"[{host}]"
    userinfo = quote(entry["USER"], safe="")
    if entry["PASSWORD"]:
        userinfo += ":" + quote(entry["PASSWORD"], safe="")
    netloc = (f"{userinfo}@" if userinfo else "") + host
    if entry["PORT"]:
        netloc += f":{entry['PORT']}"
    query = f"?{urlencode(options)}" if options else ""
    return f"postgresql://{netloc}/{quote(entry['NAME'], safe='')}{query}"


_default = database_settings(
    os.environ.get("DATABASE_URL") or "postgresql://postgres@127.0.0.1/pgnotify"
)
if url := os.environ.get("OTHER_DATABASE_URL"):
    _other = database_settings(url)
else:
    _other = {**_default, "NAME": f"{_default['NAME']}_other"}

DATABASES = {
    "default": _default,
    "other": _other,
    # Not PostgreSQL: what the system checks and the publisher must refuse.
    "lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
DATABASE_ROUTERS = ["tests.testapp.routers.Router"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

SECRET_KEY = "of the tests only"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
TIME_ZONE = "UTC"
STATIC_URL = "static/"
ROOT_URLCONF = "tests.urls"
# Fast, and nothing here is secret.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "channels",
    "django_pgnotify",
    "tests.testapp",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# A directory of the session, which the processes that tests start share.
_scratch = Path(os.environ.get("PGNOTIFY_TEST_DIR") or tempfile.gettempdir()) / "pgnotify"
MEDIA_ROOT = _scratch / "media"
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": str(_scratch / "cache"),
    },
    "local": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
}
CHANNEL_LAYERS: dict[str, Any] = {
    "default": {"BACKEND": "django_pgnotify.layers.PostgresChannelLayer"},
    "memory": {"BACKEND": "channels.layers.InMemoryChannelLayer"},
}

PGNOTIFY_MODELS = {
    "auth.User": {"fields": ["username", "is_active"], "topic": "people"},
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"django_pgnotify": {"handlers": ["console"], "level": "INFO"}},
}
