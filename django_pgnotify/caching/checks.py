"""What is wrong with a project's caches, for the system checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage

from ..conf import conf
from ..epochs.node import node_table, table_path
from ..epochs.use import HEARTBEATS, heartbeat_interval, is_declared, uses_epochs
from ..exceptions import PgNotifyError
from .cached import cached_functions
from .options import NearOptions

PER_PROCESS = (
    "django.core.cache.backends.locmem.LocMemCache",
    "django.core.cache.backends.dummy.DummyCache",
)

FREQUENT = 0.3
"""Seconds between two heartbeats below which they are worth a word."""


def check_caches() -> Iterator[CheckMessage]:
    """The aliases of CACHES that check epochs, ``cached`` functions, and the epoch table."""
    try:
        _ = conf.MAX_STALENESS, table_path()
    except PgNotifyError:
        return  # E003 says so
    for alias, config in settings.CACHES.items():
        if uses_epochs(config.get("BACKEND")):
            yield from _check_alias(alias, config)
    for function in cached_functions():
        try:
            function.check()
        except PgNotifyError as exc:
            yield checks.Error(
                f"cached function {function.__name__!r}: {exc}",
                hint="It raises this when it is called.",
                id="pgnotify.E008",
            )
        if function.cache not in settings.CACHES:
            yield checks.Error(
                f"cached function {function.__name__!r}: CACHES has no alias {function.cache!r}.",
                hint=f"Choose from {', '.join(map(repr, settings.CACHES))}.",
                id="pgnotify.E006",
            )
    if not is_declared():
        return
    if node_table().problem:
        yield checks.Error(
            node_table().problem,
            hint="Until it can be used nothing is taken from caches that depend on it.",
            id="pgnotify.E009",
        )
    interval = heartbeat_interval()
    if interval is not None and interval < FREQUENT:
        yield checks.Warning(
            f"A MAX_STALENESS of {interval * HEARTBEATS:g} s has every pglisten ask the server "
            f"each {interval:g} s, and a moment in which it is slow bypass the cache.",
            hint="A second or more is easier on both.",
            id="pgnotify.W009",
        )


def _check_alias(alias: str, config: dict[str, Any]) -> Iterator[CheckMessage]:
    try:
        options = NearOptions.of(config)
    except PgNotifyError as exc:
        yield checks.Error(
            f"CACHES[{alias!r}]: {exc}",
            hint="docs/how-to/cache lists the options of NearCache.",
            id="pgnotify.E007",
        )
        return
    second = options.second_level
    if second is None:
        return
    found = settings.CACHES.get(second)
    if found is None or second == alias or uses_epochs(found.get("BACKEND")):
        why = "is not in CACHES" if found is None else "is a NearCache itself"
        yield checks.Error(
            f"CACHES[{alias!r}]: SECOND_LEVEL {second!r} {why}.",
            hint="Name a cache that processes share: Redis, memcached, file or database.",
            id="pgnotify.E007",
        )
    elif found.get("BACKEND") in PER_PROCESS:
        yield checks.Warning(
            f"CACHES[{alias!r}]: SECOND_LEVEL {second!r} is "
            f"{found['BACKEND'].rpartition('.')[2]}, which is per process as well.",
            hint="Name a cache that processes share, or leave SECOND_LEVEL out.",
            id="pgnotify.W008",
        )
