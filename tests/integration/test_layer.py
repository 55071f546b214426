"""The channel layer against the published specification of Channels, and on connections that break.

"Nothing arrives" is shown by a fence: a message that takes the same way afterwards and comes first.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import msgpack
import psycopg
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull
from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer
from channels.layers import channel_layers, get_channel_layer
from channels.testing import WebsocketCommunicator
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path

from django_pgnotify.exceptions import (
    InvalidArgument,
    ListenError,
    PgNotifyError,
    PublishError,
    UnsupportedDatabase,
)
from django_pgnotify.layers import PostgresChannelLayer, codec, loops
from django_pgnotify.layers import local as local_module
from django_pgnotify.layers import mailbox as mailbox_module
from django_pgnotify.layers import port as port_module
from django_pgnotify.layers.codec import Codec, unpack
from django_pgnotify.layers.mailbox import Mailbox
from django_pgnotify.layers.port import Port
from django_pgnotify.listening.background import stop_all
from django_pgnotify.signals import listener_established
from django_pgnotify.wire import PAYLOAD_LIMIT
from tests.proxy import TCPProxy
from tests.settings import database_url
from tests.testapp.models import Order

# For the test database itself: layers have connections of their own, outside any transaction.
pytestmark = pytest.mark.django_db

DEADLINE = 10.0

Message = dict[str, Any]
MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix no other test uses."""
    prefix = f"test-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


def stop_layers() -> None:
    """End the threads of this process that listen or send, and close what is left open."""
    stop_all()
    loops.stop_all()


@pytest.fixture
def layer(make_layer: MakeLayer) -> PostgresChannelLayer:
    return make_layer()


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
    entry = {
        **connections["default"].settings_dict,
        "HOST": proxy.host,
        "PORT": str(proxy.port),
    }
    monkeypatch.setitem(connections.settings, "proxied", entry)
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
    return "proxied"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of memberships and expiry; ``now`` is its time."""
    clock = SimpleNamespace(now=1000.0)
    stand_in = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(mailbox_module, "time", stand_in)
    monkeypatch.setattr(local_module, "time", stand_in)
    monkeypatch.setattr(port_module, "time", stand_in)
    return clock


async def take(layer: PostgresChannelLayer, channel: str) -> Message:
    async with asyncio.timeout(DEADLINE):
        return await layer.receive(channel)


async def member(layer: PostgresChannelLayer, *groups: str) -> str:
    """A new channel in these groups."""
    channel = await layer.new_channel()
    for group in groups:
        await layer.group_add(group, channel)
    return channel


async def fence(
    layer: PostgresChannelLayer, channel: str, sender: PostgresChannelLayer | None = None
) -> None:
    """Assert that nothing is on its way to ``channel``."""
    group, mark = f"fence.{secrets.token_hex(4)}", secrets.token_hex(4)
    await layer.group_add(group, channel)
    await (sender or layer).group_send(group, {"type": "fence", "mark": mark})
    assert await take(layer, channel) == {"type": "fence", "mark": mark}
    await layer.group_discard(group, channel)


async def passed(layer: PostgresChannelLayer) -> None:
    """Return once everything sent so far has been taken in, without reading any of it."""
    await fence(layer, await layer.new_channel())


def port_of(layer: PostgresChannelLayer) -> Port:
    """What the layer has on the running loop."""
    port = layer._port()
    assert port is not None
    return port


def listening_pid(layer: PostgresChannelLayer) -> int | None:
    return port_of(layer).hub.backend_pid


def wire_of(layer: PostgresChannelLayer, group: str | None = None) -> str:
    """The wire channel of a group, or the one that every process listens to."""
    return layer.wire if group is None else port_of(layer).shard(group)


def b64(packed: bytes) -> str:
    return "b" + base64.b64encode(packed).decode()


def frame(kind: Any, name: Any, body: Any) -> str:
    return b64(msgpack.packb((0, (kind, name, body))))


async def heard_until(
    raw: psycopg.AsyncConnection[Any], channel: str, mark: str
) -> list[psycopg.Notify]:
    """The NOTIFYs that ``raw`` hears on a channel before one of its own."""
    await raw.execute("select pg_notify(%s, %s)", [channel, mark])
    found: list[psycopg.Notify] = []
    async with contextlib.aclosing(raw.notifies(timeout=DEADLINE)) as notifies:
        async for notify in notifies:
            if notify.payload == mark:
                return found
            found.append(notify)
    raise AssertionError("our own NOTIFY did not come back")


async def terminate(raw: psycopg.AsyncConnection[Any], pid: int | None) -> None:
    """End a backend; it is gone when this returns."""
    cursor = await raw.execute("select pg_terminate_backend(%s, 5000)", [pid])
    assert await cursor.fetchone() == (True,)


@contextlib.contextmanager
def established_again() -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Yields a coroutine function that waits for the next listener to be established."""
    happened = threading.Event()

    def note(**kwargs: Any) -> None:
        happened.set()

    async def wait() -> None:
        assert await asyncio.to_thread(happened.wait, DEADLINE), "not established again"

    listener_established.connect(note)
    try:
        yield wait
    finally:
        listener_established.disconnect(note)


