"""Who is in a group, and stays in it: joins that wait, sweeps, expiry, and members elsewhere."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from django.db import connections

from django_pgnotify.exceptions import ListenError
from django_pgnotify.layers import PostgresChannelLayer
from django_pgnotify.layers import elsewhere as elsewhere_module
from tests.integration.test_layer import (
    DEADLINE,
    fence,
    lines_of,
    member,
    passed,
    port_of,
    stop_layers,
    take,
)
from tests.proxy import TCPProxy

# Rows outlive a layer; the flush after a transactional test takes them away.
pytestmark = pytest.mark.django_db(transaction=True)

MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix of this test: each is another process to the others."""
    prefix = f"members-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


@pytest.fixture
def proxied(
    proxy: TCPProxy, monkeypatch: pytest.MonkeyPatch, settings: Any, django_db_setup: None
) -> str:
    """An alias of the test database that goes through the proxy."""
    entry = {
        **connections["default"].settings_dict,
        "HOST": proxy.host,
        "PORT": str(proxy.port),
    }
    monkeypatch.setitem(connections.settings, "proxied", entry)
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
    return "proxied"


async def begun(coroutine: Any, name: str) -> asyncio.Task[Any]:
    """A task, returned once it waits for something."""
    task = asyncio.create_task(coroutine, name=name)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def sweep(layer: PostgresChannelLayer) -> None:
    """Have it forget what has expired, and leave the shards that nobody needs."""
    port_of(layer).local.sweep_due = 0.0
    await layer.new_channel()


class SlowFeed:
    """What hears for the members of a process, once a test says so."""

    def __init__(self) -> None:
        self.heard = asyncio.Event()

    async def listening(self) -> None:
        await self.heard.wait()

    def close(self) -> None:
        """It has nothing open."""


# -- sweeps -----------------------------------------------------------------------------------


