"""The tests' settings, served: started with the environment of ``database_environ()``."""

from __future__ import annotations

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS as _APPS

DEBUG = True  # for the static files
INSTALLED_APPS = [*_APPS, "django.contrib.staticfiles"]
ROOT_URLCONF = "tests.process.live.urls"
ALLOWED_HOSTS = ["127.0.0.1"]
STATIC_URL = "static/"
MIDDLEWARE = [
    "django.middleware.gzip.GZipMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "tests.process.live.urls.SyncMiddleware",
]
PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