class Lines(logging.Handler):
    """What a logger says, and a wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.lines.append(record.getMessage())
            self._changed.notify_all()

    async def wait_for(self, text: str) -> None:
        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(
                    lambda: any(text in line for line in self.lines), DEADLINE
                )

        assert await asyncio.to_thread(wait), self.lines


@contextlib.contextmanager
def lines_of(name: str) -> Iterator[Lines]:
    logger, handler = logging.getLogger(name), Lines()
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


# -- channels --------------------------------------------------------------------------------------


def test_it_announces_the_extensions_it_has(layer: PostgresChannelLayer) -> None:
    assert set(layer.extensions) == {"groups", "flush"}


async def test_new_channels_are_valid_unique_and_local_to_the_process(
    layer: PostgresChannelLayer,
) -> None:
    names = {await layer.new_channel() for _ in range(100)}
    assert len(names) == 100
    for name in names:
        assert layer.require_valid_channel_name(name)
        assert name.startswith("specific.")
        assert "!" in name
    assert (await layer.new_channel("chat.")).startswith("chat.")


async def test_what_is_sent_to_a_channel_is_received_in_order(layer: PostgresChannelLayer) -> None:
    channel = await layer.new_channel()
    sent = [{"type": "test.message", "number": number} for number in range(20)]
    for message in sent:
        await layer.send(channel, message)
    assert [await take(layer, channel) for _ in sent] == sent


async def test_channels_do_not_receive_each_others_messages(layer: PostgresChannelLayer) -> None:
    first, second = await layer.new_channel(), await layer.new_channel()
    await layer.send(second, {"type": "second"})
    await layer.send(first, {"type": "first"})
    assert await take(layer, first) == {"type": "first"}
    assert await take(layer, second) == {"type": "second"}
    await fence(layer, first)
    await fence(layer, second)


async def test_another_layer_of_the_process_can_send_to_a_channel(make_layer: MakeLayer) -> None:
    ours, other = make_layer(), make_layer()
    channel = await ours.new_channel()
    await other.send(channel, {"type": "hello"})
    assert await take(ours, channel) == {"type": "hello"}


async def test_a_sent_message_is_a_copy(layer: PostgresChannelLayer) -> None:
    channel = await member(layer, "room")
    message: Message = {"type": "test", "list": [1]}
    await layer.send(channel, message)
    await layer.group_send("room", message)
    message["list"].append(2)
    assert await take(layer, channel) == {"type": "test", "list": [1]}
    received = await take(layer, channel)
    assert received == {"type": "test", "list": [1]}


async def test_a_channel_of_another_process_cannot_be_received_from(
    make_layer: MakeLayer,
) -> None:
    channel = await make_layer().new_channel()
    with pytest.raises(PgNotifyError, match="another process"):
        await take(make_layer(), channel)


# -- what a message may carry ------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": "bytes", "body": bytes(range(256))},
        {"type": "keys", "by_id": {1: "one", -2: {3: None}}},
        {"type": "nested", "rows": [{"a": [1, 2, [3, {"b": None}]]}, []], "on": True, "off": False},
        {"type": "numbers", "ints": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1], "float": 0.1},
        {"type": "text", "text": "naïve — 東京 🙂 \x00 '\"\\ {}%s"},
        {"type": "empty", "b": b"", "s": "", "l": [], "d": {}},
    ],
    ids=lambda message: message.get("type", "nothing"),
)
async def test_what_a_message_holds_survives(layer: PostgresChannelLayer, message: Message) -> None:
    channel = await member(layer, "room")
    await layer.send(channel, message)
    await layer.group_send("room", message)
    assert await take(layer, channel) == message
    assert await take(layer, channel) == message


async def test_what_a_message_cannot_hold_is_refused_by_the_call_that_sends_it(
    layer: PostgresChannelLayer,
) -> None:
    channel = await member(layer, "room")
    for bad in ({"type": "x", "value": object()}, "text", None, ["list"]):
        with pytest.raises(TypeError):
            await layer.send(channel, bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await layer.group_send("room", bad)  # type: ignore[arg-type]
    await fence(layer, channel)


@pytest.mark.django_db(transaction=True)
async def test_messages_of_every_size_arrive_whole_and_in_order(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    ours, other = make_layer(), make_layer()
    channel = await member(ours, "room")
    # Around where the packed message passes what one NOTIFY may hold.
    limit = PAYLOAD_LIMIT
    sizes = [1, *range(limit - 100, limit, 5), 10, 8_000, 2, 100_000, 3, 2_000_000, 4]
    sent = [{"type": "big", "n": n, "body": b"x" * size} for n, size in enumerate(sizes)]
    for message in sent:
        await other.group_send("room", message)
    await other.send(channel, {"type": "direct", "body": b"y" * 50_000})
    assert [await take(ours, channel) for _ in sent] == sent
    assert len((await take(ours, channel))["body"]) == 50_000
    await fence(ours, channel)
    cursor = await raw.execute("select count(*) from pgnotify_layer_message")
    [stored] = await cursor.fetchone() or [0]
    assert 4 <= stored < len(sizes) - 5, "small ones took no row"


@pytest.mark.django_db(transaction=True)
async def test_messages_that_leave_together_keep_their_order_whatever_their_size(
    layer: PostgresChannelLayer,
) -> None:
    channel = await member(layer, "room")
    sent = [
        {"type": "burst", "n": n, "body": "x" * (20_000 if n % 7 == 3 else 5)} for n in range(80)
    ]
    await asyncio.gather(*(layer.group_send("room", message) for message in sent))
    assert [await take(layer, channel) for _ in sent] == sent


async def test_equal_messages_that_leave_together_all_arrive(layer: PostgresChannelLayer) -> None:
    """PostgreSQL folds equal NOTIFYs of one transaction into one."""
    channel = await member(layer, "room")
    tick = {"type": "tick"}
    await asyncio.gather(*(layer.group_send("room", tick) for _ in range(60)))
    for _ in range(60):
        assert await take(layer, channel) == tick
    await fence(layer, channel)


# -- groups -----------------------------------------------------------------------------------


async def test_a_group_message_reaches_every_member_once_and_nobody_else(
    make_layer: MakeLayer,
) -> None:
    ours, other = make_layer(), make_layer()
    members = [await member(ours, "room") for _ in range(3)]
    elsewhere = await member(other, "room", "lobby")
    outside = await member(ours, "lobby")
    await other.group_send("room", {"type": "hello"})
    for channel in members:
        assert await take(ours, channel) == {"type": "hello"}
        await fence(ours, channel)
    assert await take(other, elsewhere) == {"type": "hello"}
    await fence(other, elsewhere)
    await fence(ours, outside)


async def test_a_channel_that_joined_twice_hears_once_and_leaves_at_once(
    layer: PostgresChannelLayer,
) -> None:
    channel = await member(layer, "room", "room")
    await layer.group_send("room", {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}
    await fence(layer, channel)
    await layer.group_discard("room", channel)
    await layer.group_send("room", {"type": "hello"})
    await fence(layer, channel)


async def test_leaving_a_group_one_is_not_in_is_no_error(layer: PostgresChannelLayer) -> None:
    channel = await member(layer, "lobby")
    await layer.group_discard("room", channel)
    await layer.group_discard("lobby", await layer.new_channel())
    await layer.group_send("lobby", {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}


async def test_sending_to_a_group_without_members_is_no_error(layer: PostgresChannelLayer) -> None:
    await layer.group_send("nobody", {"type": "hello"})


async def test_every_message_sent_after_group_add_returned_arrives(make_layer: MakeLayer) -> None:
    """The first ``group_add`` of a layer included, which has to start listening."""
    for number in range(20):
        ours = make_layer(prefix=f"fresh-{secrets.token_hex(4)}")
        channel = await ours.new_channel() if number % 2 else f"x{port_of(ours).local.token}!1"
        await ours.group_add("room", channel)
        await make_layer(prefix=ours.prefix).group_send("room", {"type": "hello", "n": number})
        assert await take(ours, channel) == {"type": "hello", "n": number}
        await ours.close()


async def test_a_channel_of_another_process_can_be_added_and_discarded(
    make_layer: MakeLayer,
) -> None:
    """Two layers stand in for two processes: a layer knows its own channels only."""
    theirs, ours = make_layer(), make_layer()
    channel = await theirs.new_channel()
    for number in range(20):
        await ours.group_add("room", channel)
        await ours.group_send("room", {"type": "in", "n": number})
        assert await take(theirs, channel) == {"type": "in", "n": number}
        await ours.group_discard("room", channel)
        await ours.group_send("room", {"type": "out", "n": number})
        await fence(theirs, channel, ours)


async def test_a_group_send_is_one_notify_however_many_hear_it(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layers = [make_layer(), make_layer()]
    for one in layers:
        for _ in range(25):
            await member(one, "room")
    channel = wire_of(layers[0], "room")
    await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(channel)))
    for number in range(3):
        await layers[0].group_send("room", {"type": "hello", "n": number})
    assert len(await heard_until(raw, channel, "mark")) == 3


async def test_layers_with_different_prefixes_do_not_hear_each_other(
    make_layer: MakeLayer,
) -> None:
    first, second = make_layer(), make_layer(prefix=f"other-{secrets.token_hex(4)}")
    one, two = await member(first, "room"), await member(second, "room")
    await first.group_send("room", {"type": "first"})
    await first.flush()
    await second.group_send("room", {"type": "second"})
    assert await take(second, two) == {"type": "second"}
    await first.group_add("room", one)
    await fence(second, two)


async def test_layers_of_deployments_with_different_channel_prefixes_do_not_hear_each_other(
    make_layer: MakeLayer, settings: Any
) -> None:
    first = make_layer()
    settings.PGNOTIFY_CHANNEL_PREFIX = "staging."
    second = make_layer()
    one, two = await member(first, "room"), await member(second, "room")
    await first.group_send("room", {"type": "first"})
    await second.group_send("room", {"type": "second"})
    assert await take(first, one) == {"type": "first"}
    assert await take(second, two) == {"type": "second"}
    await fence(first, one)
    await fence(second, two)


async def test_a_membership_that_was_not_renewed_ends(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    layer = make_layer(group_expiry=100)
    renewed, forgotten = await member(layer, "room"), await member(layer, "room")
    clock.now += 60
    await layer.group_add("room", renewed)
    clock.now += 60
    await layer.group_send("room", {"type": "hello"})
    assert await take(layer, renewed) == {"type": "hello"}
    await fence(layer, forgotten)


async def test_a_membership_does_not_end_while_somebody_reads(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    layer = make_layer()
    reader = await member(layer, "room")
    task = asyncio.create_task(layer.receive(reader), name="receive")
    await asyncio.sleep(0)
    for _ in range(3):
        clock.now += 86_401
        await layer.new_channel()  # which sweeps
    await layer.group_send("room", {"type": "hello"})
    async with asyncio.timeout(DEADLINE):
        assert await task == {"type": "hello"}


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "with space", "ümlaut", "a:b", "a/b", "x" * 101, "line\n", b"bytes", None, 7]
)
async def test_an_invalid_name_is_refused_by_every_method(
    layer: PostgresChannelLayer, name: Any
) -> None:
    channel = await layer.new_channel()
    calls: list[Coroutine[Any, Any, Any]] = [
        layer.send(name, {"type": "x"}),
        layer.receive(name),
        layer.group_add(name, channel),
        layer.group_add("room", name),
        layer.group_discard(name, channel),
        layer.group_discard("room", name),
        layer.group_send(name, {"type": "x"}),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            await call


async def test_the_longest_names_work(layer: PostgresChannelLayer) -> None:
    group = "g" * 100
    channel = await member(layer, group)
    await layer.group_send(group, {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}


def test_a_database_that_has_no_notify_is_refused() -> None:
    for alias in ("lite", "nowhere"):
        with pytest.raises(UnsupportedDatabase, match=alias):
            PostgresChannelLayer(using=alias)


def test_a_prefix_of_any_length_is_accepted(make_layer: MakeLayer) -> None:
    layer = make_layer(prefix="p" * 200)

    async def main() -> None:
        channel = await member(layer, "room")
        await layer.group_send("room", {"type": "hello"})
        assert await take(layer, channel) == {"type": "hello"}

    asyncio.run(main())


# -- capacity and expiry --------------------------------------------------------------------------


async def test_sending_to_a_full_channel_raises_channel_full(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=5)
    channel = await layer.new_channel()
    for number in range(5):
        await layer.send(channel, {"type": "x", "n": number})
    with pytest.raises(ChannelFull):
        await layer.send(channel, {"type": "x", "n": 5})
    assert [(await take(layer, channel))["n"] for _ in range(5)] == list(range(5))
    await layer.send(channel, {"type": "x", "n": 6})
    assert (await take(layer, channel))["n"] == 6


async def test_a_group_send_passes_full_channels_over_and_counts_what_they_miss(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(capacity=3)
    slow, quick = await member(layer, "room"), await member(layer, "room")
    for number in range(7):
        await layer.group_send("room", {"type": "x", "n": number})
        assert (await take(layer, quick))["n"] == number
    assert layer.stats["dropped"] == 4
    assert [(await take(layer, slow))["n"] for _ in range(3)] == [0, 1, 2]
    await fence(layer, slow)


async def test_capacity_can_be_chosen_by_channel_name(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=1, channel_capacity={"chat.*": 3})
    roomy, narrow = await layer.new_channel("chat."), await layer.new_channel("http.")
    for _ in range(3):
        await layer.send(roomy, {"type": "x"})
    with pytest.raises(ChannelFull):
        await layer.send(roomy, {"type": "x"})
    await layer.send(narrow, {"type": "x"})
    with pytest.raises(ChannelFull):
        await layer.send(narrow, {"type": "x"})


async def test_an_expired_message_is_not_received(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    layer = make_layer(expiry=5)
    channel = await member(layer, "room")
    await layer.send(channel, {"type": "old"})
    await layer.group_send("room", {"type": "old"})
    await passed(layer)
    clock.now += 5
    await layer.group_send("room", {"type": "new"})
    assert await take(layer, channel) == {"type": "new"}


async def test_expired_messages_make_room(make_layer: MakeLayer, clock: SimpleNamespace) -> None:
    layer = make_layer(expiry=5, capacity=1)
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "old"})
    with pytest.raises(ChannelFull):
        await layer.send(channel, {"type": "refused"})
    clock.now += 5
    await layer.send(channel, {"type": "new"})
    assert await take(layer, channel) == {"type": "new"}


async def test_a_channel_whose_messages_expire_unread_stays_in_its_groups(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    """Its consumer may only be busy: it must not be deaf for the rest of its life."""
    layer = make_layer(expiry=5, capacity=2)
    slow = await member(layer, "room")
    for _ in range(2):
        await layer.group_send("room", {"type": "x"})
    await passed(layer)
    clock.now += 5
    await layer.group_send("room", {"type": "after"})
    assert await take(layer, slow) == {"type": "after"}
    assert layer.stats["expired"] == 2


async def test_channels_that_nobody_reads_any_more_do_not_pile_up(
    make_layer: MakeLayer, clock: SimpleNamespace
) -> None:
    """A consumer that goes leaves behind what was sent to it between its last read and its end."""
    layer = make_layer(expiry=5)
    before = mailboxes()
    for _ in range(50):
        await layer.send(await layer.new_channel(), {"type": "x"})
    assert mailboxes() >= before + 50
    clock.now += 5
    busy = await member(layer, "room")
    for _ in range(200):
        await layer.group_send("room", {"type": "x"})
        await take(layer, busy)
    assert mailboxes() <= before + 1


def mailboxes() -> int:
    gc.collect()
    return sum(isinstance(entry, Mailbox) for entry in gc.get_objects())


async def test_flush_forgets_groups_and_messages_everywhere(make_layer: MakeLayer) -> None:
    ours, other = make_layer(), make_layer()
    here, there = await member(ours, "room"), await member(other, "room")
    await ours.send(here, {"type": "waiting"})
    await other.send(there, {"type": "waiting"})
    await ours.flush()
    # Behind the flush, on the same way: once it is here, so was the flush.
    await ours.send(there, {"type": "behind"})
    assert await take(other, there) == {"type": "behind"}
    await ours.group_send("room", {"type": "nobody"})
    await fence(ours, here)
    await fence(other, there)


async def test_a_flush_that_has_returned_takes_nothing_more_away(
    layer: PostgresChannelLayer,
) -> None:
    for number in range(20):
        await layer.flush()
        channel = await member(layer, "room")
        await layer.group_send("room", {"type": "hello", "n": number})
        assert await take(layer, channel) == {"type": "hello", "n": number}


# -- whoever receives -------------------------------------------------------------------------


async def test_a_cancelled_receive_loses_nothing(layer: PostgresChannelLayer) -> None:
    channel = await member(layer, "room")
    count = 90  # below the channel's capacity
    sending = asyncio.gather(
        *(layer.group_send("room", {"type": "x", "n": number}) for number in range(count))
    )
    received: list[int] = []
    patience = 0
    async with asyncio.timeout(DEADLINE):
        while len(received) < count:
            task = asyncio.create_task(layer.receive(channel), name="receive")
            patience = (patience + 1) % 4
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received.append((await task)["n"])
    await sending
    assert received == list(range(count))


async def test_a_cancelled_send_does_not_break_those_behind_it(
    layer: PostgresChannelLayer,
) -> None:
    channel = await member(layer, "room")
    tasks = [
        asyncio.create_task(layer.group_send("room", {"type": "x", "n": n}), name=f"send {n}")
        for n in range(50)
    ]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    done = [n for n, result in enumerate(results) if result is None]
    assert set(done) >= set(range(1, 50, 2))
    await layer.group_send("room", {"type": "x", "n": "end"})
    received = []
    while (n := (await take(layer, channel))["n"]) != "end":
        received.append(n)
    # A cancelled one may have left already.
    assert [n for n in received if n in done] == done
    assert received == sorted(received)


def test_event_loops_in_several_threads_share_a_layer(layer: PostgresChannelLayer) -> None:
    count, loops = 50, 4
    joined = threading.Barrier(loops)

    async def chat(me: int) -> list[tuple[int, int]]:
        channel = await member(layer, "room")
        await asyncio.to_thread(joined.wait, DEADLINE)
        for number in range(count // 5):
            await layer.group_send("room", {"type": "x", "from": me, "n": number})
        heard = []
        for _ in range(loops * (count // 5)):
            message = await take(layer, channel)
            heard.append((message["from"], message["n"]))
        return heard

    results: dict[int, list[tuple[int, int]]] = {}
    threads = [
        threading.Thread(target=lambda me=me: results.update({me: asyncio.run(chat(me))}))
        for me in range(loops)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE)
    assert len(results) == loops
    assert len({tuple(heard) for heard in results.values()}) == 1, "all in the same order"
    for me in range(loops):
        assert [n for who, n in results[0] if who == me] == list(range(count // 5))


def test_it_works_from_synchronous_code(layer: PostgresChannelLayer) -> None:
    """``async_to_sync`` makes an event loop for each call."""
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("room", channel)
    for number in range(10):
        async_to_sync(layer.group_send)("room", {"type": "x", "n": number})
        assert async_to_sync(take)(layer, channel) == {"type": "x", "n": number}


def failing_view(request: HttpRequest) -> HttpResponse:
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        order = Order.objects.create(status="doomed")
        async_to_sync(get_channel_layer().group_send)("room", {"type": "x", "pk": order.pk})
        raise ZeroDivisionError
    return HttpResponse(str(Order.objects.count()))


urlpatterns = [path("fail/", failing_view)]


@pytest.mark.django_db(transaction=True)
def test_a_message_sent_in_a_transaction_that_rolls_back_has_left(
    make_layer: MakeLayer, settings: Any
) -> None:
    """A layer's message is no event: it leaves when it is sent."""
    layer = make_layer()
    settings.ROOT_URLCONF = __name__
    settings.CHANNEL_LAYERS = configured(layer)
    channel = async_to_sync(member)(layer, "room")
    assert Client().get("/fail/").content == b"0"
    assert async_to_sync(take)(layer, channel)["type"] == "x"


