"""``event_stream()`` as daphne and uvicorn serve it: headers, ends, restarts, slow browsers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from django.contrib.auth.models import User
from django.test import AsyncClient
from websockets.asyncio.client import connect

from django_pgnotify import apublish, apublish_many
from tests.integration.durable import LEDGER
from tests.integration.recording import aterminate, client
from tests.integration.streaming import DEADLINE, Browser, is_id
from tests.process.live.site import Site, serving
from tests.testapp.models import Order

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=["daphne", "uvicorn"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    pytest.importorskip(request.param)
    with serving(request.param) as running:
        yield running


async def nothing_held(site: Site) -> None:
    """Wait until no stream is left in the server."""
    async with asyncio.timeout(DEADLINE):
        while (held := await site.status())["channels"] or held["tasks"]:
            pass


async def test_events_come_through_sync_middleware_as_they_happen(site: Site) -> None:
    async with site.answer("/jobs/") as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert "no-store" in answer.headers["cache-control"]
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-sync"] == "yes"
    async with site.watching("/jobs/") as browser:
        for number in range(20):
            await apublish("jobs", number)
            assert await browser.data(1) == [number]
        comments = browser.comments
        while browser.comments == comments:
            assert await browser.chunk(), "signs of life come though nothing happens"


async def test_nothing_is_kept_back_to_be_compressed(site: Site) -> None:
    assert (await site.get("/", Accept_Encoding="gzip")).headers["content-encoding"] == "gzip"
    async with site.answer("/jobs/", Accept_Encoding="gzip") as answer:
        browser = Browser(answer.body)
        while browser.retry is None:
            assert await browser.chunk()
        await apublish("jobs", 1)
        assert await browser.data(1) == [1]


async def test_many_streams_share_one_listening_connection_and_leave_nothing_behind(
    site: Site,
) -> None:
    count = 40
    async with AsyncExitStack() as stack, client() as other:
        paths = ["/jobs/", "/ledger/", "/silent/"]
        browsers = [
            await stack.enter_async_context(site.watching(paths[number % 3]))
            for number in range(count)
        ]
        listening = await other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'pglisten'"
        )
        assert await listening.fetchone() == (1,)
        await apublish("jobs", "x")
        await apublish(LEDGER, "x")
        for number, browser in enumerate(browsers):
            if number % 3 < 2:
                assert await browser.data(1) == ["x"]
        assert (await site.status())["tasks"] == sorted(
            ["pgnotify-streams"] * 3 + ["pgnotify-stream-tail"]
        )
    # Also those to which nothing was sent since they went.
    await nothing_held(site)


async def test_a_stream_of_a_durable_topic_outlives_its_server(site: Site) -> None:
    async with site.watching("/ledger/") as browser:
        await apublish(LEDGER, "before")
        assert await browser.data(1) == ["before"]
        await asyncio.to_thread(site.stop)
        assert await browser.rest() == []
    await apublish_many(LEDGER, range(700))
    await asyncio.to_thread(site.start)
    async with site.watching("/ledger/", browser.last_id) as again:
        assert await again.data(700) == list(range(700))
        await apublish(LEDGER, "after")
        assert await again.data(1) == ["after"]


async def test_a_live_stream_after_a_restart_begins_with_a_gap(site: Site) -> None:
    async with site.watching("/jobs/") as browser:
        pass
    await site.restart()
    async with site.watching("/jobs/", browser.last_id) as again:
        [gap] = await again.blocks(1)
        assert (gap.event, gap.data["topics"]) == ("gap", ["jobs"])
        assert is_id(again.last_id)


async def test_streams_hear_of_the_loss_of_the_listening_connection_and_go_on(site: Site) -> None:
    async with site.watching("/jobs/") as live, site.watching("/ledger/") as durable:
        async with client() as other:
            rows = await other.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'pglisten'"
            )
            [(pid,)] = await rows.fetchall()
            await aterminate(other, pid)
        await apublish(LEDGER, 1)
        assert await durable.data(1) == [1]
        [gap] = await live.blocks(1)
        assert gap.event == "gap"
        await apublish("jobs", 2)
        assert await live.data(1) == [2]


async def test_permissions_ask_the_database_and_logins_are_required(site: Site) -> None:
    await Order.objects.acreate(note="closed room.2")
    assert (await site.get("/rooms/?group=room.2")).status == 403
    assert (await site.get("/rooms/?group=other")).status == 403
    assert (await site.get("/rooms/")).status == 400
    assert (await site.get("/mine/")).status == 302
    async with site.watching("/rooms/?group=room.1") as browser:
        await apublish_many("rooms", [{"room": 2}, {"room": 1}])
        assert await browser.data(1) == [{"room": 1}]


async def logged_in(name: str) -> str:
    """The cookie of somebody who has logged in."""
    browser = AsyncClient()
    await browser.aforce_login(await User.objects.acreate_user(name))
    return f"sessionid={browser.cookies['sessionid'].value}"


async def test_a_session_says_who_asks_in_streams_and_websockets_alike(site: Site) -> None:
    ann, bob = await logged_in("ann"), await logged_in("bob")
    assert (await site.get("/mail/?group=user.ann")).status == 403
    assert (await site.get("/mail/?group=user.ann", Cookie=bob)).status == 403
    address = f"ws://127.0.0.1:{site.port}/ws/mail/"
    async with (
        site.watching("/mail/?group=user.ann", Cookie=ann) as browser,
        connect(address, additional_headers={"Cookie": ann}) as socket,
        asyncio.timeout(DEADLINE),
    ):
        await apublish_many("mail", [{"to": "bob"}, {"to": "ann"}])
        assert await browser.data(1) == [{"to": "ann"}]
        await socket.send(json.dumps({"subscribe": ["user.bob", "user.ann"]}))
        refused, joined = json.loads(await socket.recv()), json.loads(await socket.recv())
        assert refused["refused"] == ["user.bob"]
        assert joined == {"subscribed": ["user.ann"]}


async def until_dropped(site: Site, topic: object) -> int:
    """Publish until the server no longer gets rid of it; how many events it took."""
    before = (await site.status())["stats"].get("dropped", 0)
    for number in range(5000):
        await apublish(topic, [number, "x" * 20_000])  # type: ignore[arg-type]
        if number % 10 == 9 and (await site.status())["stats"].get("dropped", 0) > before:
            return number + 1
    raise AssertionError("a browser that does not read is kept 100 MB for")


@pytest.fixture
def backpressure() -> Iterator[Site]:
    """uvicorn: daphne takes whatever it is given, and keeps it in its own memory."""
    pytest.importorskip("uvicorn")
    with serving("uvicorn") as running:
        yield running


async def test_a_browser_that_does_not_read_gets_a_gap_and_the_end(backpressure: Site) -> None:
    async with backpressure.watching("/slow/") as slow:
        count = await until_dropped(backpressure, "slow")
        *events, gap = await slow.rest()
    assert [block.data["data"][0] for block in events] == list(range(len(events)))
    assert len(events) < count
    assert gap.event == "gap"
    assert "keep up" in gap.data["cause"]
    await nothing_held(backpressure)


async def test_a_browser_of_a_durable_topic_that_does_not_read_misses_nothing(
    backpressure: Site,
) -> None:
    async with backpressure.watching("/slow-ledger/") as slow:
        count = await until_dropped(backpressure, LEDGER)
        assert [number for number, _ in await slow.data(count)] == list(range(count))
        await apublish(LEDGER, "after")
        assert await slow.data(1) == ["after"]
