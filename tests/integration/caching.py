"""What tests of caches have in common: aliases of their own, with an epoch table of their own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from django.core.cache import InvalidCacheBackendError, caches

from django_pgnotify.caching.store import all_stores
from django_pgnotify.publishing.announcer import announcer

DEADLINE = 30.0
"""Seconds that a condition may take; spent only by a test that fails."""

NEAR = "django_pgnotify.caching.NearCache"

_pause = threading.Event()


@contextlib.contextmanager
def near_caches(settings: Any, folder: Path, **options: Any) -> Iterator[None]:
    """CACHES with ``near``, ``layered`` (over files), ``files`` and ``memory``."""
    settings.PGNOTIFY_EPOCH_TABLE = str(folder / "epochs")
    files = {
        "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
        "LOCATION": str(folder / "files"),
    }
    settings.CACHES = {
        "default": files,
        "near": {"BACKEND": NEAR, "OPTIONS": options},
        "layered": {
            "BACKEND": NEAR,
            "LOCATION": "layered",
            "OPTIONS": {"SECOND_LEVEL": "files", **options},
        },
        "files": files,
        "memory": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    }
    for store in all_stores():
        store.clear()
        store.forked()  # counts begin anew
    try:
        yield
    finally:
        with contextlib.suppress(InvalidCacheBackendError):
            caches["memory"].clear()
        announcer.close(DEADLINE)


def until(met: Callable[[], Any], timeout: float = DEADLINE) -> None:
    """Wait for what another thread or process brings about; it ends as soon as that is so."""
    ends = time.monotonic() + timeout
    while not met():
        assert time.monotonic() < ends, f"not within {timeout:g} s"
        _pause.wait(0.002)