def configured(layer: PostgresChannelLayer) -> dict[str, Any]:
    """CHANNEL_LAYERS of one layer that hears what ``layer`` hears."""
    backend = f"{PostgresChannelLayer.__module__}.{PostgresChannelLayer.__qualname__}"
    return {"default": {"BACKEND": backend, "CONFIG": {"prefix": layer.prefix}}}


# -- consumers of Channels ---------------------------------------------------------------------


class RoomConsumer(AsyncJsonWebsocketConsumer):
    groups = ("room",)

    async def receive_json(self, content: Message, **kwargs: Any) -> None:
        await self.channel_layer.group_send("room", {"type": "chat.said", **content})

    async def chat_said(self, message: Message) -> None:
        await self.send_json({"text": message["text"]})


class SyncRoomConsumer(JsonWebsocketConsumer):
    groups = ("room",)

    def receive_json(self, content: Message, **kwargs: Any) -> None:
        async_to_sync(self.channel_layer.group_send)("room", {"type": "chat.said", **content})

    def chat_said(self, message: Message) -> None:
        self.send_json({"text": message["text"]})


@pytest.mark.parametrize("consumer", [RoomConsumer, SyncRoomConsumer])
@pytest.mark.django_db(transaction=True)
async def test_consumers_of_channels_talk_through_it(
    make_layer: MakeLayer, settings: Any, consumer: Any
) -> None:
    layer = make_layer()
    settings.CHANNEL_LAYERS = configured(layer)
    sockets = [WebsocketCommunicator(consumer.as_asgi(), "/ws/") for _ in range(3)]
    for socket in sockets:
        assert await socket.connect(timeout=DEADLINE) == (True, None)
    await sockets[0].send_json_to({"text": "hello"})
    for socket in sockets:
        assert await socket.receive_json_from(timeout=DEADLINE) == {"text": "hello"}
    # And somebody who is no consumer.
    await layer.group_send("room", {"type": "chat.said", "text": "x" * 10_000})
    for socket in sockets:
        assert await socket.receive_json_from(timeout=DEADLINE) == {"text": "x" * 10_000}
    for socket in sockets:
        await socket.disconnect(timeout=DEADLINE)
    assert port_of(channel_layers["default"]).local.groups == {}


