"""Who is told that messages may have been missed, and in which place; and encryption's refusals."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from django.db import connections

from django_pgnotify.exceptions import InvalidArgument
from django_pgnotify.layers import PostgresChannelLayer, codec
from django_pgnotify.layers import local as local_module
from django_pgnotify.layers import mailbox as mailbox_module
from django_pgnotify.layers import port as port_module
from django_pgnotify.layers.codec import Codec
from tests.integration.test_layer import (
    DEADLINE,
    Message,
    established_again,
    fence,
    frame,
    heard_until,
    listening_pid,
    member,
    port_of,
    stop_layers,
    take,
    terminate,
    wire_of,
)
from tests.proxy import TCPProxy
from tests.settings import database_url

pytestmark = pytest.mark.django_db(transaction=True)

MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix no other test uses."""
    prefix = f"gaps-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


@pytest.fixture
async def raw(django_db_setup: None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection that knows nothing of layers."""
    url = database_url(connections["default"].settings_dict)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def proxied(
    proxy: TCPProxy, monkeypatch: pytest.MonkeyPatch, settings: Any, django_db_setup: None
) -> str:
    """An alias of the test database that goes through the proxy."""
    entry = {**connections["default"].settings_dict, "HOST": proxy.host, "PORT": str(proxy.port)}
    monkeypatch.setitem(connections.settings, "proxied", entry)
    return "proxied"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of expiry; ``now`` is its time."""
    clock = SimpleNamespace(now=1000.0)
    stand_in = SimpleNamespace(monotonic=lambda: clock.now)
    for module in (mailbox_module, local_module, port_module):
        monkeypatch.setattr(module, "time", stand_in)
    return clock


def is_gap(message: Message, cause: str = "") -> bool:
    if message["type"] != "pgnotify.gap":
        return False
    assert set(message) == {"type", "since", "until", "cause"}
    assert cause in message["cause"]
    until = datetime.fromisoformat(message["until"])
    assert message["since"] is None or datetime.fromisoformat(message["since"]) <= until
    return True


async def lose_connection(layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]) -> None:
    """Return once the layer listens again."""
    with established_again() as again:
        await terminate(raw, listening_pid(layer))
        await again()


