"""The columns of every row; triggers publish the whole of it."""

from __future__ import annotations

from benchmarks.shop.models import Row


class Plain(Row):
    """A trigger sends a NOTIFY."""


class Stored(Row):
    """A trigger stores the notification too; a listener locks and deletes it."""


class PlainLoad(Row):
    """As ``shop.Load``."""


class StoredLoad(Row):
    """As ``shop.Load``, stored."""
