"""The default alias, reached in another way: for tests whose way leads through a proxy or a pooler.

An alias of its own will not do where Django connects: its test cases forbid those that they were
not told of, and a thread's connections with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from django.db import connections


@contextlib.contextmanager
def new_connections(**changes: Any) -> Iterator[None]:
    """Have connections of the default alias that are made in the block differ by ``changes``.

    Those that are open stay as they are; this thread's is closed behind the block if it was
    made in it.
    """
    entry: dict[str, Any] = connections["default"].settings_dict
    raw, before = connections["default"].connection, dict(entry)
    entry.update(changes)
    try:
        yield
    finally:
        entry.clear()
        entry.update(before)
        if connections["default"].connection is not raw:
            connections["default"].close()


@contextlib.contextmanager
def default_reached(**changes: Any) -> Iterator[None]:
    """As :func:`new_connections`, and begin with a new connection in this thread."""
    connections["default"].close()
    with new_connections(**changes):
        yield
