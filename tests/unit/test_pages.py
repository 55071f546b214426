"""Which pages cached_view keeps, and how it tells them apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import RequestFactory
from django.utils import translation

from django_pgnotify.caching import pages

requests = RequestFactory()


def keys_for(request: HttpRequest, response: HttpResponse, prefix: str = "p") -> tuple[str, Any]:
    key, learned = pages.learn_page_key(request, response, 60, prefix)
    assert learned.key == pages.header_list_key(request, prefix)
    return key, learned.headers


def finds(request: HttpRequest, key: str, headers: list[str], prefix: str = "p") -> bool:
    return key in pages.page_keys(request, prefix, headers)


def test_a_page_is_found_under_the_key_it_was_kept_under() -> None:
    key, headers = keys_for(requests.get("/orders/?page=2"), HttpResponse("two"))
    assert headers == []
    assert finds(requests.get("/orders/?page=2"), key, headers)
    assert not finds(requests.get("/orders/?page=3"), key, headers)
    assert not finds(requests.get("/orders/?page=2"), key, headers, prefix="another")
    assert not finds(requests.get("/orders/?page=2", headers={"host": "shop.test"}), key, headers)


def test_the_page_of_a_get_answers_a_head_and_not_the_other_way_round() -> None:
    key, headers = keys_for(requests.get("/"), HttpResponse("all of it"))
    assert finds(requests.head("/"), key, headers)
    key, headers = keys_for(requests.head("/"), HttpResponse())
    assert not finds(requests.get("/"), key, headers)
    assert finds(requests.head("/"), key, headers)


def test_a_page_varies_on_the_headers_it_names() -> None:
    response = HttpResponse("for Ann", headers={"Vary": "Cookie, X-Shop"})
    key, headers = keys_for(requests.get("/", headers={"cookie": "name=ann"}), response)
    assert headers == ["HTTP_COOKIE", "HTTP_X_SHOP"]
    assert finds(requests.get("/", headers={"cookie": "name=ann"}), key, headers)
    for other in ({"cookie": "name=bob"}, {}, {"cookie": "name=ann", "x-shop": "two"}):
        assert not finds(requests.get("/", headers=other), key, headers)


def test_a_page_varies_on_the_language(settings: Any) -> None:
    with translation.override("en"):
        key, headers = keys_for(requests.get("/"), HttpResponse("hello"))
        assert finds(requests.get("/"), key, headers)
    with translation.override("de"):
        assert not finds(requests.get("/"), key, headers)


def test_a_plain_page_is_kept() -> None:
    assert pages.may_store(requests.get("/"), HttpResponse("all"))


@pytest.mark.parametrize(
    "response",
    [
        HttpResponse(status=404),
        HttpResponse(status=302, headers={"Location": "/"}),
        HttpResponse(status=500),
        HttpResponse(status=304),
        StreamingHttpResponse(["a"]),
        HttpResponse(headers={"Cache-Control": "private"}),
        HttpResponse(headers={"Cache-Control": "max-age=60, No-Store"}),
        HttpResponse(headers={"Cache-Control": "no-cache"}),
        HttpResponse(headers={"Vary": "Accept, *"}),
    ],
    ids=lambda response: f"{response.status_code} {dict(response.items())}",
)
def test_a_page_that_is_not_for_everybody_is_not_kept(response: HttpResponse) -> None:
    assert not pages.may_store(requests.get("/"), response)


def test_a_page_that_sets_a_cookie_is_not_kept() -> None:
    response = HttpResponse()
    response.set_cookie("basket", "17")
    assert not pages.may_store(requests.get("/"), response)


def with_token(request: HttpRequest) -> None:
    from django.middleware.csrf import get_token

    get_token(request)


def with_session(**state: bool) -> Callable[[Any], None]:
    def give(request: Any) -> None:
        request.session = SimpleNamespace(**{"accessed": False, "modified": False, **state})

    return give


def with_messages(**state: bool) -> Callable[[Any], None]:
    def give(request: Any) -> None:
        request._messages = SimpleNamespace(**{"used": False, "added_new": False, **state})

    return give


def with_nonce(request: Any) -> None:
    request._csp_nonce = "bm9uY2U="


@pytest.mark.parametrize(
    "happened",
    [
        with_token,
        with_nonce,
        with_session(accessed=True, modified=True),
        with_messages(used=True),
        with_messages(added_new=True),
    ],
    ids=["csrf", "nonce", "session", "message shown", "message added"],
)
def test_a_page_made_for_one_visitor_is_not_kept(happened: Callable[[HttpRequest], None]) -> None:
    request = requests.get("/")
    happened(request)
    assert not pages.may_store(request, HttpResponse())


def test_a_nonce_that_the_page_did_not_use_is_not_in_it() -> None:
    csp = pytest.importorskip("django.utils.csp", reason="Django has it from 6.0 on")
    request: Any = requests.get("/")
    request._csp_nonce = csp.LazyNonce()
    assert pages.may_store(request, HttpResponse())
    page = HttpResponse(f"<script nonce='{request._csp_nonce}'>")
    assert not pages.may_store(request, page)


def test_a_page_whose_visitor_has_nothing_of_his_own_in_it_is_kept() -> None:
    request = requests.get("/")
    for give in (with_session(), with_messages()):
        give(request)
    response = HttpResponse()
    pages.vary_on_what_was_read(request, response)
    assert "Vary" not in response.headers
    assert pages.may_store(request, response)


def test_a_page_that_read_the_session_varies_on_the_cookie() -> None:
    request, response = requests.get("/"), HttpResponse(headers={"Vary": "Accept"})
    with_session(accessed=True)(request)
    pages.vary_on_what_was_read(request, response)
    assert response.headers["Vary"] == "Accept, Cookie"
    assert pages.may_store(request, response)


@pytest.mark.parametrize(("says", "varies"), [("", True), ("public, max-age=5", False)])
def test_a_page_for_someone_who_authenticates_varies_on_that(says: str, varies: bool) -> None:
    request = requests.get("/", headers={"authorization": "Bearer me"})
    response = HttpResponse(headers={"Cache-Control": says})
    pages.vary_on_what_was_read(request, response)
    assert ("Authorization" in response.headers.get("Vary", "")) is varies


def test_a_page_is_the_readers_own() -> None:
    stored = pages.pack(HttpResponse("all", headers={"ETag": '"1"', "X-Made": "by us"}))
    one, other = pages.unpack(stored), pages.unpack(stored)
    one.headers["X-Made"] = "changed"
    one.set_cookie("basket", "17")
    assert (other.content, other.headers["X-Made"], len(other.cookies)) == (b"all", "by us", 0)
    assert other.headers["ETag"] == '"1"'
    assert "Age" not in other.headers


def test_a_page_that_browsers_may_keep_says_how_old_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = pages.pack(HttpResponse(headers={"Cache-Control": "max-age=60"}))
    assert pages.unpack(stored).headers["Age"] == "0"
    later = time.time() + 42.5
    monkeypatch.setattr(time, "time", lambda: later)
    assert pages.unpack(stored).headers["Age"] == "42"
    monkeypatch.setattr(time, "time", lambda: later - 3600)
    assert pages.unpack(stored).headers["Age"] == "0"
