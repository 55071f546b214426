"""Which pages may be stored, and under which key: the rules of ``cached_view``.

Keys are Django's own (``django.utils.cache``): the URL, the language, the time zone and the headers
that the page varies on. Those headers are known only once the page has been made, so they are kept
in the cache too, under a key of the URL.
"""

from __future__ import annotations

import pickle
import time

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import (
    get_cache_key,
    get_max_age,
    has_vary_header,
    learn_cache_key,
    patch_vary_headers,
)

METHODS = ("GET", "HEAD")
_FORBIDS = ("private", "no-cache", "no-store")
#: Seconds that the headers of a page without a timeout are kept for: a year.
_FOR_EVER = 365 * 24 * 3600


class HeaderList:
    """The one entry that Django's key functions ask for or store, read and written by the caller.

    They take a cache and are synchronous; a view that is not has to await the cache in between.
    """

    def __init__(self, found: list[str] | None = None) -> None:
        self.key: str | None = None
        self.headers = found

    def get(self, key: str) -> list[str] | None:
        self.key = key
        return self.headers

    def set(self, key: str, headers: list[str], timeout: float | None) -> None:
        self.key, self.headers = key, headers


def header_list_key(request: HttpRequest, prefix: str) -> str:
    """Where the names of the headers are kept that the pages of this URL vary on."""
    asked = HeaderList()
    get_cache_key(request, prefix, "GET", cache=asked)  # type: ignore[arg-type]
    assert asked.key is not None
    return asked.key


def page_keys(request: HttpRequest, prefix: str, headers: list[str]) -> list[str]:
    """Where a page for this request may be stored; that of a GET answers a HEAD too."""
    methods = METHODS[: METHODS.index(request.method or "") + 1]
    known = HeaderList(headers)
    found = (
        get_cache_key(request, prefix, method, cache=known)  # type: ignore[arg-type]
        for method in methods
    )
    return [key for key in found if key is not None]


def learn_page_key(
    request: HttpRequest, response: HttpResponseBase, timeout: float | None, prefix: str
) -> tuple[str, HeaderList]:
    """The key of a page that has been made, and the list of headers to be stored beside it."""
    learned = HeaderList()
    key = learn_cache_key(
        request,
        response,
        _FOR_EVER if timeout is None else timeout,
        prefix,
        cache=learned,  # type: ignore[arg-type]
    )
    return key, learned


def vary_on_what_was_read(request: HttpRequest, response: HttpResponseBase) -> None:
    """Name the headers that the page has certainly been made from.

    The session's middleware does the same for the reader, but after the view and so after us.
    """
    if getattr(getattr(request, "session", None), "accessed", False):
        patch_vary_headers(response, ["Cookie"])
    if request.headers.get("Authorization") and "public" not in _cache_control(response):
        patch_vary_headers(response, ["Authorization"])


def may_store(request: HttpRequest, response: HttpResponseBase) -> bool:
    """Whether the page may be given to somebody else who asks for the same."""
    return not (
        response.streaming
        or response.status_code != 200
        or response.cookies
        or any(directive in _cache_control(response) for directive in _FORBIDS)
        or has_vary_header(response, "*")
        or _is_personal(request)
    )


def _cache_control(response: HttpResponseBase) -> str:
    return str(response.headers.get("Cache-Control", "")).lower()


def _is_personal(request: HttpRequest) -> bool:
    """Whether making the page has used up or changed something of this one visitor.

    A CSRF token, a message shown, a session written: middleware sends the cookies for those, but
    after us. And a nonce of a Content Security Policy, which is of this one response.
    """
    if "CSRF_COOKIE_NEEDS_UPDATE" in request.META or getattr(request, "_csp_nonce", None):
        return True
    if getattr(getattr(request, "session", None), "modified", False):
        return True
    messages = getattr(request, "_messages", None)
    return bool(getattr(messages, "used", False) or getattr(messages, "added_new", False))


def pack(response: HttpResponseBase) -> bytes:
    """A page as it is now, with the time; middleware may go on changing the response itself."""
    return pickle.dumps((time.time(), response), pickle.HIGHEST_PROTOCOL)


def unpack(stored: bytes) -> HttpResponse:
    """A page of its own for this reader.

    Where the view tells browsers for how long to keep it, ``Age`` says how much of that is over.
    """
    made_at, response = pickle.loads(stored)
    if get_max_age(response) is not None:
        response.headers["Age"] = str(max(0, int(time.time() - made_at)))
    page: HttpResponse = response
    return page
