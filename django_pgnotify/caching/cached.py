"""``cached`` and ``get_or_set``: cached values that a change makes stale, on every node."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Generic, Never, ParamSpec, TypeVar

from asgiref.sync import markcoroutinefunction
from django.core.cache.backends.base import DEFAULT_TIMEOUT

from ..epochs.use import declare_use
from ..exceptions import InvalidArgument
from ..registry import is_coroutine_callable, is_model
from .keys import Arguments, key_maker
from .loading import Place, aload, load, names_of_dependencies
from .shelf import Shelf
from .tags import invalidate_keys

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Key = str | Callable[..., str]


def cached(
    *positional: Never,
    key: Key | None = None,
    timeout: Any = DEFAULT_TIMEOUT,
    depends_on: Any = (),
    tags: Iterable[str] = (),
    cache: str = "default",
    version: int | None = None,
) -> Callable[[Callable[P, R]], CachedFunction[P, R]]:
    """Cache what a function returns, until something that it depends on changes.

    ::

        @cached(depends_on=[Order])
        def open_orders(): ...

        @cached(key="customer:{pk}", tags=["customer:{pk}"], timeout=3600)
        async def customer(pk): ...

    Whatever else is read from caches while it runs (other cached functions, a NearCache) it depends
    on too. A value that was read before a change is never taken for one of after it; inside a
    transaction that has written, nothing is stored before the commit. Of the threads of a process
    that miss a key at once, one calls the function.

    Args:
        key: template over the arguments (``"customer:{pk}"``), or a function of them; default: the
            function's name, which must then be its alone, and all arguments, which must be plain
            values.
        timeout: seconds, as Django's caches take it: None for ever, default the cache's own.
        depends_on: models whose changes make it stale; ``model_tag`` names single rows in
            ``tags``. They have to publish their changes.
        tags: templates over the arguments; ``invalidate_tags`` and ``invalidates(tags=)`` make
            stale what has them.
        cache: alias in CACHES: a NearCache, or any other.
        version: of the key, as Django's cache API takes it.

    Raises:
        InvalidTemplate: a template is malformed, or names no parameter.
        InvalidArgument: a bad argument, a model that publishes no changes, or no ``key`` for a
            method, a lambda, a ``partial()``, or a function that one around it makes anew.
    """
    if positional:
        raise InvalidArgument(_said_of(*positional))
    _check_cache(cache)
    tags = _check_templates(tags)

    def decorate(func: Callable[P, R]) -> CachedFunction[P, R]:
        if not callable(func) or isinstance(func, type):
            raise InvalidArgument(f"cached() decorates a function; got {func!r}.")
        arguments = Arguments(func)
        templates = tuple(arguments.template(tag, "tags=") for tag in tags)
        kind = CachedCoroutine if is_coroutine_callable(func) else CachedFunction
        return kind(func, arguments, key, timeout, depends_on, templates, cache, version)

    return decorate


def _said_of(given: Any, *others: Any) -> str:
    """What to write in place of ``@cached`` alone, or of arguments without a name."""
    if is_model(given):
        return f"cached() takes named arguments: write depends_on=[{given.__name__}]."
    if callable(given) and not isinstance(given, type):
        name = getattr(given, "__name__", repr(given))
        return f"@cached above {name}() has no arguments: write @cached(), or what it depends on."
    if isinstance(given, (int, float)):
        return f"cached() takes named arguments: write timeout={given!r}."
    return (
        f"cached() takes named arguments only (key=, timeout=, depends_on=, tags=, cache=, "
        f"version=); got {given!r}."
    )


class CachedFunction(Generic[P, R]):
    """A function whose results are cached; calling it looks in the cache first."""

    __name__: str
    __wrapped__: Callable[P, R]

    def __init__(
        self,
        func: Callable[P, R],
        arguments: Arguments,
        key: Key | None,
        timeout: Any,
        depends_on: Any,
        tags: tuple[str, ...],
        cache: str,
        version: int | None,
    ) -> None:
        functools.update_wrapper(self, func)
        self.__name__ = getattr(func, "__name__", repr(func))  # a partial has none
        self._func = func
        self._arguments = arguments
        self._make_key = key_maker(arguments, key)
        self._timeout = timeout
        self._depends_on = _check_models(depends_on)
        self._tags = tags
        self.cache = cache
        self._version = version
        _functions[id(self)] = self
        declare_use()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return load(  # type: ignore[no-any-return]
            self._place(args, kwargs), functools.partial(self._func, *args, **kwargs)
        )

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A method: its instance is the first argument."""
        return self if instance is None else _Bound(self, instance)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The key of the value that a call with these arguments returns."""
        return self._make_key(*args, **kwargs)

    def tags(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, ...]:
        """What ``invalidate_tags`` takes to make that value stale."""
        return tuple(name[2:] for name in self._names(args, kwargs))

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Make that value stale on every node; inside a transaction, with its commit."""
        invalidate_keys(self.key(*args, **kwargs), cache=self.cache, version=self._version)

    def check(self) -> None:
        """Raise InvalidArgument if it depends on a model that does not publish all changes."""
        names_of_dependencies(self._depends_on, ())

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        key = self._make_key(*args, **kwargs)
        return Place(
            Shelf(self.cache), key, self._version, self._timeout, self._names(args, kwargs)
        )

    def _names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        if not self._tags:
            return self._fixed_names
        values = self._arguments.of(args, kwargs)
        tags = [template.format_map(values) for template in self._tags]
        return names_of_dependencies(self._depends_on, tags)

    @functools.cached_property
    def _fixed_names(self) -> tuple[str, ...]:
        return names_of_dependencies(self._depends_on, ())


