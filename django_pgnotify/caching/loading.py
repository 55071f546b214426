"""Load and cache: the lease before, the load, and what the value turned out to depend on after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Self

from asgiref.sync import sync_to_async
from django.core.cache.backends.base import DEFAULT_TIMEOUT

from ..epochs.names import check_tags, model_tag, tag_name
from ..epochs.table import Lease
from ..exceptions import InvalidArgument
from ..labels import model_of
from ..registry import is_model, model_label, registry
from .flights import afly, fly
from .frozen import freeze
from .leases import Load, current_load, loading
from .level import MISSING
from .shelf import Shelf
from .transactions import after_all, in_transaction, touched_names, writers

_CHANGES = frozenset({"created", "updated", "deleted"})


class Place(NamedTuple):
    """Where a value belongs, and what it depends on."""

    shelf: Shelf
    key: str
    version: int | None
    timeout: Any
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is known by in this process: one for all aliases of one store."""
        return self.shelf.name_of(self.key, self.version)


def names_of_dependencies(depends_on: Any, tags: Iterable[str]) -> tuple[str, ...]:
    """Names of models, of rows (instances), and of tags.

    Args:
        depends_on: a model class, a label such as ``"shop.Order"``, a saved instance, or a list.

    Raises:
        InvalidArgument: one of them is none of these, or publishes no changes.
    """
    several = isinstance(depends_on, (list, tuple, set, frozenset))
    found: list[str] = []
    for one in depends_on if several else [depends_on]:
        found += model_tags_of(one)
    return tuple(dict.fromkeys(map(tag_name, (*found, *check_tags(tags)))))


def model_tags_of(source: Any) -> list[str]:
    """The tags of a model or of a row, one for each table that it lies in.

    The parents' as well as its own: a row of theirs may be saved as no more than that.

    Raises:
        InvalidArgument: it is something else, or publishes no changes.
    """
    from django.apps import apps

    row = None
    model = source
    if isinstance(source, str):
        try:
            model = model_of(source)
        except InvalidArgument as exc:
            raise InvalidArgument(f"depends_on= {source!r}: {exc}") from None
    elif is_model(type(source)):
        model, row = type(source), source
        if source.pk is None:
            raise InvalidArgument(f"depends_on= has {source!r}, which has not been saved.")
    if not is_model(model):
        raise InvalidArgument(
            f"depends_on= takes model classes, their labels or saved instances; got {source!r}."
        )
    tags = []
    for table, pk in _tables_of(model, row, None if row is None else row.pk):
        tags.append(model_tag(table, pk))
        if apps.ready:
            _check_publication(table, model)
    return tags


def _tables_of(model: Any, row: Any, pk: Any) -> Iterator[tuple[Any, Any]]:
    """A model and its parents, with the primary key that a row has there."""
    yield model, pk
    for parent, link in model._meta.parents.items():
        if row is not None and link is not None and not link.primary_key:
            yield from _tables_of(parent, row, getattr(row, link.attname))
        else:
            yield from _tables_of(parent, row, pk)


def _check_publication(table: Any, model: Any) -> None:
    publication = registry.publications.get(model_label(table))
    named = model._meta.label
    if table is not model:
        named += f", whose rows lie in the table of {table._meta.label} too"
    if publication is None:
        raise InvalidArgument(
            f"depends_on= names {named}, which publishes no changes: decorate it with "
            f"@notify_changes or add it to PGNOTIFY_MODELS."
        )
    missing = _CHANGES - (publication.actions or _CHANGES)
    if missing:
        raise InvalidArgument(
            f"depends_on= names {named}, of which nothing is published when a row is "
            f"{' or '.join(sorted(missing))}: take actions= off its notify_changes()."
        )


def lookup(alias: str, key: str, version: int | None = None) -> Any:
    """The cached value of a key, MISSING where there is none that counts, or MISSING where this
    transaction has changed what it depends on."""
    place = Place(Shelf(alias), key, version, None, ())
    return _look(place)


async def alookup(alias: str, key: str, version: int | None = None) -> Any:
    """As :func:`lookup`."""
    return await _alook(Place(Shelf(alias), key, version, None, ()))


