"""Signals of models become events: what was saved, deleted, or related to another row."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from django.db import connections
from django.db.models import Model

from ..conf import conf
from ..events import Action
from ..exceptions import UnsupportedDatabase
from ..registry import Publication, model_label, registry
from ..wire import Outgoing
from . import changes
from .publisher import deliver
from .quiet import is_quiet
from .row_event import RowEvent, report_change
from .sender import postgres_connection

_CLEARED = "pgnotify_cleared"

_unsupported: set[tuple[str, str]] = set()


def publications_of(sender: type[Model]) -> list[Publication]:
    """Publications of the tables that a row of ``sender`` lies in: its own, then its parents'."""
    publications = registry.publications
    labels = _tables_of(sender)
    if len(labels) == 1:  # nearly always, and at each save
        publication = publications.get(labels[0])
        return [] if publication is None else [publication]
    return [publications[label] for label in labels if label in publications]


@functools.cache
def _tables_of(sender: type[Model]) -> tuple[str, ...]:
    metas = [base._meta for base in sender.__mro__ if hasattr(base, "_meta")]
    return tuple(meta.label_lower for meta in metas if not meta.abstract and not meta.proxy)


def saved(
    sender: type[Model],
    instance: Model,
    created: bool,
    raw: bool,
    using: str,
    update_fields: frozenset[str] | None,
    **kwargs: Any,
) -> None:
    for publication in publications_of(sender):
        model, names = publication.model, publication.fields
        changed = None
        if not created:
            if update_fields is not None and not changes.has_any(model, update_fields):
                continue  # only a child's table was written
            changed = changes.changed_names(model, instance, names, update_fields)
        if not raw or conf.PUBLISH_RAW:
            action: Action = "created" if created else "updated"
            _emit(publication, action, instance, using, changed, update_fields)
        if names:
            # A row whose creation is rolled back has no later update to compare.
            doubtful = not created and connections[using].in_atomic_block
            changes.remember(model, instance, names, update_fields, may_roll_back=doubtful)


def deleted(sender: type[Model], instance: Model, using: str, **kwargs: Any) -> None:
    publication = registry.publications.get(model_label(sender))
    if publication is not None:
        _emit(publication, "deleted", instance, using)


def m2m_changed(
    sender: type[Model],
    instance: Model,
    action: str,
    reverse: bool,
    model: type[Model],
    pk_set: set[Any] | None,
    using: str,
    **kwargs: Any,
) -> None:
    """Relations changed: an event for each row whose own field it was, whichever side was used."""
    when, _, operation = action.partition("_")
    owner = model if reverse else type(instance)
    for publication in publications_of(owner):
        for field in publication.model._meta.local_many_to_many:
            if field.remote_field.through is not sender:
                continue
            if not reverse and when == "post" and (pk_set or operation == "clear"):
                related = _in_order(map(changes.plain, pk_set or ()))
                _emit_m2m(publication, field.name, operation, instance.pk, related, using)
            # Of the rows that mirror those of a symmetrical relation Django sends no signal.
            if not (reverse or field.remote_field.symmetrical):
                continue
            others = pk_set or ()
            if operation == "clear":
                # After the fact nobody can tell which rows it was.
                cleared = vars(instance._state).setdefault(_CLEARED, {})
                if when == "pre":
                    near, far = field.m2m_reverse_field_name(), field.m2m_field_name()
                    rows = sender._base_manager.using(using).filter(**{near: instance.pk})
                    cleared[sender] = set(rows.values_list(far, flat=True))
                else:
                    others = cleared.pop(sender, set())
            if when == "post":
                for pk in _in_order(others):
                    if reverse or pk != instance.pk:
                        related = [changes.plain(instance.pk)]
                        _emit_m2m(publication, field.name, operation, pk, related, using)


def _in_order(keys: Iterable[Any]) -> list[Any]:
    keys = list(keys)
    try:
        return sorted(keys)
    except TypeError:
        return sorted(keys, key=str)


def _emit_m2m(
    publication: Publication, field: str, operation: str, pk: Any, related: list[Any], using: str
) -> None:
    if _is_silent(publication, "m2m_changed"):
        return
    data = {"field": field, "operation": operation, "pks": related}
    _publish(publication, "m2m_changed", changes.plain(pk), data, None, using)


def _emit(
    publication: Publication,
    action: Action,
    instance: Model,
    using: str,
    changed: tuple[str, ...] | None = None,
    written: frozenset[str] | None = None,
) -> None:
    if _is_silent(publication, action):
        return
    try:
        pk = changes.plain_pk(publication.model, instance)
    except Exception as exc:  # noqa: BLE001 - reported; a save must not fail for its event
        report_change(publication, exc)
        return
    try:
        data = changes.plain_values(publication.model, instance, publication.fields, written)
    except Exception as exc:  # noqa: BLE001 - reported, and the event goes without its values
        report_change(publication, exc)
        data = {}
    _publish(publication, action, pk, data, changed, using)


def _is_silent(publication: Publication, action: Action) -> bool:
    return is_quiet() or (publication.actions is not None and action not in publication.actions)


def _publish(
    publication: Publication,
    action: Action,
    pk: Any,
    data: dict[str, Any],
    changed: tuple[str, ...] | None,
    using: str,
) -> None:
    """Hand an event to its tier. Whatever goes wrong before SQL is sent must not break the save."""
    target = publication.using or using
    try:
        tier = publication.tier(conf.DELIVERY)
        connection = postgres_connection(target)
    except UnsupportedDatabase as exc:
        if (publication.label, target) not in _unsupported:
            _unsupported.add((publication.label, target))
            report_change(publication, exc)
        return
    except Exception as exc:  # noqa: BLE001 - reported; a save must not fail for its event
        report_change(publication, exc)
        return
    event: Outgoing | RowEvent | None = RowEvent(publication, action, pk, data, changed)
    if data and changes.can_change(data):
        event = event.encode()  # type: ignore[union-attr]
    if event is not None:
        # The transaction is that of the alias the row was saved on.
        deliver(event, tier, connection if target == using else connections[using], target)
