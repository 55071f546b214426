"""What a row carries into its event: values of fields, and which of them changed."""

from __future__ import annotations

import copy
import datetime
import decimal
import functools
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from django.db.models import Field, Model

from ..exceptions import InvalidFields
from .plain import to_plain

_IMMUTABLE = (
    type(None),
    str,
    int,
    float,
    bytes,
    decimal.Decimal,
    uuid.UUID,
    datetime.date,
    datetime.time,
    datetime.timedelta,
)
_JSON = frozenset({type(None), str, int, float, bool})
_LOADED = "pgnotify_loaded"
_UNKNOWN = object()
_by_name: dict[type[Model], tuple[Sequence[Any], dict[str, Field[Any, Any]]]] = {}


def check_fields(model: type[Model], names: object) -> tuple[str, ...]:
    """``names`` as a tuple if each is a concrete field of ``model``.

    Raises:
        InvalidFields: one is not, or ``names`` is not a list of text.
    """
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Collection):
        raise InvalidFields(f"fields= takes a list of field names, got {names!r}.")
    valid = _concrete_fields(model)
    for name in names:
        if not isinstance(name, str) or name not in valid:
            raise InvalidFields(
                f"fields= of {model._meta.label} names {name!r}, which is no concrete field of it; "
                f"choose from {', '.join(field.name for field in model._meta.concrete_fields)}."
            )
    return tuple(names)


def _concrete_fields(model: type[Model]) -> dict[str, Field[Any, Any]]:
    """Fields by name and by attname (``customer`` and ``customer_id``)."""
    concrete = model._meta.concrete_fields
    known = _by_name.get(model)
    if known is None or known[0] is not concrete:  # Django makes another list if a field is added
        fields = {field.attname: field for field in concrete}
        known = _by_name[model] = concrete, fields | {field.name: field for field in concrete}
    return known[1]


@functools.cache
def _named_fields(
    model: type[Model], names: tuple[str, ...]
) -> tuple[tuple[str, str, Field[Any, Any]], ...]:
    """Name, attname and field of each."""
    fields = _concrete_fields(model)
    return tuple((name, fields[name].attname, fields[name]) for name in names)


def has_any(model: type[Model], names: Collection[str]) -> bool:
    """Whether one of ``names`` is a column of the model's own table or of its parents'."""
    return not _concrete_fields(model).keys().isdisjoint(names)


def plain_pk(model: type[Model], instance: Model) -> Any:
    """The primary key that ``instance`` has as a row of ``model``, as a JSON value."""
    first, *others = model._meta.pk_fields
    value = plain(getattr(instance, first.attname))
    if not others:
        return value
    return [value, *(plain(getattr(instance, field.attname)) for field in others)]


def plain(value: Any) -> Any:
    """A primary key, or one part of one, as a JSON value."""
    return value if isinstance(value, (int, str)) else to_plain(value)


def plain_values(
    model: type[Model],
    instance: Model,
    names: tuple[str, ...],
    update_fields: Collection[str] | None = None,
) -> dict[str, Any]:
    """Values of the named fields as JSON values.

    Left out is what the row may not have: an expression, which is no value yet, and a value that
    was assigned and not among ``update_fields``.
    """
    if not names:
        return {}
    row = instance.__dict__
    before = None if update_fields is None else _loaded(model, instance)
    values = {}
    for name, attname, field in _named_fields(model, names):
        value = row.get(attname, _UNKNOWN)
        if before is not None and not _is_written(field, update_fields):
            was = before.get(name, _UNKNOWN)
            if was is _UNKNOWN or was != _snapshot(field, value, instance):
                continue
        if type(value) in _JSON:
            values[name] = value
        elif value is _UNKNOWN or hasattr(value, "resolve_expression"):
            continue
        elif isinstance(value, (str, int, float, dict, list)):
            values[name] = value
        else:
            try:
                values[name] = to_plain(value)
            except TypeError:
                values[name] = field.value_to_string(instance)
    return values


def can_change(data: dict[str, Any]) -> bool:
    """Whether the program holds a part of ``data`` that it may change after the save."""
    return any(type(value) not in _JSON for value in data.values())


