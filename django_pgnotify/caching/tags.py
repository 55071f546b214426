"""Tags: names that cached values depend on and that somebody says are stale."""

from __future__ import annotations

from asgiref.sync import sync_to_async

from ..epochs.names import INVALIDATIONS, check_tags, tag_name
from ..epochs.rules import announcement
from ..epochs.use import declare_use
from ..publishing.publisher import publish
from .shelf import name_of_key


def invalidate_tags(*tags: str, using: str | None = None) -> None:
    """Make stale, on every node, what was cached with any of these tags.

    Inside a transaction that happens with its commit, and never after a rollback. On this node it
    is so when the commit (or, outside a transaction, this call) returns.

    Args:
        using: database alias to tell the others through, and whose transaction counts; default
            ``PGNOTIFY_DATABASE``.

    Raises:
        InvalidArgument: a tag is no text, or empty.
    """
    invalidate_names([tag_name(tag) for tag in check_tags(tags, "invalidate_tags()")], using)


async def ainvalidate_tags(*tags: str, using: str | None = None) -> None:
    """As :func:`invalidate_tags`, from async code."""
    await sync_to_async(invalidate_tags)(*tags, using=using)


def invalidate_keys(
    *keys: str, cache: str = "default", version: int | None = None, using: str | None = None
) -> None:
    """Make stale, on every node, what ``cached`` or a NearCache holds under these keys.

    As :func:`invalidate_tags` in all else.
    """
    invalidate_names([name_of_key(cache, key, version) for key in keys], using)


def invalidate_names(names: list[str], using: str | None = None) -> None:
    declare_use()
    if names:
        publish(INVALIDATIONS, announcement(names), using=using, delivery="after_commit")
