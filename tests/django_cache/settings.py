"""The settings that Django's tests expect of ``tests/runtests.py``, on the database of ours."""

from __future__ import annotations

import os
from typing import Any

from tests.settings import DATABASES as _DATABASES

DATABASES = {"default": {**_DATABASES["default"]}}
INSTALLED_APPS = ["django.contrib.contenttypes", "django_pgnotify"]
# Not in the pglisten of the run, which has no use for Django's tests.
if os.environ.get("DJANGO_CACHE_TESTS"):
    INSTALLED_APPS.append("cache")
    # Several runs share the database: what one creates is temporary, and nobody else's.
    _options = DATABASES["default"]["OPTIONS"]
    DATABASES["default"]["OPTIONS"] = {**_options, "options": "-c search_path=pg_temp,public"}

SECRET_KEY = "of the tests only"
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
LANGUAGE_CODE = "en"
ROOT_URLCONF = __name__
urlpatterns: list[object] = []
STATIC_URL = "static/"
MIDDLEWARE: list[str] = []
TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.debug",
                "django.template.context_processors.request",
            ]
        },
    }
]

PGNOTIFY_EPOCH_TABLE = os.environ.get("EPOCH_TABLE")
PGNOTIFY_HEARTBEAT_INTERVAL = 1.0
