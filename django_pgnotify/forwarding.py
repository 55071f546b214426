"""``forward()``: events to groups of Django Channels, and so to browsers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from functools import partial
from typing import Any, NamedTuple

from .events import Event, check_actions
from .exceptions import InvalidArgument, InvalidTemplate, PgNotifyError
from .publishing.sender import is_default_transport
from .registry import (
    Receiver,
    Source,
    check_signature,
    check_sources,
    describe,
    registry,
    source_name,
)
from .templates import check_template, fields_in, fields_of, fill, literal_parts


class Direct(NamedTuple):
    """How ``direct=True`` forwards an event; the layer finds it at the receiver, as its purpose."""

    groups: Callable[[Event], list[str]]
    message: Callable[[Event], dict[str, Any]]


GROUP_NAME_LIMIT = 99
"""Characters in a group name: Channels wants fewer than 100."""

_UNSAFE = re.compile(r"[^a-zA-Z0-9._-]")

Group = str | Callable[[Event], str | Iterable[str] | None]


def forward(
    source: Source | Iterable[Source],
    *,
    group: Group,
    type: str,
    data: Callable[[Event], dict[str, Any]] | None = None,
    actions: Iterable[str] | None = None,
    layer: str = "default",
    direct: bool = False,
    dispatch_uid: str | None = None,
) -> None:
    """Send each event of a source to a group of a channel layer, from the leader only, in order.

    The message is ``{"type": type, "event": {…}}``: the fields of the event as plain values
    (times as ISO 8601 text, keys of other types as text), so that every layer can carry it.

    Args:
        source: a model class, a topic, or a list of them.
        group: template of the group's name (``"order.{pk}"``; a value that is not safe in a group
            name is replaced as :func:`group_name` does), or a function of the event that returns
            a name, several, or None for nobody.
        type: the consumer's handler, as in Channels (``"order.changed"``). It is fixed here and
            never taken from an event.
        data: returns what to send instead of the event's fields; plain values only.
        actions: only these actions; with ``"gap"`` among them, groups that a gap has a name for
            (a template without ``{pk}``, say) are told of it, too.
        layer: alias of the channel layer.
        direct: where the layer is a ``PostgresChannelLayer``, have each process that has members
            of a group hear the source itself, with one NOTIFY for an event instead of two;
            ``pglisten`` then sends nothing. ``group`` and ``data`` run in all of these processes.
            With another layer it changes nothing.
        dispatch_uid: a name of its own, as for ``receiver``.

    Raises:
        InvalidTemplate: the template names no field of an event, or can never be a group name.
        InvalidTopic, InvalidAction, InvalidArgument: bad arguments.
        DuplicateReceiver: this source is forwarded to this group already.
    """
    sources = check_sources(source)
    chosen = check_actions(actions)
    check_group(group)
    if not isinstance(type, str) or not re.fullmatch(r"[a-zA-Z_][\w.]*", type) or type[0] == "_":
        raise InvalidArgument(
            f"type= names a handler of the consumer, such as 'order.changed'; got {type!r}."
        )
    if data is not None:
        check_signature(data)

    if not isinstance(direct, bool):
        raise InvalidArgument(f"direct= takes True or False; got {direct!r}.")

    def message_of(event: Event) -> dict[str, Any]:
        return {"type": type, "event": plain_event(event) if data is None else data(event)}

    async def forward_event(event: Event) -> None:
        names = groups_of(group, event)
        if not names:
            return
        channel_layer = _layer(layer)
        if direct and _hears_itself(channel_layer):
            return
        message = message_of(event)
        for name in names:
            await channel_layer.group_send(name, message)

    target = group if isinstance(group, str) else describe(group)
    names = ",".join(source_name(one) for one in sources)
    # What messages call it: "django_pgnotify.forward(shop.order -> order.{pk})".
    forward_event.__module__ = "django_pgnotify"
    forward_event.__qualname__ = f"forward({names} -> {target})"
    purpose: dict[str, Any] = {"layer": layer}
    if direct:
        purpose["direct"] = Direct(partial(groups_of, group), message_of)
    registry.add(
        Receiver(
            uid=dispatch_uid or f"forward:{names}->{layer}:{target}:{type}",
            func=forward_event,
            sources=sources,
            actions=chosen,
            on_gap=chosen is not None and "gap" in chosen,
            durable=False,  # a browser wants what is now, not what was while it was away
            purpose=purpose,
        ),
        explicit_uid=dispatch_uid is not None or isinstance(group, str),
        origin=None if isinstance(group, str) else group,
    )


def check_group(group: object) -> None:
    """Refuse a group that could never be a name; raises InvalidTemplate."""
    if callable(group):
        check_signature(group)
        return
    template = check_template(group, "group=")
    literals = literal_parts(template)
    for literal in literals:
        unsafe = _UNSAFE.search(literal)
        if unsafe:
            raise InvalidTemplate(
                f"group= {template!r} contains {unsafe.group()!r}; a group name has only ASCII "
                f"letters, digits, hyphens, underscores and full stops."
            )
    if sum(map(len, literals)) > GROUP_NAME_LIMIT:
        raise InvalidTemplate(
            f"group= {template!r} is longer than the {GROUP_NAME_LIMIT} characters of a group name."
        )


def group_name(template: str, /, **values: Any) -> str:
    """The group that ``forward(..., group=template)`` sends to, for consumers that join it.

    ``group_name("order.{pk}", pk=7)`` is ``"order.7"``. A value with characters that are not safe
    in a group name is replaced by a hash of it, and so is a name that is too long.
    """
    return _bounded(fill(template, values, escape=_safe))


def _safe(text: str) -> str:
    """``text`` if it can be part of a group name, else a hash that stands for it."""
    return f"h-{_hash(text)}" if not text or _UNSAFE.search(text) else text


def _bounded(name: str) -> str:
    if len(name) <= GROUP_NAME_LIMIT:
        return name
    return f"{name[: GROUP_NAME_LIMIT - 33]}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def groups_of(group: Group, event: Event) -> list[str]:
    """The names of the groups that an event is sent to."""
    if isinstance(group, str):
        fields = fields_of(event)
        if event.action == "gap" and any(fields[name] is None for name in fields_in(group)):
            return []  # it is of no row, so no group of one row is meant
        return [_bounded(fill(group, fields, escape=_safe))]
    names = group(event)
    if not names:
        return []
    return [names] if isinstance(names, str) else list(names)


def _layer(alias: str) -> Any:
    try:
        from channels.layers import get_channel_layer
    except ImportError as exc:
        raise PgNotifyError(
            "forward() needs Django Channels: pip install 'django-pgnotify[channels]'."
        ) from exc
    layer = get_channel_layer(alias)
    if layer is None:
        raise PgNotifyError(f"forward() has no channel layer {alias!r}: add it to CHANNEL_LAYERS.")
    return layer


def _hears_itself(channel_layer: Any) -> bool:
    """Whether processes with members hear events themselves; in a test's transport nobody does."""
    return getattr(channel_layer, "feed", None) is not None and is_default_transport()


def plain_event(event: Event) -> dict[str, Any]:
    """The fields of an event as values that JSON and msgpack can carry."""
    return {
        "id": event.id,
        "topic": event.topic,
        "action": event.action,
        "model": event.model,
        "pk": _plain(event.pk),
        "data": _plain(event.data),
        "key": event.key,
        "changed": None if event.changed is None else list(event.changed),
        "source": event.source,
        "published_at": event.published_at.isoformat(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)  # more than msgpack carries
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    return str(value)