# -- connections that break --------------------------------------------------------------------


async def test_the_layer_hears_again_after_its_listening_backend_was_terminated(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    channel = await member(layer, "room")
    for times in (1, 2, 3):
        with established_again() as again:
            await terminate(raw, listening_pid(layer))
            await again()
        assert layer.stats["gaps"] == times
        await layer.group_send("room", {"type": "hello", "n": times})
        assert await take(layer, channel) == {"type": "hello", "n": times}


async def test_a_channel_added_while_the_layer_reconnects_misses_nothing_afterwards(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy
) -> None:
    layer, elsewhere = make_layer(using=proxied), make_layer()
    channel = await layer.new_channel()
    await elsewhere.group_send("nobody", {"type": "x"})  # connected, and so quick from here on
    with lines_of("django_pgnotify.listening") as lines:
        proxy.close()
        await lines.wait_for("not established")

    async def join_and_have_somebody_send() -> None:
        await layer.group_add("room", channel)
        await elsewhere.group_send("room", {"type": "after"})

    joining = asyncio.create_task(join_and_have_somebody_send(), name="joining")
    for _ in range(5):
        await asyncio.sleep(0)  # far enough to return, if it does not wait
    await asyncio.to_thread(proxy.open)
    async with asyncio.timeout(DEADLINE):
        await joining
        assert await layer.receive(channel) == {"type": "after"}


async def elsewhere(layer: PostgresChannelLayer, group: str, message: Message) -> None:
    """Send from synchronous code, so on another loop and its connection, which does not listen."""
    await asyncio.to_thread(async_to_sync(layer.group_send), group, message)


async def test_a_message_is_sent_though_the_sending_backend_was_terminated(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    channel, wire = await member(layer, "room"), wire_of(layer, "room")
    await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(wire)))
    for number in range(3):
        await elsewhere(layer, "room", {"type": "before", "n": number})
        assert (await take(layer, channel))["n"] == number
        [notify] = await heard_until(raw, wire, f"mark {number}")
        await terminate(raw, notify.pid)
    await elsewhere(layer, "room", {"type": "after"})
    assert await take(layer, channel) == {"type": "after"}
    await fence(layer, channel)


