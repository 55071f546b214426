"""gunicorn with four preloaded workers and one ``pglisten``: near caches that agree."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connection

from example_project.demo_check import Browser
from example_project.embedded import HOST, free_port
from tests.process.cached_site import WORKERS
from tests.processes import Process, database_environ
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)

DEADLINE = 40.0
SETTINGS = "tests.process.cached_site.settings"


class Site:
    """Args:
    folder: of the node: its epoch table is there.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._environ = {
            **database_environ(),
            "DJANGO_SETTINGS_MODULE": SETTINGS,
            "SITE_FOLDER": str(folder),
        }
        self._rounds = itertools.count()
        self.url = f"http://{HOST}:{free_port()}"
        self.listener = self.run("-m", "django", "pglisten")
        self.listener.wait_for_line("^pglisten: ready")
        self.web = self.run(
            *("-m", "gunicorn", "--preload", "--workers", str(WORKERS)),
            *("--bind", self.url.removeprefix("http://"), "--worker-tmp-dir", str(folder)),
            "tests.process.cached_site.wsgi",
        )
        self.web.wait_for_line("Booting worker", count=WORKERS)

    def run(self, *arguments: str, **environ: str) -> Process:
        process = Process([sys.executable, *arguments], env={**self._environ, **environ})
        return self._stack.enter_context(process)

    async def everybody(self) -> list[dict[str, Any]]:
        """What each of the workers answers, all of them at the same time."""
        name = f"round-{next(self._rounds)}"

        def ask() -> dict[str, Any]:
            with urlopen(f"{self.url}/together/{name}/", timeout=60) as answer:
                page: dict[str, Any] = json.load(answer)
            return page

        answers = await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(WORKERS)))
        assert len({answer["pid"] for answer in answers}) == WORKERS
        return answers

    async def until_everybody_shows(self, orders: dict[str, str]) -> list[dict[str, Any]]:
        """Ask again and again; a worker that has shown them may never show older ones."""
        shown: set[int] = set()
        async with asyncio.timeout(DEADLINE):
            while True:
                answers = await self.everybody()
                fresh = {answer["pid"] for answer in answers if answer["orders"] == orders}
                assert shown <= fresh, f"gone back: {shown - fresh}"
                shown = fresh
                if len(fresh) == WORKERS:
                    return answers


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    pytest.importorskip("gunicorn")
    with ExitStack() as stack:
        yield await asyncio.to_thread(Site, tmp_path, stack)


async def statuses() -> dict[str, str]:
    return {str(pk): status async for pk, status in Order.objects.values_list("pk", "status")}


async def settled(site: Site) -> dict[str, str]:
    """Every worker has the page of now in its own near cache; the orders on it."""
    now = await statuses()
    await site.until_everybody_shows(now)
    before = await site.everybody()
    again = await site.everybody()
    looks = {answer["pid"]: answer["look"] for answer in before}
    assert {answer["pid"]: answer["look"] for answer in again} == looks, "not from their caches"
    return now


async def test_a_change_in_the_admin_is_seen_by_all_four_workers_at_once(site: Site) -> None:
    await sync_to_async(User.objects.create_superuser)("admin", password="admin")
    order = await Order.objects.acreate(status="new")
    browser = Browser(site.url)
    await browser.get("/admin/login/")
    await browser.post("/admin/login/", username="admin", password="admin", next="/admin/")
    for status in ("paid", "packed", "shipped"):
        before = await settled(site)
        page = f"/admin/testapp/order/{order.pk}/change/"
        await browser.get(page)
        await browser.post(
            page,
            status=status,
            total="1.00",
            note="",
            placed_at_0="2026-01-01",
            placed_at_1="12:00:00",
        )
        # Not a moment later: the response to the change was all we waited for.
        for answer in await site.everybody():
            assert answer["orders"] == {**before, str(order.pk): status}


async def test_a_change_on_another_node_reaches_all_four_workers(
    site: Site, tmp_path: Path
) -> None:
    order = await Order.objects.acreate(status="new")
    await settled(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        f"from tests.testapp.models import Order; order = Order.objects.get(pk={order.pk});"
        " order.status = 'paid'; order.save()"
    )
    shell = ("-m", "django", "shell", "--no-imports", "-c", code)
    process = site.run(*shell, SITE_FOLDER=str(elsewhere))
    assert await asyncio.to_thread(process.wait) == 0, process.report()
    await site.until_everybody_shows({str(order.pk): "paid"})
    await settled(site)


async def test_without_a_listener_the_workers_stop_believing_their_caches(site: Site) -> None:
    order = await Order.objects.acreate(status="new")
    await settled(site)
    await asyncio.to_thread(site.listener.kill)

    def change_unheard() -> None:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE testapp_order SET status = 'lost' WHERE id = %s", [order.pk])

    # A change that nobody is told of: only the age of the last heartbeat can help.
    await sync_to_async(change_unheard)()
    await site.until_everybody_shows({str(order.pk): "lost"})
