"""From an event to the names whose epochs it bumps: those of its row, and what receivers declare.

The writer's process asks for an event that it has committed, the listener's for one it has heard;
both come to the same names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..registry import Registry, registry
from .names import EVERYTHING, INVALIDATIONS, model_tag, tag_name
from .table import EpochTable

logger = logging.getLogger("django_pgnotify.caching")

Fields = Mapping[str, Any]
"""The fields of an event by name; templates are filled from them."""


class Rule(NamedTuple):
    """What a receiver of ``invalidates`` adds for the events of one topic."""

    uid: str
    model: str | None
    actions: frozenset[str] | None
    names: Callable[[Fields], Iterable[str]]


_known: tuple[Registry, int, dict[str, list[Rule]]] | None = None


def rules() -> dict[str, list[Rule]]:
    """The rules of the registered receivers by topic."""
    global _known
    if _known is None or _known[0] is not registry or _known[1] != registry.revision:
        revision = registry.revision
        found: dict[str, list[Rule]] = {}
        for receiver in registry.receivers:
            if "names" not in receiver.purpose:
                continue
            for heard in registry.subscriptions(receiver):
                names = receiver.purpose["names"]
                rule = Rule(receiver.uid, heard.model, receiver.actions, names)
                found.setdefault(heard.topic, []).append(rule)
        _known = registry, revision, found
    return _known[2]


def heard_topics() -> set[str]:
    """The topics that a listener must hear to keep the epoch table."""
    models = {publication.topic for publication in registry.publications.values()}
    return {INVALIDATIONS} | models | rules().keys()


def names_of(
    topic: str, action: str, model: str | None, pk: Any, fields: Callable[[], Fields]
) -> list[str]:
    """The names that an event bumps; ``EVERYTHING`` among them where that cannot be told.

    Args:
        fields: returns the fields of the event; called only where they are needed.
    """
    if topic == INVALIDATIONS:
        return announced(fields().get("data"))
    names = []
    if model is not None:
        names = [tag_name(model_tag(model)), tag_name(model_tag(model, pk))]
    for rule in rules().get(topic, ()):
        if rule.model in (None, model) and (rule.actions is None or action in rule.actions):
            try:
                names += rule.names(fields())
            except Exception as exc:  # noqa: BLE001 - of a template; safe is what is wanted here
                logger.error(
                    "%s: what an event of topic %r invalidates cannot be told (%s: %s), so "
                    "everything is",
                    rule.uid,
                    topic,
                    type(exc).__name__,
                    exc,
                )
                names.append(EVERYTHING)
    return names


def announced(data: Any) -> list[str]:
    """The names in an event of ``INVALIDATIONS``; everything, where it is not one of ours."""
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return [EVERYTHING]


def is_known_to(table: EpochTable, data: Any) -> bool:
    """Whether ``table`` had the names in ``data`` bumped before they were announced.

    What its node has stored since then is newer.
    """
    return isinstance(data, dict) and data.get("table") == f"{table.id:x}"


def announcement(names: Iterable[str], table: EpochTable | None = None) -> dict[str, Any]:
    """The data of an event that announces ``names``; ``table`` has them bumped already."""
    data: dict[str, Any] = {"names": list(names)}
    return data if table is None else data | {"table": f"{table.id:x}"}
