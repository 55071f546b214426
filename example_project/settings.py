"""Settings of the example: a coffee roaster's order board. For a demo on the loopback interface."""

import os
from pathlib import Path

import dj_database_url

BASE_DIR = Path(__file__).resolve().parent.parent
DEMO_DIR = Path(os.environ.get("DEMO_DIR", BASE_DIR / ".demo"))

# `make demo` leaves the address of its server here, so that `python manage.py shell` in a second
# terminal talks to the same one.
DATABASE_URL_FILE = DEMO_DIR / "database-url"


def _database_url() -> str:
    if url := os.environ.get("DATABASE_URL"):
        return url
    if DATABASE_URL_FILE.exists():
        return DATABASE_URL_FILE.read_text().strip()
    return "postgres://postgres@127.0.0.1:5432/shop"


SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-the-demo-on-this-machine")
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "django_pgnotify",
    "example_project.shop",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
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
            ],
        },
    },
]

ROOT_URLCONF = "example_project.urls"
ASGI_APPLICATION = "example_project.asgi.application"
LOGIN_URL = "admin:login"

DATABASES = {"default": dj_database_url.parse(_database_url(), conn_health_checks=True)}
# Under ASGI a request or an event would otherwise open a connection of its own each time.
DATABASES["default"].setdefault("OPTIONS", {})["pool"] = {
    "min_size": 1,
    "max_size": 8,
    "timeout": 10,
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# The bus needs nothing but the database above.
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "django_pgnotify.layers.PostgresChannelLayer",
        # The boards are told when they may have missed something, and show themselves anew.
        "CONFIG": {"gap_messages": ["orders"]},
    },
}

# In the memory of each process, and never stale: every hit is checked against the epoch table, a
# file that pglisten keeps. What a process does not have yet, another may have left in the files.
CACHES = {
    "default": {
        "BACKEND": "django_pgnotify.caching.NearCache",
        "OPTIONS": {"SECOND_LEVEL": "files"},
    },
    "files": {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": DEMO_DIR / "cache",
    },
}
DEMO_DIR.mkdir(parents=True, exist_ok=True)
PGNOTIFY_EPOCH_TABLE = DEMO_DIR.resolve() / "epochs"

LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"format": "{levelname:<7} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "short"}},
    "loggers": {
        name: {"handlers": ["console"], "level": "INFO", "propagate": False}
        for name in ("django_pgnotify", "example_project")
    },
}

# Shown on the board: which of the web processes served it, and where the others are.
WEB_NAME = os.environ.get("WEB_NAME", "web")
WEB_PEERS = [
    peer.replace("_", " ").split("=", 1) for peer in os.environ.get("WEB_PEERS", "").split()
]
