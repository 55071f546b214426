"""Model changes become events: ``notify_changes`` and the handlers it connects."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar, overload

from django.db import DatabaseError, connections, router, transaction
from django.db.models import Model
from django.db.models.fields.related import lazy_related_operation
from django.db.models.signals import (
    class_prepared,
    m2m_changed,
    post_delete,
    post_save,
)

from ..conf import conf
from ..events import MODEL_ACTIONS, Action, Delivery, check_actions, check_delivery, check_topic
from ..exceptions import InvalidArgument, PgNotifyError, UnsupportedDatabase
from ..labels import model_of
from ..registry import Publication, is_model, model_label, registry
from ..wire import Outgoing
from . import changes
from .doubt import save_failed
from .publisher import deliver, outside_transaction
from .quiet import is_quiet
from .row_event import RowEvent, report_change
from .sender import postgres_connection

logger = logging.getLogger("django_pgnotify.publishing")

M = TypeVar("M", bound=type[Model])

_UID = "django_pgnotify"
_CLEARED = "pgnotify_cleared"

_abstract: dict[type[Model], dict[str, Any]] = {}
_inherited: set[str] = set()
_unsupported: set[tuple[str, str]] = set()
_watched: set[tuple[type[Model], str]] = set()
_atomic_saves: set[type[Model]] = set()
configuration_errors: list[str] = []
"""What is wrong with PGNOTIFY_MODELS, for the system check."""


@overload
def notify_changes(model: M) -> M: ...
@overload
def notify_changes(
    model: None = None,
    *,
    fields: Collection[str] | None = None,
    topic: str | None = None,
    actions: Iterable[str] | None = None,
    delivery: Delivery | None = None,
    using: str | None = None,
) -> Callable[[M], M]: ...
def notify_changes(
    model: Any = None,
    *,
    fields: Collection[str] | None = None,
    topic: str | None = None,
    actions: Iterable[str] | None = None,
    delivery: Delivery | None = None,
    using: str | None = None,
) -> Any:
    """Publish an event for each row of a model that is created, updated or deleted.

    Decorate the class, with or without arguments. An abstract class passes it on to its concrete
    children; a proxy stands for its concrete model. Bulk operations that send no model signals
    (``QuerySet.update``, ``bulk_create``, raw SQL) publish nothing.

    Args:
        fields: names of fields whose values an event carries in ``data``; on an update
            ``changed`` says which of them changed, where that is known. It does not filter.
        topic: name of the topic; default the model's lower-case label (``"shop.order"``).
        actions: only these of created, updated, deleted and m2m_changed; default all.
        delivery: tier; default ``PGNOTIFY_DELIVERY``.
        using: database alias to publish on; default the alias the row was saved on.

    Raises:
        InvalidFields, InvalidTopic, InvalidAction, InvalidDelivery: bad arguments.
        InvalidArgument: ``model`` is no model class, or publishes its changes already.
    """
    options = {
        "fields": fields,
        "topic": topic,
        "actions": actions,
        "delivery": delivery,
        "using": using,
    }
    if model is None:
        return lambda decorated: _publish_changes_of(decorated, options)
    return _publish_changes_of(model, options)


def _publish_changes_of(model: Any, options: dict[str, Any]) -> Any:
    if not is_model(model):
        raise InvalidArgument(
            f"notify_changes() decorates a model class; got {model!r}. "
            f"Models of other apps go into PGNOTIFY_MODELS."
        )
    if model._meta.abstract:
        changes.check_fields(model, options["fields"])
        _abstract[model] = options
    else:
        concrete = model._meta.concrete_model
        label = model_label(concrete)
        if label in registry.publications and label not in _inherited:
            raise InvalidArgument(f"{concrete._meta.label} publishes its changes already.")
        _inherited.discard(label)
        _add(concrete, options)
    return model


def _add(model: type[Model], options: dict[str, Any]) -> None:
    label, topic, delivery = model_label(model), options.get("topic"), options.get("delivery")
    publication = Publication(
        model=model,
        label=label,
        topic=label if topic is None else check_topic(topic),
        fields=changes.check_fields(model, options.get("fields")),
        actions=check_actions(options.get("actions"), MODEL_ACTIONS),
        delivery=None if delivery is None else check_delivery(delivery),
        using=options.get("using"),
    )
    if publication.delivery == "durable" and publication.using is not None:
        raise InvalidArgument(
            f"{model._meta.label}: delivery='durable' writes the event in the transaction that "
            f"writes the row, so it cannot take using={publication.using!r}; leave it out."
        )
    registry.publications[label] = publication
    for sender in _with_subclasses(model):
        _connect(sender, publication)


def _with_subclasses(model: type[Model]) -> Iterator[type[Model]]:
    yield model
    for child in model.__subclasses__():
        yield from _with_subclasses(child)


def _connect(sender: type[Model], publication: Publication) -> None:
    """Connect the handlers for ``sender``: the model, or a proxy or child whose rows are also its.

    Always by sender: a handler for all models would cost every save of the project, and Django
    its fast deletes.
    """
    if sender._meta.abstract:
        return
    post_save.connect(_saved, sender=sender, dispatch_uid=_UID)
    if sender not in _atomic_saves:
        _atomic_saves.add(sender)
        _make_saves_atomic(sender)
    if sender._meta.concrete_model is publication.model:
        post_delete.connect(_deleted, sender=sender, dispatch_uid=_UID)
    if publication.fields and (sender, publication.label) not in _watched:
        _watched.add((sender, publication.label))
        if sender is publication.model:  # the others inherit it
            changes.watch_loading(sender, publication.fields)
        changes.watch_refresh(sender, publication.model, publication.fields)
    for field in publication.model._meta.local_many_to_many:
        # A through model named by a string may not be loaded yet.
        lazy_related_operation(_connect_through, publication.model, field.remote_field.through)


def _make_saves_atomic(sender: type[Model]) -> None:
    """Have a save whose event is durable write the row and the event in one transaction.

    In autocommit Django sends ``post_save`` when the row has been committed. (Deletions and
    many-to-many changes are in a transaction by themselves.)
    """
    save_base = sender.save_base

    @functools.wraps(save_base)
    def atomic_save_base(
        self: Model,
        raw: bool = False,
        force_insert: bool | tuple[type[Model], ...] = False,
        force_update: bool = False,
        using: str | None = None,
        update_fields: Iterable[str] | None = None,
    ) -> None:
        using = using or router.db_for_write(type(self), instance=self)
        if _is_logged(sender) and outside_transaction(connections[using]):
            with transaction.atomic(using):
                save_base(self, raw, force_insert, force_update, using, update_fields)
            return
        try:
            save_base(self, raw, force_insert, force_update, using, update_fields)
        except DatabaseError:
            save_failed(self, _publications_of(sender), connections[using])
            raise

    sender.save_base = atomic_save_base  # type: ignore[method-assign, assignment]


def _is_logged(sender: type[Model]) -> bool:
    """Whether an event of ``sender`` is written to the event log."""
    for publication in _publications_of(sender):
        if (publication.delivery or publication.tier(conf.DELIVERY)) == "durable":
            return True
    return False


def _connect_through(model: type[Model], through: type[Model]) -> None:
    m2m_changed.connect(_m2m_changed, sender=through, dispatch_uid=_UID)


def _prepared(sender: type[Model], **kwargs: Any) -> None:
    """A model class was defined: it may be a child or a proxy of one that publishes."""
    if not sender._meta.abstract and not sender._meta.proxy:
        for base in sender.__mro__[1:]:
            if base in _abstract and model_label(sender) not in registry.publications:
                _inherited.add(model_label(sender))
                _add(sender, _abstract[base])
    for publication in _publications_of(sender):
        _connect(sender, publication)


class_prepared.connect(_prepared, dispatch_uid=_UID)


def track_configured_models() -> None:
    """Apply PGNOTIFY_MODELS; what is wrong with it is logged and kept for the system check."""
    configuration_errors.clear()
    try:
        configured = conf.MODELS
    except PgNotifyError:
        return  # conf.problems() reports it
    for label, options in configured.items():
        try:
            _publish_changes_of(model_of(label), dict.fromkeys(("fields",)) | options)
        except PgNotifyError as exc:
            configuration_errors.append(f"PGNOTIFY_MODELS[{label!r}]: {exc}")
            logger.error("%s", configuration_errors[-1])


def _publications_of(sender: type[Model]) -> list[Publication]:
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


# -- handlers -------------------------------------------------------------------------------


def _saved(
    sender: type[Model],
    instance: Model,
    created: bool,
    raw: bool,
    using: str,
    update_fields: frozenset[str] | None,
    **kwargs: Any,
) -> None:
    for publication in _publications_of(sender):
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


def _deleted(sender: type[Model], instance: Model, using: str, **kwargs: Any) -> None:
    publication = registry.publications.get(model_label(sender))
    if publication is not None:
        _emit(publication, "deleted", instance, using)


def _m2m_changed(
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
    for publication in _publications_of(owner):
        for field in publication.model._meta.local_many_to_many:
            if field.remote_field.through is not sender:
                continue
            if not reverse:
                if when == "post" and (pk_set or operation == "clear"):
                    related = _in_order(map(changes.plain, pk_set or ()))
                    _emit_m2m(publication, field.name, operation, instance.pk, related, using)
                continue
            if operation == "clear":
                # After the fact nobody can tell which rows it was.
                cleared = vars(instance._state).setdefault(_CLEARED, {})
                if when == "pre":
                    near, far = field.m2m_reverse_field_name(), field.m2m_field_name()
                    rows = sender._base_manager.using(using).filter(**{near: instance.pk})
                    cleared[sender] = set(rows.values_list(far, flat=True))
                else:
                    pk_set = cleared.pop(sender, set())
            if when == "post":
                for pk in _in_order(pk_set or ()):
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
