"""``cached_view``: a page that is kept until what it was made from changes.

Django's ``cache_page`` keeps a page until its time is over: it knows no tags, and tells browsers to
keep it for as long, where no invalidation can reach. It is what to use for pages that depend on
nothing but the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from asgiref.sync import iscoroutinefunction
from django.apps import apps
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers

from ..epochs.use import declare_use
from ..exceptions import InvalidArgument
from .flights import PAGE, afly, fly
from .level import MISSING
from .loading import StoreLease, alookup, lookup, names_of_dependencies
from .pages import (
    METHODS,
    header_list_key,
    learn_page_key,
    may_store,
    pack,
    page_keys,
    unpack,
    vary_on_what_was_read,
)

View = TypeVar("View", bound=Callable[..., Any])


def cached_view(
    timeout: float | None,
    *,
    depends_on: Any = (),
    tags: Iterable[str] = (),
    vary: Iterable[str] = (),
    cache: str = "default",
    key_prefix: str = "",
) -> Callable[[View], View]:
    """Keep the pages of a view until a model or tag that they depend on changes.

    What was read before a change is never taken for a page of after it: the lease is taken before
    the view runs. Other cached values that go into a page make it depend on what they depend on. Of
    the threads of a process that miss a page at once which has been kept before, one makes it.

    GET and HEAD only. Pages are told apart by URL, language, time zone and the headers of
    ``Vary``. A page is not kept that streams, has another status than 200, sets a cookie, forbids
    it (``Cache-Control: private``, ``no-cache`` or ``no-store``, ``Vary: *``), or was made for one
    visitor: with a CSRF token, a message, or a session that was changed. One that has read the
    session varies on ``Cookie``. ``ETag``, ``Last-Modified``, ``Expires`` and ``Cache-Control``
    stay as the view has left them.

    Args:
        timeout: seconds that a page is kept at most; None: until something changes.
        depends_on: models, or their labels, whose changes make the pages stale.
        tags: tags that do, as templates over the view's keyword arguments: ``"customer:{pk}"``.
        vary: request headers that the pages vary on, beside those that the view names.
        cache: alias in CACHES: a NearCache, or any other.
        key_prefix: tells these pages from others of the same URL, as for ``cache_page``.

    Raises:
        InvalidArgument: a bad argument, or a model that publishes no changes; of a tag that names
            no keyword argument, when the view is called.
    """
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
        raise InvalidArgument(f"timeout= takes a number of seconds, or None; got {timeout!r}.")
    if apps.ready:
        names_of_dependencies(depends_on, ())
    declare_use()
    pages = _Pages(
        timeout,
        depends_on,
        _texts("tags", tags),
        _texts("vary", vary),
        cache,
        f"pgnotify.{key_prefix}",
    )

    def decorate(view: View) -> View:
        if iscoroutinefunction(view):

            @wraps(view)
            async def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
                if not pages.concern(request):
                    return await view(request, *args, **kwargs)

                async def look() -> Any:
                    return (await _arun(pages.find(request))).page

                async def make() -> Any:
                    lease = pages.lease(kwargs)
                    with lease:
                        response = await view(request, *args, **kwargs)
                    if not pages.is_rendered_later(request, response, lease):
                        await _arun(pages.keep(request, response, lease))
                    return response

                found = await _arun(pages.find(request))
                if found.page is not MISSING:
                    return found.page
                if found.key is None:
                    return await make()
                return await afly(found.key, look, make, rank=PAGE)
        else:

            @wraps(view)
            def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
                if not pages.concern(request):
                    return view(request, *args, **kwargs)

                def look() -> Any:
                    return _run(pages.find(request)).page

                def make() -> Any:
                    lease = pages.lease(kwargs)
                    with lease:
                        response = view(request, *args, **kwargs)
                    if not pages.is_rendered_later(request, response, lease):
                        _run(pages.keep(request, response, lease))
                    return response

                found = _run(pages.find(request))
                if found.page is not MISSING:
                    return found.page
                if found.key is None:
                    return make()
                return fly(found.key, look, make, rank=PAGE)

        return wrapped  # type: ignore[return-value]

    return decorate


class _Look(NamedTuple):
    """Asks for the value of a key."""

    alias: str
    key: str

    def now(self) -> Any:
        return lookup(self.alias, self.key)

    async def soon(self) -> Any:
        return await alookup(self.alias, self.key)


class _Store(NamedTuple):
    """Asks for a value to be stored."""

    lease: StoreLease
    key: str
    value: Any
    timeout: float | None

    def now(self) -> bool:
        return self.lease.store(self.key, self.value, self.timeout)

    async def soon(self) -> bool:
        return await self.lease.astore(self.key, self.value, self.timeout)


class _Found(NamedTuple):
    """A page, or MISSING and what those who make one wait for each other by."""

    page: Any
    key: tuple[str, str] | None


class _Pages(NamedTuple):
    """The pages of one view: what is looked up and stored, by whoever runs the steps."""

    timeout: float | None
    depends_on: Any
    tags: tuple[str, ...]
    vary: tuple[str, ...]
    cache: str
    prefix: str

    def concern(self, request: HttpRequest) -> bool:
        """Whether a page for this request may be kept; nobody else is to keep it, either."""
        if not hasattr(request, "META"):
            raise TypeError(
                f"cached_view got {request!r} and no request: decorate a method with "
                f"@method_decorator(cached_view(...))."
            )
        # To UpdateCacheMiddleware, which would keep the page for a time and without its tags.
        request._cache_update_cache = False  # type: ignore[attr-defined]
        return request.method in METHODS

    def lease(self, kwargs: Mapping[str, Any]) -> StoreLease:
        try:
            tags = [tag.format_map(kwargs) for tag in self.tags]
        except (KeyError, ValueError, AttributeError, LookupError) as exc:
            raise InvalidArgument(
                f"tags= {self.tags!r} of a cached view cannot be filled with its keyword arguments "
                f"({', '.join(kwargs) or 'there are none'}): {exc!r}."
            ) from None
        return StoreLease(self.cache, names_of_dependencies(self.depends_on, tags))

    def find(self, request: HttpRequest) -> Generator[_Look, Any, _Found]:
        headers = yield _Look(self.cache, header_list_key(request, self.prefix))
        if headers is MISSING:
            return _Found(MISSING, None)
        keys = page_keys(request, self.prefix, headers)
        for key in keys:
            stored = yield _Look(self.cache, key)
            if stored is not MISSING:
                return _Found(unpack(stored), None)
        # A page of this URL has been kept, so one that is made now will be, most likely.
        return _Found(MISSING, (self.cache, keys[-1]))

    def keep(
        self, request: HttpRequest, response: HttpResponseBase, lease: StoreLease
    ) -> Generator[_Store, Any, None]:
        if self.vary:
            patch_vary_headers(response, self.vary)
        vary_on_what_was_read(request, response)
        if may_store(request, response):
            key, headers = learn_page_key(request, response, self.timeout, self.prefix)
            if headers.key is not None:
                # The names of headers outlive what the page was made of.
                own = StoreLease(self.cache, ())
                yield _Store(own, headers.key, headers.headers, self.timeout)
                yield _Store(lease, key, pack(response), self.timeout)

    def is_rendered_later(self, request: HttpRequest, response: Any, lease: StoreLease) -> bool:
        """Whether it is a TemplateResponse that middleware may still change; it is kept then."""
        render = getattr(response, "render", None)
        if not callable(render) or getattr(response, "is_rendered", True):
            return False

        def rendering() -> Any:
            del response.render  # that of its class again: what is kept is pickled
            with lease:
                return render()

        response.render = rendering
        response.add_post_render_callback(
            lambda rendered: _run(self.keep(request, rendered, lease))
        )
        return True


def _run(steps: Generator[Any, Any, Any]) -> Any:
    try:
        step = next(steps)
        while True:
            step = steps.send(step.now())
    except StopIteration as end:
        return end.value


async def _arun(steps: Generator[Any, Any, Any]) -> Any:
    try:
        step = next(steps)
        while True:
            step = steps.send(await step.soon())
    except StopIteration as end:
        return end.value


def _texts(what: str, given: object) -> tuple[str, ...]:
    texts = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if (given and not texts) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidArgument(f"{what}= takes a list of non-empty texts; got {given!r}.")
    return texts
