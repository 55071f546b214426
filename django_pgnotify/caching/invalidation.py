"""``invalidates()``: delete keys of a cache, or bump tags, on every node when a source changes.

Tags, and keys that templates make, are bumped by the listener itself as soon as it hears of an
event, and by the writer's process at its commit; keys are deleted afterwards, by a receiver.

What a gap means here: frames may have been missed, and nobody can say for which rows. Where the
cache backend offers ``delete_pattern`` (django-redis and django-valkey do) and every key template
begins with literal text (without pattern characters), the keys with those beginnings are deleted.
Everywhere else **the whole cache alias is cleared**. Give what must survive that an alias of its
own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from django.core.cache import caches

from .. import signals
from ..epochs.names import tag_name
from ..epochs.node import node_table
from ..epochs.rules import Fields
from ..epochs.use import declare_use, is_in_use
from ..events import Event, check_actions
from ..exceptions import InvalidArgument, InvalidTemplate
from ..registry import (
    Receiver,
    Source,
    check_signature,
    check_sources,
    describe,
    registry,
    source_name,
)
from ..templates import check_template, fields_of, fill, literal_head
from .shelf import name_of_key

logger = logging.getLogger("django_pgnotify.caching")

_PLAIN_HEAD = re.compile(r"[^\\*?\[\]^]+")

Keys = Iterable[str] | Callable[[Event], Iterable[str] | str | None]


def invalidates(
    source: Source | Iterable[Source],
    *,
    keys: Keys | None = None,
    tags: Iterable[str] = (),
    cache: str = "default",
    actions: Iterable[str] | None = None,
    version: int | None = None,
    dispatch_uid: str | None = None,
) -> None:
    """Delete keys of a cache, or bump tags, for each event of a source, in every listener.

    After a gap the whole alias is cleared, or the keys that begin as the templates do where the
    backend can delete by pattern. A ``pglisten`` cannot reach into another process's memory:
    the alias must be one that is shared on the node or beyond (Redis, memcached, file, database).

    Args:
        source: a model class, a topic, or a list of them.
        keys: key templates over the fields of an event (``["order:{pk}", "orders"]``), or a
            function of the event that returns keys.
        tags: templates likewise, of tags that cached values have (see ``cached``). ``keys`` may
            then be left out. After a gap everything that has a tag is stale.
        cache: alias in CACHES.
        actions: only these actions.
        version: of the keys, as Django's cache API takes it.
        dispatch_uid: a name of its own, as for ``receiver``.

    Raises:
        InvalidTemplate: a template is malformed or names no field of an event.
        InvalidTopic, InvalidAction, InvalidArgument: bad arguments.
        DuplicateReceiver: this source invalidates these keys already.
    """
    sources = check_sources(source)
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidTemplate(f"tags= takes a list of tag templates; got {tags!r}.")
    tag_templates = [check_template(tag, "tags=") for tag in tags]
    if keys is None and tag_templates:
        keys = []
        templates = []
    else:
        templates = _check_keys(keys)
    if not isinstance(cache, str) or not cache:
        raise InvalidArgument(f"cache= takes an alias of CACHES; got {cache!r}.")
    heads = [literal_head(template) for template in templates]

    def invalidate(event: Event) -> None:
        has_keys = bool(templates) or callable(keys)
        stale_tags = []
        if event.action == "gap":
            if has_keys:
                _clear(caches[cache], cache, heads, version)
            stale: list[str] | None = None
        else:
            fields = fields_of(event)
            stale = _keys_of(keys, templates, event)
            stale_tags = [fill(template, fields) for template in tag_templates]
            if not stale and not stale_tags:
                return
            if stale:
                if callable(keys) and is_in_use():
                    # As of templates: what is being loaded now is not to be stored after it.
                    node_table().bump([name_of_key(cache, key, version) for key in stale])
                caches[cache].delete_many(stale, version=version)
        for one in _sources_of(event, sources):
            signals.cache_invalidated.send_robust(
                one, event=event, cache=cache, keys=stale, tags=stale_tags
            )

    def names_of_event(fields: Fields) -> Iterator[str]:
        for template in tag_templates:
            yield tag_name(fill(template, fields))
        for template in templates:
            yield name_of_key(cache, fill(template, fields), version)

    if tag_templates:
        declare_use()
    names = ",".join(source_name(one) for one in sources)
    named = bool(templates or tag_templates)
    what = ",".join(templates + tag_templates) if named else describe(keys)  # type: ignore[arg-type]
    # What messages call it: "django_pgnotify.invalidates(shop.order -> order:{pk})".
    invalidate.__module__ = "django_pgnotify"
    invalidate.__qualname__ = f"invalidates({names} -> {what})"
    purpose: dict[str, Any] = {"names": names_of_event} if named else {}
    if templates or callable(keys):
        purpose["cache"] = cache
    registry.add(
        Receiver(
            uid=dispatch_uid or f"invalidates:{names}->{cache}:{what}",
            func=invalidate,
            sources=sources,
            actions=check_actions(actions),
            every_node=True,
            durable=False,
            on_gap=True,
            purpose=purpose,
        ),
        explicit_uid=dispatch_uid is not None or named,
        origin=None if named else keys,
    )


def _sources_of(event: Event, sources: tuple[Source, ...]) -> list[Source]:
    """Those of several sources that an event came from: all of its topic for a gap, else one."""
    heard = [(source, registry.subscription(source)) for source in sources]
    same = [(source, one.model) for source, one in heard if one.topic == event.topic]
    if event.action == "gap":
        return [source for source, _ in same]
    return [source for source, model in same if model in (None, event.model)][:1]


def _check_keys(keys: object) -> list[str]:
    if callable(keys):
        check_signature(keys)
        return []
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise InvalidTemplate(
            f"keys= takes a list of key templates or a function of one event; got {keys!r}."
        )
    templates = [check_template(key, "keys=") for key in keys]
    if not templates:
        raise InvalidTemplate("keys= is empty, so nothing would be invalidated.")
    return templates


def _keys_of(keys: Keys | None, templates: list[str], event: Event) -> list[str]:
    if not callable(keys):
        return [fill(template, fields_of(event)) for template in templates]
    found = keys(event)
    if found is None:
        return []
    return [found] if isinstance(found, str) else list(found)


def _clear(cache: Any, alias: str, heads: list[str], version: int | None) -> None:
    # A head with a character that means something in a pattern would match other keys.
    if heads and all(map(_PLAIN_HEAD.fullmatch, heads)) and hasattr(cache, "delete_pattern"):
        for head in heads:
            cache.delete_pattern(f"{head}*", version=version)
        logger.warning("Cache %r: keys that begin with %s deleted after a gap", alias, heads)
    else:
        cache.clear()
        logger.warning("Cache %r: cleared whole after a gap", alias)