async def test_members_of_groups_are_told_and_nobody_else(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(gap_messages=True)
    members = [await member(layer, "room"), await member(layer, "room", "lobby")]
    alone = await layer.new_channel()
    left = await member(layer, "room")
    await layer.group_discard("room", left)
    await layer.send(alone, {"type": "x"})
    await lose_connection(layer, raw)
    for channel in members:
        message = await take(layer, channel)
        assert is_gap(message)
        assert message["since"] is not None
        await fence(layer, channel)
    assert await take(layer, alone) == {"type": "x"}
    await fence(layer, alone)
    await fence(layer, left)


async def test_a_gap_stands_between_what_came_before_and_what_comes_after(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(gap_messages=True)
    channel = await member(layer, "room")
    await layer.group_send("room", {"type": "before"})
    await lose_connection(layer, raw)
    await layer.group_send("room", {"type": "after"})
    assert await take(layer, channel) == {"type": "before"}
    assert is_gap(await take(layer, channel))
    assert await take(layer, channel) == {"type": "after"}


async def test_by_default_nobody_is_told(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    """A consumer without a handler for it would end."""
    layer = make_layer(capacity=1)
    channel = await member(layer, "room")
    await lose_connection(layer, raw)
    for number in range(3):
        await layer.group_send("room", {"type": "x", "n": number})
    assert await take(layer, channel) == {"type": "x", "n": 0}
    await fence(layer, channel)
    assert layer.stats["gaps"] == 1
    assert layer.stats["dropped"] == 2


async def test_patterns_choose_the_groups_whose_members_are_told(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(gap_messages=["board.*", "orders"])
    told = [await member(layer, "board.7"), await member(layer, "chat", "orders")]
    others = [await member(layer, "chat"), await member(layer, "orders.7")]
    await lose_connection(layer, raw)
    for channel in told:
        assert is_gap(await take(layer, channel))
        await fence(layer, channel)
    for channel in others:
        await fence(layer, channel)


async def test_a_full_mailbox_does_not_keep_a_gap_out(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(gap_messages=True, capacity=2)
    channel = await member(layer, "room")
    for number in range(2):
        await layer.group_send("room", {"type": "x", "n": number})
    await lose_connection(layer, raw)
    assert [(await take(layer, channel))["n"] for _ in range(2)] == [0, 1]
    assert is_gap(await take(layer, channel))


async def test_a_slow_consumer_is_told_once_where_it_missed_messages(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(gap_messages=True, capacity=3)
    slow, quick = await member(layer, "room"), await member(layer, "room")
    for number in range(10):
        await layer.group_send("room", {"type": "x", "n": number})
        assert (await take(layer, quick))["n"] == number
    assert layer.stats["dropped"] == 7
    for _ in range(2):
        got = [await take(layer, slow) for _ in range(3)]
        assert [message["n"] for message in got] == [got[0]["n"] + n for n in range(3)]
        assert is_gap(await take(layer, slow), "capacity")
        for number in range(4):
            await layer.group_send("room", {"type": "x", "n": 100 + number})
            await take(layer, quick)
    assert len(port_of(layer).local.boxes[slow].messages) == 4, (
        "three, and what says that one is missing"
    )


async def test_what_expired_unread_is_a_gap_too(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    layer = make_layer(gap_messages=True, expiry=5)
    slow = await member(layer, "room")
    await layer.group_send("room", {"type": "old"})
    clock.now += 3
    await layer.group_send("room", {"type": "new"})
    clock.now += 2
    assert is_gap(await take(layer, slow), "expiry")
    assert await take(layer, slow) == {"type": "new"}
    # And where it is swept away before the consumer comes.
    await layer.group_send("room", {"type": "old"})
    clock.now += 6
    await layer.new_channel()
    assert is_gap(await take(layer, slow), "expiry")
    assert layer.stats["expired"] == 2


async def test_a_stored_message_that_is_gone_is_a_gap_to_the_members_of_its_group(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(gap_messages=["room"])
    channel, other = await member(layer, "room"), await member(layer, "lobby")
    for group in ("room", "lobby"):
        payload = frame(codec.GROUP, group, 10**9)
        await raw.execute("select pg_notify(%s, %s)", [wire_of(layer, group), payload])
        await layer.group_send(group, {"type": "after"})
    assert is_gap(await take(layer, channel), "expiry")
    for one in (channel, other):
        assert await take(layer, one) == {"type": "after"}


@pytest.fixture
async def parted(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy, settings: Any
) -> tuple[PostgresChannelLayer, str]:
    """A layer whose rows alone are behind the proxy, connected; and a member of its "room"."""
    settings.PGNOTIFY_DATABASE, settings.PGNOTIFY_LISTEN_DATABASE = proxied, "default"
    settings.PGNOTIFY_CONNECT_TIMEOUT = 3 * DEADLINE
    layer = make_layer(gap_messages=True)
    channel = await member(layer, "room")
    await make_layer(using="default").group_send("room", LARGE)
    assert await take(layer, channel) == LARGE
    return layer, channel


LARGE = {"type": "large", "body": "x" * 20_000}


async def lose_answer(
    layer: PostgresChannelLayer, proxy: TCPProxy, sender: PostgresChannelLayer
) -> None:
    """Return once the layer has asked for a stored message, and will hear nothing."""
    proxy.swallow()
    await sender.group_send("room", LARGE)
    rows = port_of(layer).hub.rows.connection
    assert rows is not None
    async with asyncio.timeout(DEADLINE):
        while rows.free:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_stored_message_is_fetched_again_where_the_connection_broke_meanwhile(
    parted: tuple[PostgresChannelLayer, str], make_layer: MakeLayer, proxy: TCPProxy
) -> None:
    layer, channel = parted
    await lose_answer(layer, proxy, make_layer(using="default"))
    await asyncio.to_thread(proxy.end_swallowing, reset=True)
    assert await take(layer, channel) == LARGE
    assert layer.stats["broken"] == 0


async def test_a_stored_message_that_cannot_be_fetched_is_a_gap_in_its_place(
    parted: tuple[PostgresChannelLayer, str], make_layer: MakeLayer, proxy: TCPProxy
) -> None:
    layer, channel = parted
    sender = make_layer(using="default")
    await sender.group_send("room", {"type": "before"})
    await lose_answer(layer, proxy, sender)
    await sender.group_send("room", {"type": "after"})
    await asyncio.to_thread(proxy.close, reset=True)
    assert await take(layer, channel) == {"type": "before"}
    assert is_gap(await take(layer, channel), "could not be fetched")
    assert await take(layer, channel) == {"type": "after"}


@pytest.mark.parametrize("value", ["board.*", b"x", 7, None, {"a": 1}, [7], [None, "x"]])
def test_patterns_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"gap_messages|not iterable"):
        PostgresChannelLayer(gap_messages=value)


@pytest.mark.parametrize("shards", [0, -1, 65, True, "8", 2.0, None])
def test_a_number_of_shards_that_cannot_be_is_refused(shards: Any) -> None:
    with pytest.raises(InvalidArgument, match="shards="):
        PostgresChannelLayer(shards=shards)


# -- encryption --------------------------------------------------------------------------------


def keys(*names: str) -> dict[str, list[str]]:
    return {"symmetric_encryption_keys": list(names)}


async def test_an_encrypted_layer_does_all_that_a_readable_one_does(make_layer: MakeLayer) -> None:
    ours, other = make_layer(**keys("new", "old")), make_layer(**keys("old", "new"))
    channel = await member(ours, "room")
    await ours.group_add("room", "work")
    for size in (10, 20_000):
        message = {"type": "x", "body": secrets.token_bytes(size)}
        await other.group_send("room", message)
        await other.send(channel, message)
        for _ in range(2):
            assert await take(ours, channel) == message
        assert await take(other, "work") == message
    await other.group_add("lobby", channel)
    await other.group_send("lobby", {"type": "lobby"})
    assert await take(ours, channel) == {"type": "lobby"}
    await other.flush()
    await ours.group_send("room", {"type": "nobody"})
    await fence(ours, channel)


async def test_without_the_key_nothing_is_read_and_nothing_is_obeyed(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    ours, readable, wrong = make_layer(**keys("a")), make_layer(), make_layer(**keys("b"))
    channel = await member(ours, "room")
    for stranger in (readable, wrong):
        await stranger.group_send("room", {"type": "forged", "body": "x" * 20})
        await stranger.send(channel, {"type": "forged"})
        await stranger.flush()
    await ours.group_send("room", {"type": "hello"})
    assert await take(ours, channel) == {"type": "hello"}
    await fence(ours, channel)
    assert ours.stats["broken"] == 6


async def test_a_stored_message_with_another_key_is_skipped(make_layer: MakeLayer) -> None:
    ours, wrong = make_layer(**keys("a")), make_layer(**keys("b"))
    await wrong.send("work", {"type": "x"})
    await ours.send("work", {"type": "y"})
    assert await take(ours, "work") == {"type": "y"}
    assert ours.stats["broken"] == 1


async def test_neither_the_wire_nor_the_tables_show_what_is_encrypted(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(**keys("a"))
    channel, wire = await member(layer, "room"), wire_of(layer, "room")
    await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(wire)))
    await layer.group_send("room", {"type": "x", "text": "top-secret"})
    await layer.group_send("room", {"type": "x", "text": "top-secret" * 1000})
    await layer.send("work", {"type": "x", "text": "top-secret"})
    payloads = [notify.payload for notify in await heard_until(raw, wire, "mark")]
    cursor = await raw.execute("select encode(body, 'escape') from pgnotify_layer_message")
    stored = [text for (text,) in await cursor.fetchall()]
    assert len(payloads) >= 2
    assert len(stored) == 2
    for text in (*payloads, *stored):
        assert "secret" not in text
    for _ in range(2):
        assert (await take(layer, channel))["text"].startswith("top-secret")


async def test_many_encrypted_messages_at_once_share_frames(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=1000, **keys("a"))
    channel = await member(layer, "room")
    await asyncio.gather(*(layer.group_send("room", {"type": "x", "n": n}) for n in range(300)))
    assert [(await take(layer, channel))["n"] for _ in range(300)] == list(range(300))


# -- stored messages ---------------------------------------------------------------------------


async def test_what_waits_behind_a_stored_message_is_bounded_and_the_rest_is_a_gap(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_module, "_INCOMING_LIMIT", 20_000)
    layer, sender = make_layer(gap_messages=True, capacity=1000), make_layer()
    channel, other = await member(layer, "room"), await member(layer, "lobby")
    wire = wire_of(layer, "room")
    nobody = next(f"n{n}" for n in itertools.count() if wire_of(layer, f"n{n}") == wire)
    stored = await port_of(sender).store(Codec().message({"type": "x", "n": -1}))
    async with raw.transaction():
        await raw.execute("lock table pgnotify_layer_message")  # so it cannot be fetched
        tell = "select pg_notify(%s, %s)"
        url = database_url(connections["default"].settings_dict)
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as client:
            reference = frame(codec.GROUP, "room", stored)
            await client.execute(tell, [wire, reference])
        sending: list[Coroutine[Any, Any, None]] = []
        for number in range(100):
            message = {"type": "x", "n": number, "body": "x" * 1000}
            sending.append(sender.group_send("room", message))
            sending.append(sender.group_send(nobody, {"type": "x"}))
            sending.append(sender.send(channel, {"type": "x", "n": 1000 + number}))
        await asyncio.gather(*sending)
        async with asyncio.timeout(DEADLINE):
            while layer.stats["received"] < 301:
                assert not port_of(layer).local.boxes[channel].messages
                await asyncio.sleep(0.01)
        assert len(port_of(layer)._incoming) < 60
    got: list[Message] = []
    while not got or not is_gap(got[-1], "capacity"):
        got.append(await take(layer, channel))
    numbers = [message["n"] for message in got[:-1]]
    assert numbers[0] == -1
    assert 10 < len(numbers) < 60
    to_group = [number for number in numbers[1:] if number < 1000]
    to_channel = [number for number in numbers[1:] if number >= 1000]
    assert to_group == list(range(len(to_group)))
    assert to_channel == list(range(1000, 1000 + len(to_channel)))
    assert layer.stats["dropped"] == 201 - len(numbers)
    assert port_of(layer)._incoming_size == 0
    await layer.group_send("room", {"type": "after"})
    assert await take(layer, channel) == {"type": "after"}
    await fence(layer, channel)
    await fence(layer, other)