async def test_a_loop_whose_backend_was_terminated_sends_on_while_it_connects_again(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer()
    await member(layer, "room")
    wire = wire_of(layer, "room")
    await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(wire)))
    for number in range(5):
        await terminate(raw, listening_pid(layer))
        await asyncio.gather(
            *(layer.group_send("room", {"type": "x", "n": (number, n)}) for n in range(7))
        )
        await layer.new_channel()  # heard again
    payloads = [notify.payload for notify in await heard_until(raw, wire, "mark")]
    entries = [entry for payload in payloads for entry in Codec().open(payload.encode())]
    assert [unpack(body)["n"] for _, _, body in entries] == [
        [number, n] for number in range(5) for n in range(7)
    ], "each once, in order"
    await fence(layer, await layer.new_channel())


@pytest.mark.django_db(transaction=True)
async def test_a_stored_message_is_fetched_though_the_connection_was_terminated(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    ours, other = make_layer(), make_layer()
    channel, wire = await member(ours, "room"), wire_of(ours, "room")
    await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(wire)))
    await other.group_send("room", {"type": "big", "body": "x" * 20_000})
    assert len((await take(ours, channel))["body"]) == 20_000
    [notify] = await heard_until(raw, wire, "mark")
    rows = port_of(ours).hub.rows
    assert rows.connection is not None
    await terminate(raw, rows.connection.backend_pid)
    await raw.execute("select pg_notify(%s, %s)", [wire, notify.payload])  # heard once more
    assert len((await take(ours, channel))["body"]) == 20_000
    assert ours.stats["broken"] == 1, "that of our mark"