async def test_a_sweep_while_a_shard_is_being_joined_does_not_leave_it(
    make_layer: MakeLayer,
) -> None:
    layer, elsewhere = make_layer(), make_layer()
    channel = await layer.new_channel()
    joining = await begun(layer.group_add("room", channel), "joining")
    await sweep(layer)
    async with asyncio.timeout(DEADLINE):
        await joining
    await elsewhere.group_send("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}


async def test_a_sweep_before_the_feed_is_heard_does_not_leave_the_shard(
    make_layer: MakeLayer,
) -> None:
    layer, elsewhere = make_layer(), make_layer()
    feed = layer.feed = SlowFeed()
    channel = await layer.new_channel()
    joining = await begun(layer.group_add("room", channel), "joining")
    port = port_of(layer)
    async with asyncio.timeout(DEADLINE):
        await port.hub.until_heard(frozenset([port.shard("room")]))
    await sweep(layer)
    feed.heard.set()
    async with asyncio.timeout(DEADLINE):
        await joining
    await elsewhere.group_send("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}


@pytest.mark.parametrize("name", ["room", "work"])
async def test_whoever_is_heard_first_after_a_reconnect_does_not_sweep_away_what_waits_behind(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy, name: str
) -> None:
    layer, elsewhere = make_layer(using=proxied), make_layer()
    channel = await layer.new_channel()
    await elsewhere.group_send("nobody", {"type": "x"})  # connected, and so quick from here on
    with lines_of("django_pgnotify.listening") as lines:
        proxy.close()
        await lines.wait_for("not established")
    first = await begun(layer.new_channel(), "new channel")
    if name == "room":
        second = await begun(layer.group_add(name, channel), "joining")
    else:
        second = await begun(layer.receive(name), "receiving")
    port = port_of(layer)
    port.local.sweep_due = 0.0  # nothing has been heard for longer than messages keep
    await asyncio.to_thread(proxy.open)
    async with asyncio.timeout(DEADLINE):
        await first
        if name == "room":
            await second
            await elsewhere.group_send(name, {"type": "x"})
            assert await layer.receive(channel) == {"type": "x"}
        else:
            while name not in port.shared:
                assert not second.done()
                await asyncio.sleep(0)
            assert port.shard(name) in port.hub.heard
            await elsewhere.send(name, {"type": "x"})
            assert await second == {"type": "x"}


# -- members elsewhere ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _patience(settings: Any) -> None:
    """Another process may take its time to connect again, and to answer."""
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 3 * DEADLINE


@pytest.fixture
async def cut_off(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy
) -> tuple[PostgresChannelLayer, str]:
    """A layer that is cut off until the test opens the proxy, and a channel of it in the lobby.

    It stands for another process.
    """
    layer = make_layer(using=proxied)
    channel = await member(layer, "lobby")
    with lines_of("django_pgnotify.listening") as lines:
        proxy.close()
        await lines.wait_for("not established")
    return layer, channel


async def asked(layer: PostgresChannelLayer, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that asks another process, returned once the server has told whoever listens."""
    task = await begun(call, "asking")
    await passed(layer)
    return task


async def answered(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(4 * DEADLINE):
        await task


async def test_a_channel_whose_process_was_cut_off_when_it_was_asked_is_added(
    make_layer: MakeLayer, cut_off: tuple[PostgresChannelLayer, str], proxy: TCPProxy
) -> None:
    ours, (theirs, channel) = make_layer(), cut_off
    adding = await asked(ours, ours.group_add("room", channel))
    await asyncio.to_thread(proxy.open)
    await answered(adding)
    await ours.group_send("room", {"type": "x"})
    assert await take(theirs, channel) == {"type": "x"}


async def test_a_channel_whose_process_was_cut_off_when_it_was_asked_is_discarded(
    make_layer: MakeLayer, cut_off: tuple[PostgresChannelLayer, str], proxy: TCPProxy
) -> None:
    ours, (theirs, channel) = make_layer(), cut_off
    discarding = await asked(ours, ours.group_discard("lobby", channel))
    await asyncio.to_thread(proxy.open)
    await answered(discarding)
    await ours.group_send("lobby", {"type": "x"})
    await fence(theirs, channel, ours)


@pytest.mark.parametrize("last", ["add", "discard"])
async def test_what_is_asked_last_of_a_process_that_is_cut_off_counts(
    make_layer: MakeLayer, cut_off: tuple[PostgresChannelLayer, str], proxy: TCPProxy, last: str
) -> None:
    ours, (theirs, channel) = make_layer(), cut_off
    calls = [ours.group_discard, ours.group_add]
    if last == "discard":
        calls.reverse()
    first, second = [await asked(ours, call("room", channel)) for call in calls]
    await answered(first)  # or it would be asked again behind the second
    assert not second.done()
    await asyncio.to_thread(proxy.open)
    await answered(second)
    await ours.group_send("room", {"type": "x"})
    if last == "add":
        assert await take(theirs, channel) == {"type": "x"}
    await fence(theirs, channel, ours)


async def test_a_request_that_is_repeated_is_one_join_and_a_discard_ends_it(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere_module, "ASK_AGAIN", 0.02)
    ours, theirs = make_layer(), make_layer()
    feed = theirs.feed = SlowFeed()
    channel = await theirs.new_channel()
    joining = port_of(theirs).elsewhere._joining
    adding = await begun(ours.group_add("room", channel), "adding")
    async with asyncio.timeout(DEADLINE):
        while theirs.stats["received"] < 3:
            assert not adding.done()
            await asyncio.sleep(0.01)
    [requests] = joining.values()
    assert len(requests) == 1
    await ours.group_discard("room", channel)
    await answered(adding)
    feed.heard.set()
    await ours.group_send("room", {"type": "x"})
    await fence(theirs, channel, ours)
    assert not joining


class FailingFeed(SlowFeed):
    """What hears for the members of a process, the second time it is asked."""

    async def listening(self) -> None:
        if not self.heard.is_set():
            self.heard.set()
            raise ListenError("not yet")


async def test_a_join_that_fails_in_the_other_process_is_tried_again_and_leaves_nothing(
    make_layer: MakeLayer,
) -> None:
    ours, theirs = make_layer(), make_layer()
    theirs.feed = FailingFeed()
    channel = await theirs.new_channel()
    await ours.group_add("room", channel)
    await ours.group_send("room", {"type": "x"})
    assert await take(theirs, channel) == {"type": "x"}
    assert not port_of(theirs).elsewhere._joining
    assert not port_of(ours).elsewhere._asking
    assert not port_of(ours).elsewhere._answers
