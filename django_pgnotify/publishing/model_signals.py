"""``notify_changes``, and the connection of its handlers to the signals of models."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar, overload

from django.db import DatabaseError, connections, router, transaction
from django.db.models import Model, signals
from django.db.models.fields.related import lazy_related_operation

from ..conf import conf
from ..events import MODEL_ACTIONS, Delivery, check_actions, check_delivery, check_topic
from ..exceptions import InvalidArgument, PgNotifyError
from ..labels import model_of
from ..registry import Publication, is_model, model_label, registry
from . import changes
from .doubt import save_failed
from .handlers import deleted, m2m_changed, publications_of, saved
from .publisher import outside_transaction

logger = logging.getLogger("django_pgnotify.publishing")

M = TypeVar("M", bound=type[Model])

_UID = "django_pgnotify"
_HISTORICAL = "__fake__"  # where Django's migrations say that their models are defined

_abstract: dict[type[Model], dict[str, Any]] = {}
_inherited: set[str] = set()
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
    signals.post_save.connect(saved, sender=sender, dispatch_uid=_UID)
    if sender not in _atomic_saves:
        _atomic_saves.add(sender)
        _make_saves_atomic(sender)
    if sender._meta.concrete_model is publication.model:
        signals.post_delete.connect(deleted, sender=sender, dispatch_uid=_UID)
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
            save_failed(self, publications_of(sender), connections[using])
            raise

    sender.save_base = atomic_save_base  # type: ignore[method-assign, assignment]


def _is_logged(sender: type[Model]) -> bool:
    """Whether an event of ``sender`` is written to the event log."""
    for publication in publications_of(sender):
        if (publication.delivery or publication.tier(conf.DELIVERY)) == "durable":
            return True
    return False


def _connect_through(model: type[Model], through: type[Model]) -> None:
    signals.m2m_changed.connect(m2m_changed, sender=through, dispatch_uid=_UID)


def _prepared(sender: type[Model], **kwargs: Any) -> None:
    """A model class was defined: it may be a child or a proxy of one that publishes."""
    if sender.__module__ == _HISTORICAL:
        return  # the rows are not yet those of today's model, nor need there be an event log yet
    if not sender._meta.abstract and not sender._meta.proxy:
        for base in sender.__mro__[1:]:
            if base in _abstract and model_label(sender) not in registry.publications:
                _inherited.add(model_label(sender))
                _add(sender, _abstract[base])
    for publication in publications_of(sender):
        _connect(sender, publication)


signals.class_prepared.connect(_prepared, dispatch_uid=_UID)


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
