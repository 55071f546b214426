"""What the caches of this process count, written down for the node.

Now and then while they are used; at the ends of requests, so that what a burst has counted is there
when the process is idle; and at the end of the process. There is no thread for it, because a
process that uses caches may fork.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from django.conf import settings
from django.core.signals import request_finished
from django.dispatch import receiver

from ..at_end import at_end
from ..epochs.clock import node_clock
from ..epochs.counts import CountsFile
from ..epochs.use import uses_epochs
from .store import Counts, all_stores

logger = logging.getLogger("django_pgnotify.caching")

EVERY = 5_000_000_000
"""Nanoseconds between two reports of a process whose caches are used."""

ONE_PART_IN = 200
"""A report at the end of a request waits for so many times as long as the one before it took."""

_EXIT_TIMEOUT = 1.0

_of_stock: dict[str, Counts] = {}
_counting = threading.Lock()

_file: CountsFile | None = None
_due = 0
_rests_until = 0
_failed = False
_registered = False
_writing = threading.Lock()


def count(alias: str, what: str, names: Iterable[str] = ()) -> None:
    """Count what happened to a look-up through a stock backend."""
    with _counting:
        counts = _of_stock.setdefault(alias, Counts())
        counts.add(what, [name[2:] for name in names if name.startswith("t:")])


def cache_counts() -> dict[str, dict[str, Any]]:
    """The counts of this process since it began, by alias in CACHES, of caches that were used.

    Of each: ``hits``, ``misses``, ``stale``, ``bypassed``, ``fills`` and ``refused``, ``tags`` with
    these numbers by tag, and of a NearCache ``second_level_hits`` and ``entries``. Aliases that
    share a NearCache have one name, with a space between them.
    """
    counts = {_aliases(store.space): store.counts() for store in all_stores()}
    with _counting:
        counts |= {alias: of_alias.as_dict() for alias, of_alias in _of_stock.items()}
    return {alias: of_alias for alias, of_alias in counts.items() if any(of_alias.values())}


def report_when_due(table: str, now: int) -> None:
    """Write the counts down, unless that was done a moment ago.

    Args:
        table: path of the node's epoch table, beside which they are written.
        now: a reading of ``node_clock``.
    """
    global _due
    if now >= _due and _writing.acquire(blocking=False):
        try:
            _due = now + EVERY
            _write(table)
        finally:
            _writing.release()


@receiver(request_finished)
def _at_end_of_request(**kwargs: Any) -> None:
    global _rests_until
    started = node_clock()
    if _file is None or started < _rests_until or not _writing.acquire(blocking=False):
        return
    try:
        if _file is not None and not _file.is_removed:
            _write(_file.table)
        ended = node_clock()
        _rests_until = ended + ONE_PART_IN * (ended - started)
    finally:
        _writing.release()


def _write(table: str) -> None:
    global _file, _failed
    _register()
    if _file is None or _file.table != table:
        if _file is not None:
            _file.close()
        _file = CountsFile(table)
    try:
        _file.write(cache_counts())
        _failed = False
    except BlockingIOError:
        pass  # somebody adds them up: next time
    except OSError as exc:
        if not _failed:
            logger.warning("The counts of caches cannot be written beside %r: %s", table, exc)
        _failed = True


def _register() -> None:
    global _registered
    if not _registered:
        at_end(_at_exit)
    _registered = True


def _at_exit() -> None:
    if not _writing.acquire(timeout=_EXIT_TIMEOUT):
        return
    try:
        if _file is not None and not _file.is_removed:
            with suppress(OSError):  # nobody is left to be told
                _file.write(cache_counts())
    finally:
        _writing.release()


def _aliases(space: str) -> str:
    """The aliases in CACHES whose entries are in the store of this LOCATION."""
    found = [
        alias
        for alias, config in settings.CACHES.items()
        if (config.get("LOCATION") or "") == space and uses_epochs(config.get("BACKEND"))
    ]
    return " ".join(found) or f"LOCATION {space!r}"


def _forked() -> None:
    global _counting, _writing, _file, _due, _rests_until, _registered
    _counting, _writing = threading.Lock(), threading.Lock()
    _of_stock.clear()  # they are the parent's
    if _file is not None:
        _file.close()
        _file = None
    _due = _rests_until = 0
    _registered = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