async def test_a_server_that_is_away_is_a_publish_error_and_no_more_once_it_is_back(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy
) -> None:
    layer = make_layer(using=proxied)
    channel = await member(layer, "room")
    await layer.group_send("room", {"type": "before"})
    assert await take(layer, channel) == {"type": "before"}
    await asyncio.to_thread(proxy.close)
    with pytest.raises(PublishError, match="could not send"):
        await layer.group_send("room", {"type": "lost"})
    with established_again() as again:
        await asyncio.to_thread(proxy.open)
        await again()
    await layer.group_send("room", {"type": "after"})
    assert await take(layer, channel) == {"type": "after"}


def test_a_server_that_cannot_be_reached_is_a_listen_error_with_what_to_do(
    make_layer: MakeLayer, proxied: str, proxy: TCPProxy, settings: Any
) -> None:
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.3
    proxy.close()
    layer = make_layer(using=proxied)

    async def join() -> None:
        async with asyncio.timeout(DEADLINE):
            await layer.group_add("room", f"x{port_of(layer).local.token}!1")

    with lines_of("concurrent.futures") as complaints:
        with pytest.raises(ListenError, match="pglisten --check"):
            asyncio.run(join())
        settings.PGNOTIFY_CONNECT_TIMEOUT = DEADLINE
        proxy.open()
        asyncio.run(join())
    assert complaints.lines == [], "the loop that gave up is closed, and nobody calls it"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_setting_that_django_refuses_fails_the_send_and_hangs_nothing(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {**connections["default"].settings_dict, "NAME": "x" * 100}
    monkeypatch.setitem(connections.settings, "misnamed", entry)
    layer = make_layer(using="misnamed")
    for _ in range(2):
        with pytest.raises((PgNotifyError, InvalidArgument, psycopg.Error), match="x"):
            async with asyncio.timeout(DEADLINE / 5):
                await layer.group_send("room", {"type": "hello"})


# -- what others put on the wire ---------------------------------------------------------------


NESTED = b64(b"\x91" * 5_000 + b"\x90")


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "do job 1001",
        "{'type': 'x'}",
        "7" * PAYLOAD_LIMIT,
        "b",
        "u",
        "e",
        "u\u0100\u0101",
        b64(b"\xc1"),
        frame(codec.GROUP, "room", b"")[:-4],
        NESTED,
        b64(msgpack.packb(7)),
        b64(msgpack.packb([])),
        b64(msgpack.packb([0, 7])),
        b64(msgpack.packb([0, [codec.GROUP, "room"]])),
        b64(msgpack.packb({0: 1, "room": 2, "x": 3})),
        frame(codec.GROUP, 7, b""),
        frame(codec.GROUP, "room", "text"),
        frame([codec.GROUP], "room", b""),
        frame(True, "room", b""),
        frame(codec.GROUP, "room", 999999999),
        frame(codec.GROUP, "room", -1),
        frame(codec.GROUP, "room", 2**64 - 1),
        frame(codec.ADD, "room", "one"),
    ],
    ids=lambda payload: payload[:24] or "empty",
)
async def test_a_foreign_notify_is_counted_and_skipped(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any], payload: str
) -> None:
    channel = await member(layer, "room")
    await raw.execute("select pg_notify(%s, %s)", [wire_of(layer), payload])
    await layer.group_send("room", {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}
    assert layer.stats["broken"] == 1


async def test_a_frame_of_an_unknown_kind_ends_no_membership(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    channel = await member(layer, "room")
    for kind in ("z", "", 17, None):
        payload = frame(kind, "room", channel.encode())
        await raw.execute("select pg_notify(%s, %s)", [wire_of(layer), payload])
    await layer.group_send("room", {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}
    assert layer.stats["broken"] == 4


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x81\xa4type", msgpack.packb(7), msgpack.packb(["type"])]
)
async def test_a_message_that_is_none_never_reaches_a_consumer(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any], body: bytes
) -> None:
    """It would end the consumer, and so the websocket, of everybody in the group."""
    channel = await member(layer, "room")
    for payload in (frame(codec.GROUP, "room", body), frame(codec.DIRECT, channel, body)):
        await raw.execute("select pg_notify(%s, %s)", [wire_of(layer), payload])
    await layer.group_send("room", {"type": "hello"})
    assert await take(layer, channel) == {"type": "hello"}
    assert layer.stats["broken"] == 2


# -- what stays behind ---------------------------------------------------------------------------


async def test_a_closed_layer_hears_no_more_and_leaves_the_others_alone(
    make_layer: MakeLayer,
) -> None:
    closing, staying = make_layer(), make_layer()
    one, two = await member(closing, "room"), await member(staying, "room")
    await closing.close()
    await closing.close()  # again is no error
    await staying.group_send("room", {"type": "hello"})
    assert await take(staying, two) == {"type": "hello"}
    # It opens again with its next use, and has not heard what was sent meanwhile.
    await closing.group_add("room", one)
    await staying.group_send("room", {"type": "again"})
    assert await take(closing, one) == {"type": "again"}


async def test_one_connection_listens_and_sends_for_all_layers_of_the_loop(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    count = "select count(*) from pg_stat_activity where datname = current_database()"
    [[before]] = await (await raw.execute(count)).fetchall()
    for number in range(5):
        layer = make_layer(prefix=f"many-{number}-{secrets.token_hex(4)}")
        channel = await member(layer, "room")
        await layer.group_send("room", {"type": "x"})
        await take(layer, channel)
    [[after]] = await (await raw.execute(count)).fetchall()
    assert after - before == 1


async def test_a_message_is_there_within_a_few_milliseconds(layer: PostgresChannelLayer) -> None:
    """No poll and no floor anywhere on the way: bounded generously, for a busy machine."""
    channel = await member(layer, "room")
    took = []
    for _ in range(50):
        start = time.perf_counter()
        await layer.group_send("room", {"type": "x"})
        await take(layer, channel)
        took.append(time.perf_counter() - start)
    assert sorted(took)[25] < 0.05