def remember(
    model: type[Model],
    instance: Model,
    names: tuple[str, ...],
    written: Collection[str] | None = None,
    *,
    may_roll_back: bool = False,
) -> None:
    """Note the named values as the ones the database has.

    Args:
        written: only these were read or written; None for all of them.
        may_roll_back: a value that differs from the one before is then not known any more.
    """
    row, state = instance.__dict__, vars(instance._state)
    # A copy of the instance has the same dictionaries, so they are replaced and never changed.
    everything: dict[type[Model], dict[str, Any]] = state.get(_LOADED, {})
    loaded = dict(everything.get(model, ()))
    for name, attname, field in _named_fields(model, names):
        if written is None or _is_written(field, written):
            value = row.get(attname, _UNKNOWN)
            if type(value) not in _JSON:
                value = _snapshot(field, value, instance)
            if may_roll_back and (name not in loaded or loaded[name] != value):
                value = _UNKNOWN
            if value is _UNKNOWN:  # which is another object in a pickle
                loaded.pop(name, None)
            else:
                loaded[name] = value
    state[_LOADED] = {**everything, model: loaded}


def _loaded(model: type[Model], instance: Model) -> dict[str, Any]:
    """The values that are known, by the name of their field; not to be changed."""
    everything: dict[type[Model], dict[str, Any]] = vars(instance._state).get(_LOADED, {})
    return everything.get(model, {})


def _is_written(field: Field[Any, Any], written: Collection[str] | None) -> bool:
    return written is None or field.name in written or field.attname in written


def watch_refresh(sender: type[Model], model: type[Model], names: tuple[str, ...]) -> None:
    """Have ``refresh_from_db()`` of ``sender``, which sends no signal, note what it has read."""
    refresh = sender.refresh_from_db

    @functools.wraps(refresh)
    def refresh_from_db(
        self: Model, using: str | None = None, fields: Any = None, **kwargs: Any
    ) -> None:
        fields = None if fields is None else list(fields)
        refresh(self, using, fields, **kwargs)
        remember(model, self, names, fields)

    sender.refresh_from_db = refresh_from_db  # type: ignore[method-assign, assignment]


def watch_loading(model: type[Model], names: tuple[str, ...]) -> None:
    """Have ``from_db()`` note what a row was loaded with.

    Not ``post_init``, which the constructor sends too, and what it was given says nothing of a row
    there may be.
    """
    load = model.from_db.__func__  # type: ignore[attr-defined]

    @functools.wraps(load)
    def from_db(cls: type[Model], *args: Any, **kwargs: Any) -> Model:
        instance: Model = load(cls, *args, **kwargs)
        remember(model, instance, names)
        return instance

    model.from_db = classmethod(from_db)  # type: ignore[method-assign, assignment]


def _snapshot(field: Field[Any, Any], value: Any, instance: Model) -> Any:
    """What ``value``, that of ``field``, can be compared with later."""
    if value is _UNKNOWN or isinstance(value, _IMMUTABLE):
        return value
    if hasattr(value, "resolve_expression"):
        return _UNKNOWN
    if isinstance(value, (dict, list, set)):
        return copy.deepcopy(value)
    try:
        return field.value_to_string(instance)
    except Exception:  # noqa: BLE001 - a field of somebody else's: what it holds is then simply not known
        return _UNKNOWN


def changed_names(
    model: type[Model],
    instance: Model,
    names: tuple[str, ...],
    update_fields: Collection[str] | None,
) -> tuple[str, ...] | None:
    """Names of the fields that an update changed, None where that is not known.

    Without ``names`` it is what ``update_fields`` says was written. With them, each is compared
    with the value that was loaded, or last saved, through this instance.
    """
    if not names:
        if update_fields is None:
            return None
        fields = _concrete_fields(model)
        return tuple(sorted({fields[name].name for name in update_fields if name in fields}))
    row, before = instance.__dict__, _loaded(model, instance)
    changed = []
    for name, attname, field in _named_fields(model, names):
        if not _is_written(field, update_fields):
            continue
        was = before.get(name, _UNKNOWN)
        now = _snapshot(field, row.get(attname, _UNKNOWN), instance)
        if was is _UNKNOWN or now is _UNKNOWN:
            return None
        if was != now:
            changed.append(name)
    return tuple(changed)