class StoreLease:
    """What :func:`take_lease` returns: the right to store what is loaded from now on.

    What is read from caches between the lease and :meth:`store` counts as part of the value where
    the load is run inside ``with lease:``.
    """

    def __init__(self, alias: str, names: tuple[str, ...]) -> None:
        self._shelf = Shelf(alias)
        self._names = names
        self._lease = self._shelf.lease()
        self._load = Load()
        self._contexts: list[Any] = []

    def __enter__(self) -> Self:
        context = loading(self._load)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *exc: object) -> None:
        self._contexts.pop().__exit__(*exc)

    def store(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        """Cache a value; False where it may be stale already, or waits for a COMMIT."""
        place = Place(self._shelf, key, version, timeout, self._names)
        return _store(place, value, self._lease, self._load)

    async def astore(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        """As :meth:`store`."""
        place = Place(self._shelf, key, version, timeout, self._names)
        return await _astore(place, value, self._lease, self._load)


def take_lease(
    alias: str = "default", *, depends_on: Any = (), tags: Iterable[str] = ()
) -> StoreLease:
    """A lease for a value that is loaded now and whose key is known later, as that of a response.

    Raises:
        InvalidArgument: as :func:`names_of_dependencies`.
    """
    return StoreLease(alias, names_of_dependencies(depends_on, tags))


def load(place: Place, loader: Callable[[], Any]) -> Any:
    """The cached value of a place, loaded where there is none that counts."""
    found = _look(place)
    if found is not MISSING:
        return found

    def run() -> Any:
        lease = place.shelf.lease()
        with loading() as parts:
            value = loader()
        _store(place, value, lease, parts)
        return value

    return fly(place.name, partial(_look, place), run)


async def aload(place: Place, loader: Callable[[], Awaitable[Any]]) -> Any:
    """As :func:`load`."""
    found = await _alook(place)
    if found is not MISSING:
        return found

    async def run() -> Any:
        lease = place.shelf.lease()
        with loading() as parts:
            value = await loader()
        await _astore(place, value, lease, parts)
        return value

    return await afly(place.name, partial(_alook, place), run)


def _look(place: Place) -> Any:
    touched = touched_names()
    if not touched:
        return place.shelf.look(place.key, place.version)
    return _unless_touched(place.shelf, place, touched)


def _unless_touched(shelf: Shelf, place: Place, touched: set[str]) -> Any:
    """A value that depends on nothing which this transaction has changed."""
    with loading() as parts:
        found = shelf.look(place.key, place.version)
    if found is MISSING or not touched.isdisjoint(parts.names):
        return MISSING
    outer = current_load()
    if outer is not None and parts.at is not None:
        outer.add(parts.names, parts.at)
    return found


async def _alook(place: Place) -> Any:
    # A loop's thread has no transaction: those are of threads, and of sync code.
    return await place.shelf.alook(place.key, place.version)


def _store(place: Place, value: Any, lease: Lease, parts: Load) -> bool:
    names = (*place.names, *parts.names)
    _tell_outer(place, lease, parts, names)
    put = partial(
        place.shelf.put,
        place.key,
        lease=lease,
        names=names,
        timeout=place.timeout,
        version=place.version,
        loaded_at=parts.at,
    )
    waits_for = writers()
    if waits_for is None:
        return False
    if waits_for:
        frozen = freeze(value)  # whoever has asked for it may change it before the COMMIT
        after_all(waits_for, lambda: put(frozen.thaw()))
        return False
    return put(value)


async def _astore(place: Place, value: Any, lease: Lease, parts: Load) -> bool:
    names = (*place.names, *parts.names)
    _tell_outer(place, lease, parts, names)
    if await sync_to_async(in_transaction)():
        # Around async code there can be one only in the thread that sync code runs in.
        return await sync_to_async(_store)(place, value, lease, parts)
    return await place.shelf.aput(
        place.key, value, lease, names, place.timeout, place.version, parts.at
    )


def _tell_outer(place: Place, lease: Lease, parts: Load, names: tuple[str, ...]) -> None:
    outer = current_load()
    if outer is not None:
        at = lease.at if parts.at is None else min(lease.at, parts.at)
        outer.add((place.name, *names), at)
