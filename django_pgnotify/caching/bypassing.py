"""Whether caches are bypassed, because nobody listens; said in the log when it begins and ends.

Once per process, and once for each MAX_STALENESS where caches have their own. Only look-ups that
are no quick hits of a NearCache come here, so that it is over is noticed at the next of those.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import NamedTuple

from ..epochs.clock import NANOSECONDS, node_clock
from ..epochs.mapped import HEARTBEAT
from ..epochs.table import EpochTable

logger = logging.getLogger("django_pgnotify.caching")

FIRST_HEARTBEAT = 5 * NANOSECONDS
"""Time in which a table in a file gets its first heartbeat, where somebody listens."""


class _Bypass(NamedTuple):
    since: int
    """Reading of ``node_clock``."""
    told: bool
    dead: bool


_bypasses: dict[tuple[str | None, float], _Bypass] = {}
_guard = threading.Lock()


def is_bypassed(table: EpochTable, limit: float) -> bool:
    """Whether nothing can be known of what is cached: the heartbeat is too old.

    Args:
        limit: nanoseconds that it may be old; infinite for any time.
    """
    if table.is_dead or node_clock() - table.words[HEARTBEAT] > limit:
        _note_bypass(table, limit)
        return True
    if _bypasses:
        _note_end(table, limit)
    return False


def _note_bypass(table: EpochTable, limit: float) -> None:
    key, dead = (table.path, limit), table.is_dead
    known = _bypasses.get(key)
    if known is not None and known.told and known.dead == dead:
        return
    with _guard:
        known, now = _bypasses.get(key), node_clock()
        since = now if known is None else known.since
        # Why a table is dead its owner has said. One that has just been made has no heartbeat: that
        # in memory has a listener that is starting, and pglisten sees the file in a second.
        patience = limit if table.path is None else min(limit, FIRST_HEARTBEAT)
        early = not table.heartbeat and now - since <= patience
        new = _Bypass(since, told=not early, dead=dead)
        _bypasses[key] = new
        tell = new != known and new.told and not dead
    # Not under the lock: whoever handles the record may ask a cache.
    if tell:
        heartbeat = table.heartbeat
        logger.warning(
            "Caches are bypassed: the epoch table %s has %s, and MAX_STALENESS is %g s; %s",
            "of this process" if table.path is None else repr(table.path),
            f"a heartbeat {(now - heartbeat) / NANOSECONDS:.1f} s old"
            if heartbeat
            else "no heartbeat yet",
            limit / NANOSECONDS,
            "does its listener reach the database?"
            if table.path is None
            else "is pglisten running on this node?",
        )


def _note_end(table: EpochTable, limit: float) -> None:
    key = (table.path, limit)
    if key not in _bypasses:
        return
    with _guard:
        ended = _bypasses.pop(key, None)
    if ended is not None and ended.told:
        logger.info(
            "Caches are used again, after %.1f s", (node_clock() - ended.since) / NANOSECONDS
        )


def _forked() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it
    _bypasses.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
