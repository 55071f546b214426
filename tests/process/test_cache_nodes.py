"""Caches that processes share: stored by one, emptied by the ``pglisten`` of another."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from django.core.cache import caches
from django.core.management import call_command
from django.db import connection, transaction

from django_pgnotify import publish
from example_project.demo_check import Browser
from tests.process.shop import Shop, Web
from tests.processes import Process, database_environ, python
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

# A pglisten with the caches and the declarations of the test; says what it invalidated.
LISTENER = """
import json, sys
from django.conf import settings
settings.CACHES = json.loads(sys.argv[1])
settings.DATABASE_ROUTERS = []
import django
django.setup()
from django.core.management import call_command
from django_pgnotify import invalidates
from django_pgnotify.signals import cache_invalidated
from tests.testapp.models import Order

for alias in settings.CACHES:
    invalidates(Order, keys=["order:{pk}", "orders"], cache=alias)
    invalidates("rooms", keys=["room:{data[name]}"], cache=alias, version=2)

def say(event, cache, keys, **kwargs):
    what = event.data if event.model is None else event.pk
    # One string: what print() puts together, another thread may get in between.
    print(f"invalidated {cache} {event.action} {what}", flush=True)

cache_invalidated.connect(say)
call_command("pglisten")
"""


@pytest.fixture
def cache_aliases(settings: Any, tmp_path: Path) -> Iterator[dict[str, dict[str, str]]]:
    table = f"cache_{secrets.token_hex(4)}"
    settings.DATABASE_ROUTERS = []  # that of the tests knows real models only
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
            "LOCATION": str(tmp_path / "cache"),
        },
        "database": {
            "BACKEND": "django.core.cache.backends.db.DatabaseCache",
            "LOCATION": table,
        },
    }
    call_command("createcachetable", verbosity=0)
    yield settings.CACHES
    with connection.cursor() as cursor:
        cursor.execute(f"drop table {table}")


@contextmanager
def listener(cache_aliases: dict[str, Any]) -> Iterator[Process]:
    """A listener process of another node; it ends by SIGTERM, as it should."""
    with python("-c", LISTENER, json.dumps(cache_aliases), env=database_environ()) as process:
        process.wait_for_line("^pglisten: ready")
        yield process
        assert process.terminate() == 0, process.report()


def fill(*keys: str, version: int | None = None) -> None:
    for alias in ("default", "database"):
        for key in keys:
            caches[alias].set(key, "stored here", None, version=version)


def left(*keys: str, version: int | None = None) -> dict[str, list[str]]:
    """Which of the keys are still there, by alias."""
    return {
        alias: [key for key in keys if caches[alias].get(key, version=version) is not None]
        for alias in ("default", "database")
    }


def test_what_one_process_stored_another_deletes(cache_aliases: dict[str, Any]) -> None:
    with listener(cache_aliases) as process:
        order, other = Order.objects.create(), Order.objects.create()
        for alias in cache_aliases:
            process.wait_for_line(f"invalidated {alias} created {other.pk}")
        keys = [f"order:{order.pk}", "orders", f"order:{other.pk}", "customers"]
        fill(*keys)
        order.save()
        for alias in cache_aliases:
            process.wait_for_line(f"invalidated {alias} updated {order.pk}")
        assert left(*keys) == {"default": keys[2:], "database": keys[2:]}


def test_keys_with_values_of_the_event_and_a_version_are_deleted(
    cache_aliases: dict[str, Any],
) -> None:
    with listener(cache_aliases) as process:
        keys = ["room:O'Brien", "room:größe/XL", "room:lobby"]
        fill(*keys)
        fill(*keys, version=2)
        with transaction.atomic():
            for name in ("O'Brien", "größe/XL"):
                publish("rooms", {"name": name})
        for alias in cache_aliases:
            process.wait_for_line(f"invalidated {alias} published", count=2)
        assert left(*keys, version=2) == {"default": keys[2:], "database": keys[2:]}
        assert left(*keys) == {"default": keys, "database": keys}


def test_every_listener_invalidates_not_the_leader_alone(cache_aliases: dict[str, Any]) -> None:
    with listener(cache_aliases) as one, listener(cache_aliases) as two:
        publish("rooms", {"name": "lobby"})
        for process in (one, two):
            for alias in cache_aliases:
                process.wait_for_line(f"invalidated {alias} published")


def test_a_listener_that_lost_its_connection_clears_the_aliases(
    cache_aliases: dict[str, Any],
) -> None:
    with listener(cache_aliases) as process:
        keys = ["order:1", "orders", "not:ours"]
        fill(*keys)
        with connection.cursor() as cursor:
            cursor.execute(
                "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity"
                " where datname = current_database() and application_name = 'pglisten'"
            )
            assert cursor.fetchone() == (1,)
        for alias in cache_aliases:
            process.wait_for_line(f"invalidated {alias} gap")
            process.wait_for_line(f"Cache '{alias}': cleared whole")
        assert left(*keys) == {"default": [], "database": []}
        # And goes on as before.
        fill(*keys)
        order = Order.objects.create()
        for alias in cache_aliases:
            process.wait_for_line(f"invalidated {alias} created {order.pk}")
        assert left(*keys)["default"] == ["order:1", "not:ours"]


# -- the example's summary -----------------------------------------------------------------------


def summary(web: Web) -> dict[str, Any]:
    with urlopen(f"{web.url}/summary.json", timeout=60) as answer:
        figures: dict[str, Any] = json.load(answer)
    return figures


async def fresh(web: Web, wanted: dict[str, int]) -> dict[str, Any]:
    """The summary of a web process, once it shows these counts."""
    async with asyncio.timeout(15):
        while True:
            figures = await asyncio.to_thread(summary, web)
            if wanted.items() <= figures["by_status"].items():
                return figures


async def test_the_cached_summary_of_one_web_process_is_fresh_after_a_change_in_the_other(
    shop: Shop,
) -> None:
    first, second = shop.webs
    browser = Browser(first.url)
    await browser.log_in()
    await asyncio.to_thread(summary, first)  # stored, by whoever is first
    before = await asyncio.to_thread(summary, second)
    assert before["from_cache"], "the two share a cache"
    assert (await asyncio.to_thread(summary, first))["computed_by"] == before["computed_by"]

    placed = await browser.post_json("/orders/place/")
    counts = {"new": before["by_status"]["new"] + 1}
    after = await fresh(second, counts)
    assert after["computed_at"] > before["computed_at"]

    await browser.post_json(f"/orders/{placed['pk']}/advance/")
    counts = {"new": before["by_status"]["new"], "paid": before["by_status"]["paid"] + 1}
    await fresh(second, counts)
    await fresh(first, counts)


async def test_a_change_through_the_admin_of_one_web_process_refreshes_the_other(
    shop: Shop,
) -> None:
    first, second = shop.webs
    browser = Browser(first.url)
    await browser.log_in()
    pk = (await browser.post_json("/orders/place/"))["pk"]
    before = await asyncio.to_thread(summary, second)
    await browser.get("/admin/shop/order/")
    await browser.post("/admin/shop/order/", action="advance", _selected_action=str(pk))
    await fresh(second, {"paid": before["by_status"]["paid"] + 1})
