"""Pages that are kept until what they were made from changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.cache import caches
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.middleware.cache import FetchFromCacheMiddleware, UpdateCacheMiddleware
from django.middleware.csrf import get_token
from django.middleware.http import ConditionalGetMiddleware
from django.template import engines
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, RequestFactory
from django.test.utils import override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import cache_page

from django_pgnotify.caching import cached, cached_view, flights, invalidate_tags
from django_pgnotify.exceptions import InvalidArgument
from django_pgnotify.registry import Registry
from tests.integration.caching import near_caches, until
from tests.testapp.models import Article, Audited, Order, Tag

pytestmark = pytest.mark.django_db(transaction=True)

requests = RequestFactory()
numbers = count(1)


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path, pgnotify_registry: Registry) -> Iterator[None]:
    settings.PGNOTIFY_MAX_STALENESS = None  # nobody listens: what counts here is the writer's node
    with near_caches(settings, tmp_path):
        yield


@pytest.fixture(params=["near", "files"])
def alias(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def get(view: Callable[..., Any], url: str = "/", *, method: str = "GET", **kwargs: Any) -> str:
    headers = kwargs.pop("headers", {})
    response = view(requests.generic(method, url, headers=headers), **kwargs)
    if hasattr(response, "render"):
        response.render()
    return str(response.content.decode())


def orders_page(alias: str, **options: Any) -> Callable[..., HttpResponse]:
    """A view that says how many orders there are, and how often it has been asked to."""
    calls = count(1)

    @cached_view(60, depends_on=[Order], cache=alias, **options)
    def page(request: HttpRequest, **kwargs: Any) -> HttpResponse:
        return HttpResponse(f"{Order.objects.count()} orders, {next(calls)}")

    return page


def in_another_thread(work: Callable[[], Any]) -> None:
    """Do it on a connection of its own, and wait for it."""

    def run() -> None:
        try:
            work()
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


# -- fresh ----------------------------------------------------------------------------------------


def test_a_page_is_kept_until_its_model_changes(alias: str) -> None:
    page = orders_page(alias)
    assert get(page) == get(page) == "0 orders, 1"
    Order.objects.create()
    assert get(page) == get(page) == "1 orders, 2"
    Article.objects.create(title="news")
    assert get(page) == "1 orders, 2"


def test_a_page_that_was_read_before_a_change_is_not_kept_after_it(alias: str) -> None:
    @cached_view(60, depends_on=["testapp.Order"], cache=alias)
    def page(request: HttpRequest) -> HttpResponse:
        found = Order.objects.count()
        if not found:
            in_another_thread(Order.objects.create)
        return HttpResponse(str(found))

    assert get(page) == "0", "it was true when it was read"
    assert get(page) == "1"


def test_what_a_transaction_has_written_is_shown_to_nobody_else_before_its_commit(
    alias: str,
) -> None:
    page = orders_page(alias)
    others: list[str] = []
    with transaction.atomic():
        Order.objects.create()
        assert get(page) == "1 orders, 1"
        in_another_thread(lambda: others.append(get(page)))
    assert others == ["0 orders, 2"]
    assert get(page) == get(page) == "1 orders, 3"


def test_a_page_that_was_rolled_back_is_never_kept(alias: str) -> None:
    page = orders_page(alias)
    with transaction.atomic():
        Order.objects.create()
        assert get(page) == "1 orders, 1"
        transaction.set_rollback(True)
    assert get(page) == get(page) == "0 orders, 2"


def test_tags_are_filled_with_the_arguments_of_the_url(alias: str) -> None:
    page = orders_page(alias, tags=["customer:{pk}"])
    assert get(page, "/1/", pk=1) == get(page, "/1/", pk=1) == "0 orders, 1"
    assert get(page, "/2/", pk=2) == "0 orders, 2"
    invalidate_tags("customer:1")
    assert get(page, "/1/", pk=1) == "0 orders, 3"
    assert get(page, "/2/", pk=2) == "0 orders, 2"


def test_a_page_depends_on_what_the_cached_values_in_it_depend_on(alias: str) -> None:
    calls = count(1)

    @cached(depends_on=[Order], cache="near")
    def orders() -> int:
        return Order.objects.count()

    @cached_view(60, cache=alias)
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"{orders()}, {next(calls)}")

    assert orders() == 0  # cached already when the page is made
    assert get(page) == get(page) == "0, 1"
    Order.objects.create()
    assert get(page) == get(page) == "1, 2"


def test_a_template_that_is_rendered_later_is_kept_with_what_it_was_made_of(alias: str) -> None:
    calls = count(1)
    template = engines["django"].from_string(
        "{% load pgnotify %}{{ call }}: "
        "{% cached 60 orders using='near' depends_on='testapp.Order' %}{{ orders }}{% endcached %}"
    )

    @cached_view(60, cache=alias)
    def page(request: HttpRequest) -> TemplateResponse:
        response = TemplateResponse(request, template, {"call": next(calls)})
        response.context_data = {"orders": Order.objects.count, **(response.context_data or {})}
        return response

    assert get(page) == get(page) == "1: 0"
    Order.objects.create()
    assert get(page) == get(page) == "2: 1"


def test_a_template_that_is_rendered_after_a_change_is_kept_only_if_it_shows_it(
    alias: str,
) -> None:
    template = engines["django"].from_string("{{ orders }}")

    @cached_view(60, depends_on=[Order], cache=alias)
    def page(request: HttpRequest) -> TemplateResponse:
        return TemplateResponse(request, template, {"orders": Order.objects.count()})

    first = page(requests.get("/"))
    Order.objects.create()
    assert first.render().content == b"0"
    assert get(page) == "1"


async def test_an_async_view_is_kept_and_its_stale_fill_is_not(alias: str) -> None:
    calls = count(1)
    may_return = asyncio.Event()
    has_read = asyncio.Event()

    @cached_view(60, depends_on=[Order], cache=alias)
    async def page(request: HttpRequest) -> HttpResponse:
        found = await Order.objects.acount()
        has_read.set()
        await may_return.wait()
        return HttpResponse(f"{found} orders, {next(calls)}")

    async def ask() -> bytes:
        response: HttpResponse = await page(requests.get("/"))
        return response.content

    slow = asyncio.create_task(ask())
    await has_read.wait()
    await Order.objects.acreate()
    may_return.set()
    assert await slow == b"0 orders, 1"
    assert await ask() == await ask() == b"1 orders, 2"


def read_too_late(page: Callable[..., Any], order: Order, writes: int) -> list[tuple[int, int]]:
    """Read a page in four threads while its row is counted up; what was read too late, and when.

    Of each such read: the number that was committed before it began, and the one it showed.
    """
    committed, done, behind = [0], threading.Event(), []
    asked = [0] * 4

    def read(reader: int) -> None:
        try:
            while not done.is_set():
                least = committed[0]
                seen = int(get(page))
                if seen < least:
                    behind.append((least, seen))
                asked[reader] += 1
        finally:
            connection.close()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(asked))]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, writes + 1):
            order.note = str(number)
            order.save()
            committed[0] = number
        before = list(asked)
        until(lambda: all(now > then + 1 for now, then in zip(asked, before, strict=True)))
    finally:
        done.set()
        for reader in readers:
            reader.join()
    return behind


def test_no_reader_is_shown_less_than_was_committed_before_it_asked(alias: str) -> None:
    order = Order.objects.create(note="0")

    @cached_view(60, depends_on=[Order], cache=alias)
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(Order.objects.get(pk=order.pk).note)

    assert read_too_late(page, order, 60) == []
    assert get(page) == "60"


def test_that_test_finds_out_a_page_that_is_kept_without_epochs() -> None:
    order = Order.objects.create(note="0")

    @cache_page(60, cache="memory")
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(Order.objects.get(pk=order.pk).note)

    assert get(page) == "0"
    assert read_too_late(page, order, 20) != []


# -- at once --------------------------------------------------------------------------------------


def waiting() -> int:
    """Threads and tasks that wait for a page or value that another one makes."""
    all_of_them: list[Any] = list(flights._flights.values())
    return sum(len(one._condition._waiters) + len(one._done_callbacks) for one in all_of_them)


def in_threads(*works: Callable[[], str]) -> tuple[list[threading.Thread], list[str]]:
    """Threads that each append to the list what their work returned, or what it raised."""
    came: list[str] = []

    def run(work: Callable[[], str]) -> None:
        try:
            came.append(work())
        except Exception as exc:  # noqa: BLE001 - for the test to see
            came.append(repr(exc))
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    return threads, came


def test_of_the_threads_that_miss_a_known_page_one_makes_it(alias: str) -> None:
    calls, go_on = count(1), threading.Event()

    @cached_view(60, depends_on=[Order], cache=alias)
    def page(request: HttpRequest) -> HttpResponse:
        call, found = next(calls), Order.objects.count()
        if call > 1:
            assert go_on.wait(60)
        return HttpResponse(f"{found} orders, {call}")

    assert get(page) == "0 orders, 1"
    Order.objects.create()
    threads, came = in_threads(*[lambda: get(page)] * 4)
    until(lambda: waiting() == 3)
    go_on.set()
    for thread in threads:
        thread.join()
    assert came == ["1 orders, 2"] * 4


def test_a_page_that_turns_out_to_be_of_one_visitor_is_given_to_nobody_who_waited() -> None:
    calls, go_on = count(1), threading.Event()

    @cached_view(60, depends_on=[Order], cache="near")
    def page(request: HttpRequest) -> HttpResponse:
        call = next(calls)
        response = HttpResponse(f"page {call}")
        if call > 1:
            response.set_cookie("visitor", str(call))
            assert go_on.wait(60)
        return response

    assert get(page) == "page 1"
    Order.objects.create()
    threads, came = in_threads(*[lambda: get(page)] * 3)
    until(lambda: waiting() == 2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(came) == ["page 2", "page 3", "page 4"]


def test_pages_wait_for_one_value_that_they_share() -> None:
    calls, go_on = count(1), threading.Event()

    @cached(key="orders", cache="near", depends_on=[Order])
    def orders() -> str:
        call, found = next(calls), Order.objects.count()
        if call > 1:
            assert go_on.wait(60)
        return f"{found}, {call}"

    @cached_view(60, cache="near")
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"{request.path} {orders()}")

    assert [get(page, "/a/"), get(page, "/b/")] == ["/a/ 0, 1", "/b/ 0, 1"]
    Order.objects.create()
    threads, came = in_threads(lambda: get(page, "/a/"), lambda: get(page, "/b/"))
    until(lambda: waiting() == 1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(came) == ["/a/ 1, 2", "/b/ 1, 2"]


async def test_of_the_tasks_that_miss_a_known_page_one_makes_it() -> None:
    calls = count(1)
    go_on = asyncio.Event()

    @cached_view(60, depends_on=[Order], cache="near")
    async def page(request: HttpRequest) -> HttpResponse:
        call = next(calls)
        if call > 1:
            await go_on.wait()
        return HttpResponse(str(call))

    async def ask() -> bytes:
        response: HttpResponse = await page(requests.get("/"))
        return response.content

    assert await ask() == b"1"
    await Order.objects.acreate()
    tasks = [asyncio.create_task(ask()) for _ in range(3)]
    await sync_to_async(until, thread_sensitive=False)(lambda: waiting() == 2)
    go_on.set()
    assert await asyncio.gather(*tasks) == [b"2"] * 3


# -- told apart -----------------------------------------------------------------------------------


def test_pages_of_other_urls_and_prefixes_are_other_pages(alias: str) -> None:
    page = orders_page(alias)
    assert get(page, "/?page=1") == get(page, "/?page=1") == "0 orders, 1"
    assert get(page, "/?page=2") == "0 orders, 2"
    assert get(orders_page(alias, key_prefix="b"), "/?page=1") == "0 orders, 1"
    assert get(page, "/?page=1") == "0 orders, 1"


def test_only_get_and_head_are_answered_from_the_cache(alias: str) -> None:
    page = orders_page(alias)
    assert get(page) == "0 orders, 1"
    assert get(page, method="HEAD") == "0 orders, 1"
    for number, method in enumerate(("POST", "PUT", "DELETE", "OPTIONS"), 2):
        assert get(page, method=method) == f"0 orders, {number}"
    assert get(page) == "0 orders, 1"


def test_pages_vary_on_the_headers_that_are_named(alias: str) -> None:
    page = orders_page(alias, vary=["X-Shop"])
    assert get(page, headers={"x-shop": "a"}) == get(page, headers={"x-shop": "a"}) == "0 orders, 1"
    assert get(page, headers={"x-shop": "b"}) == "0 orders, 2"
    assert get(page) == "0 orders, 3"
    assert page(requests.get("/")).headers["Vary"] == "X-Shop"


def test_headers_of_the_view_are_left_alone(alias: str) -> None:
    @cached_view(60, cache=alias)
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse("all", headers={"ETag": '"v1"', "Last-Modified": "long ago"})

    for _ in range(2):
        response = page(requests.get("/"))
        assert dict(response.items()) == {
            "Content-Type": "text/html; charset=utf-8",
            "ETag": '"v1"',
            "Last-Modified": "long ago",
        }
    site: Any = ConditionalGetMiddleware(page)
    assert site(requests.get("/", headers={"if-none-match": '"v1"'})).status_code == 304


def test_djangos_cache_middleware_does_not_keep_it_too(settings: Any) -> None:
    settings.CACHE_MIDDLEWARE_ALIAS = "memory"
    settings.CACHE_MIDDLEWARE_SECONDS = 600
    site: Any = UpdateCacheMiddleware(FetchFromCacheMiddleware(orders_page("near")))
    assert site(requests.get("/")).content == b"0 orders, 1"
    Order.objects.create()
    assert site(requests.get("/")).content == b"1 orders, 2"


# -- of one visitor -------------------------------------------------------------------------------


@cached_view(60, cache="near")
def form(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{next(numbers)} {get_token(request)}")


@cached_view(60, cache="near")
def greeting(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{next(numbers)} hello {request.session.get('name', 'stranger')}")


@cached_view(60, cache="near")
def visit(request: HttpRequest) -> HttpResponse:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return HttpResponse(f"visit {request.session['visits']}")


@cached_view(60, cache="near")
async def slowly(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(next(numbers)))


def introduce(request: HttpRequest) -> HttpResponse:
    request.session["name"] = request.GET["name"]
    return HttpResponse()


@method_decorator(cached_view(60, depends_on=[Order], cache="near"), name="dispatch")
class OrderView(View):
    def get(self, request: HttpRequest, pk: int) -> HttpResponse:
        return HttpResponse(f"order {pk}, {next(numbers)}")


urlpatterns = [
    path("form/", form),
    path("greeting/", greeting),
    path("visit/", visit),
    path("introduce/", introduce),
    path("slowly/", slowly),
    path("order/<int:pk>/", OrderView.as_view()),
]

SITE = override_settings(
    ROOT_URLCONF=__name__,
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
    ],
)


@SITE
def test_a_token_of_one_visitor_is_shown_to_no_other() -> None:
    ann, bob = Client(), Client()
    pages = {client.get("/form/").content for client in (ann, bob, ann)}
    assert len(pages) == 3


@SITE
def test_a_page_that_has_read_the_session_is_of_that_visitor() -> None:
    ann, bob = Client(), Client()
    ann.get("/introduce/?name=Ann")
    bob.get("/introduce/?name=Bob")
    first = ann.get("/greeting/")
    assert first.content.endswith(b"hello Ann")
    assert bob.get("/greeting/").content.endswith(b"hello Bob")
    assert Client().get("/greeting/").content.endswith(b"hello stranger")
    again = ann.get("/greeting/")
    assert again.content == first.content, "her own is kept"
    assert again.headers["Vary"] == first.headers["Vary"] == "Cookie"


@SITE
def test_a_page_that_has_changed_the_session_is_made_each_time() -> None:
    visitor = Client()
    seen = [visitor.get("/visit/").content for _ in range(3)]
    assert seen == [b"visit 1", b"visit 2", b"visit 3"]


@SITE
def test_a_class_based_view_is_kept_by_its_url() -> None:
    client = Client()
    first, other = client.get("/order/1/").content, client.get("/order/2/").content
    assert client.get("/order/1/").content == first
    assert first.startswith(b"order 1,")
    assert other.startswith(b"order 2,")
    Order.objects.create()
    assert client.get("/order/1/").content != first


@SITE
async def test_an_async_view_is_kept_under_an_async_server() -> None:
    client = AsyncClient()
    first = await client.get("/slowly/")
    assert (await client.get("/slowly/")).content == first.content
    await sync_to_async(caches["near"].clear)()
    assert (await client.get("/slowly/")).content != first.content


# -- what is wrong is said ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": "60"}, "timeout= takes a number of seconds"),
        ({"timeout": True}, "timeout= takes a number of seconds"),
        ({"timeout": 60, "tags": "orders"}, "tags= takes a list"),
        ({"timeout": 60, "tags": [""]}, "tags= takes a list of non-empty"),
        ({"timeout": 60, "vary": "Cookie"}, "vary= takes a list"),
        ({"timeout": 60, "depends_on": [Tag]}, "publishes no changes"),
        ({"timeout": 60, "depends_on": [Audited]}, "updated"),
        ({"timeout": 60, "depends_on": ["shop.Nothing"]}, "shop.Nothing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_argument_is_refused_where_it_is_written(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        cached_view(**options)


def test_a_tag_that_names_no_argument_of_the_view_is_said() -> None:
    page = orders_page("near", tags=["customer:{customer}"])
    with pytest.raises(InvalidArgument, match=r"\(pk\)"):
        get(page, pk=1)


def test_a_method_that_is_decorated_as_a_function_is_said() -> None:
    class Page(View):
        @cached_view(60)
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    with pytest.raises(TypeError, match="method_decorator"):
        Page.as_view()(requests.get("/"))
