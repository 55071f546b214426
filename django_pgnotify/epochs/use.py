"""Whether this project has caches that depend on the epoch table, which costs a little to keep."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.utils.module_loading import import_string

from ..conf import AUTO, conf
from ..exceptions import PgNotifyError
from .node import table_path

HEARTBEATS = 3
"""Heartbeats within the least MAX_STALENESS of all caches."""

_LOOK_EVERY = 1.0

_declared = False
_looked_at = float("-inf")
_found = False


@receiver(setting_changed)
def _look_again(**kwargs: Any) -> None:
    """In tests, settings change while the process runs."""
    global _looked_at
    _looked_at = float("-inf")


def declare_use() -> None:
    """Something of this process, such as ``cached``, depends on the table."""
    global _declared
    _declared = True


def is_in_use() -> bool:
    """Whether the table is to be kept: a cache of CACHES uses it, a setting names it, something in
    this process has declared to use it, or a process of this node has made its file."""
    global _looked_at, _found
    if _declared:
        return True
    now = time.monotonic()
    if now - _looked_at >= _LOOK_EVERY:
        _looked_at, _found = now, _is_configured() or _has_file()
    return _found


def is_declared() -> bool:
    """As :func:`is_in_use`, without a look at what other processes have made."""
    return _declared or _is_configured()


def heartbeat_interval() -> float | None:
    """Seconds between two heartbeats at most, so that no healthy one is too old for any cache."""
    limits = staleness_limits().values()
    return min(limits) / HEARTBEATS if limits else None


def staleness_limits() -> dict[str, float]:
    """MAX_STALENESS in seconds by alias, of caches with one of their own; of all others by ""."""
    try:
        found = {"": conf.MAX_STALENESS}
    except PgNotifyError:
        return {}  # a system check says so
    for alias, config in settings.CACHES.items():
        if uses_epochs(config.get("BACKEND")):
            options: Any = config.get("OPTIONS") or {}
            own = options.get("MAX_STALENESS")
            found[alias] = own if isinstance(own, (int, float)) and own > 0 else None
    return {alias: limit for alias, limit in found.items() if limit is not None}


def _is_configured() -> bool:
    try:
        if conf.EPOCH_TABLE != AUTO:
            return True
    except PgNotifyError:
        return False  # a system check says so
    return any(uses_epochs(config.get("BACKEND")) for config in settings.CACHES.values())


def look_up_backends() -> None:
    """Import the backends of CACHES: at the start, because it is asked for at each publication.

    A process forked while another thread imports would wait for the lock of that import for ever.
    """
    for config in settings.CACHES.values():
        uses_epochs(config.get("BACKEND"))


def uses_epochs(backend: object) -> bool:
    """Whether a BACKEND of CACHES names one that checks epochs."""
    return isinstance(backend, str) and _checks_epochs(backend)


@lru_cache
def _checks_epochs(backend: str) -> bool:
    try:
        return bool(getattr(import_string(backend), "uses_epochs", False))
    except ImportError:
        return False


def _has_file() -> bool:
    try:
        path = table_path()
    except PgNotifyError:
        return False
    return path is not None and os.path.exists(path)