_functions: weakref.WeakValueDictionary[int, CachedFunction[Any, Any]]
_functions = weakref.WeakValueDictionary()


def cached_functions() -> list[CachedFunction[Any, Any]]:
    """Those of this process, for the system checks."""
    # valuerefs() is a copy made in one step: another thread may define one meanwhile.
    found = [function for ref in _functions.valuerefs() if (function := ref()) is not None]
    return sorted(found, key=lambda function: function.__name__)


class CachedCoroutine(CachedFunction[P, R]):
    """As CachedFunction, of an ``async def``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        markcoroutinefunction(self)  # for whoever has to know, such as Django of its views

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:  # type: ignore[override]
        return await aload(
            self._place(args, kwargs),
            functools.partial(self._func, *args, **kwargs),  # type: ignore[arg-type]
        )


class _Bound:
    """A cached method of one instance."""

    def __init__(self, cached_function: CachedFunction[Any, Any], instance: object) -> None:
        self._cached = cached_function
        self._instance = instance
        functools.update_wrapper(self, cached_function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cached(self._instance, *args, **kwargs)

    def key(self, *args: Any, **kwargs: Any) -> str:
        return self._cached.key(self._instance, *args, **kwargs)

    def tags(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return self._cached.tags(self._instance, *args, **kwargs)

    def invalidate(self, *args: Any, **kwargs: Any) -> None:
        self._cached.invalidate(self._instance, *args, **kwargs)


def get_or_set(
    key: str,
    loader: Callable[[], T],
    timeout: Any = DEFAULT_TIMEOUT,
    *,
    depends_on: Any = (),
    tags: Iterable[str] = (),
    cache: str = "default",
    version: int | None = None,
) -> T:
    """The cached value of ``key``; where there is none that counts, what ``loader()`` returns.

    As ``cached`` promises for functions; ``tags`` are as they stand, and ``depends_on`` takes saved
    instances as well: ``depends_on=order`` is that row.

    Raises:
        InvalidArgument: a bad argument, or a model that publishes no changes.
    """
    if not callable(loader):
        raise InvalidArgument(f"loader= takes a function without arguments; got {loader!r}.")
    return load(_place_of(key, timeout, depends_on, tags, cache, version), loader)  # type: ignore[no-any-return]


async def aget_or_set(
    key: str,
    loader: Callable[[], Awaitable[T]],
    timeout: Any = DEFAULT_TIMEOUT,
    *,
    depends_on: Any = (),
    tags: Iterable[str] = (),
    cache: str = "default",
    version: int | None = None,
) -> T:
    """As :func:`get_or_set`, with an async loader."""
    if not callable(loader):
        raise InvalidArgument(f"loader= takes a function without arguments; got {loader!r}.")
    place = _place_of(key, timeout, depends_on, tags, cache, version)
    return await aload(place, loader)  # type: ignore[no-any-return]


def _place_of(
    key: str,
    timeout: Any,
    depends_on: Any,
    tags: Iterable[str],
    cache: str,
    version: int | None,
) -> Place:
    if not isinstance(key, str) or not key:
        raise InvalidArgument(f"key= takes a non-empty string; got {key!r}.")
    _check_cache(cache)
    declare_use()
    return Place(Shelf(cache), key, version, timeout, names_of_dependencies(depends_on, tags))


def _check_cache(cache: object) -> None:
    if not isinstance(cache, str) or not cache:
        raise InvalidArgument(f"cache= takes an alias of CACHES; got {cache!r}.")


def _check_templates(tags: object) -> tuple[Any, ...]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidArgument(f"tags= takes a list of templates; got {tags!r}.")
    return tuple(tags)


def _check_models(depends_on: Any) -> tuple[Any, ...]:
    """``depends_on`` as a tuple. Whether the models publish can be told once all are loaded."""
    several = isinstance(depends_on, (list, tuple, set, frozenset))
    models = tuple(depends_on) if several else (depends_on,)
    for model in models:
        if not is_model(model) and not (isinstance(model, str) and model.count(".") == 1):
            raise InvalidArgument(
                f"depends_on= takes model classes, or labels such as 'shop.Order'; got {model!r}."
            )
    return models
