"""Who is in a group, and stays in it: joins that wait, sweeps, expiry, and members elsewhere."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connections

from django_pgnotify.layers import PostgresChannelLayer
from tests.integration.test_layer import (
    DEADLINE,
    lines_of,
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
