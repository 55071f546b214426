"""The channel layer against those who mean it no good: chance, garbage, crowds and edges.

What chance does is told by its seed. A layer stands for a process: each has channels of its own.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import msgpack
import psycopg
import pytest
from channels.exceptions import ChannelFull

from django_pgnotify.exceptions import PublishError
from django_pgnotify.layers import PostgresChannelLayer
from django_pgnotify.layers.codec import DIRECT, GROUP, Codec
from tests.integration.recording import client
from tests.integration.test_layer import (
    fence,
    listening_pid,
    member,
    passed,
    port_of,
    stop_layers,
    take,
)

# Rows outlive a layer; the flush after a transactional test takes them away.
pytestmark = pytest.mark.django_db(transaction=True)

DEADLINE = 30.0
T = TypeVar("T")
Message = dict[str, Any]
MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix of this test."""
    prefix = f"hostile-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, "capacity": 10_000, **config})

    yield make
    stop_layers()


@pytest.fixture
def layer(make_layer: MakeLayer) -> PostgresChannelLayer:
    return make_layer()


@pytest.fixture
async def raw(django_db_setup: None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection that knows nothing of layers."""
    async with client() as connection:
        yield connection


class Elsewhere:
    """A layer on an event loop and in a thread of its own."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self.layer = layer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="elsewhere")
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def do(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function there."""
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(function(*args), self._loop)
        )

    async def end(self) -> None:
        await self.do(self.layer.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)


class Here:
    """The same on the loop of the test."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self.layer = layer

    async def do(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        return await function(*args)

    async def end(self) -> None:
        """It ends with the test."""


# -- chance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [Here, Elsewhere], ids=["one loop", "three loops"])
async def test_whatever_is_done_everybody_hears_exactly_what_is_meant_for_them(
    make_layer: MakeLayer, kind: type[Here | Elsewhere], seed: int
) -> None:
    """Three processes, two channels each, three groups, 250 random calls, one after the other."""
    chance = random.Random(seed)
    places = [kind(make_layer()) for _ in range(3)]
    try:
        channels = {
            await place.do(place.layer.new_channel): place for place in places for _ in range(2)
        }
        groups: dict[str, set[str]] = {name: set() for name in ("red", "green", "blue")}
        expected: dict[str, list[int]] = {channel: [] for channel in channels}
        for n in range(250):
            place, group = chance.choice(places), chance.choice(list(groups))
            channel = chance.choice(list(channels))
            owner, layer = channels[channel], place.layer
            message = {"type": "x", "n": n, "body": "y" * chance.choice([0, 0, 0, 4_000, 20_000])}
            match chance.choice(["join", "leave", "group", "group", "group", "direct"]):
                case "join":
                    # Or what is under way would be heard by who was not there when it was sent.
                    await owner.do(passed, owner.layer)
                    await place.do(layer.group_add, group, channel)
                    groups[group].add(channel)
                case "leave":
                    await owner.do(passed, owner.layer)
                    await place.do(layer.group_discard, group, channel)
                    await place.do(passed, layer)
                    await owner.do(passed, owner.layer)
                    groups[group].discard(channel)
                case "group":
                    await place.do(layer.group_send, group, message)
                    for each in groups[group]:
                        expected[each].append(n)
                case "direct":
                    # What one sends to oneself overtakes what others have sent.
                    await owner.do(passed, owner.layer)
                    await place.do(layer.send, channel, message)
                    expected[channel].append(n)
        for channel, place in channels.items():
            await place.do(passed, place.layer)
            heard = [(await place.do(take, place.layer, channel))["n"] for _ in expected[channel]]
            assert heard == expected[channel], f"seed {seed}"
            await place.do(fence, place.layer, channel)
    finally:
        for place in places:
            await place.end()


@pytest.mark.parametrize("name", ["process-local", "normal"])
@pytest.mark.parametrize("seed", range(3))
async def test_readers_that_give_up_at_random_neither_lose_nor_repeat(
    make_layer: MakeLayer, name: str, seed: int
) -> None:
    chance = random.Random(seed)
    layer = make_layer()
    channel = "workers" if name == "normal" else await layer.new_channel()
    heard: Counter[int] = Counter()
    readers: set[asyncio.Task[None]] = set()
    everything = asyncio.Event()

    async def read() -> None:
        message = await layer.receive(channel)
        heard[message["n"]] += 1  # nothing is awaited between: whoever has it counts it
        if len(heard) == 150:
            everything.set()

    def engage() -> None:
        reader = asyncio.create_task(read(), name="reader")
        readers.add(reader)
        reader.add_done_callback(readers.discard)

    for n in range(150):
        for _ in range(chance.randrange(4)):
            engage()
        for reader in chance.sample(sorted(readers, key=id), min(len(readers), 2)):
            reader.cancel()
        await layer.send(channel, {"type": "x", "n": n})
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        for reader in chance.sample(sorted(readers, key=id), min(len(readers), 1)):
            reader.cancel()
    async with asyncio.timeout(DEADLINE):
        while not everything.is_set():
            engage()
            await asyncio.wait(set(readers), return_when=asyncio.FIRST_COMPLETED)
    for reader in set(readers):
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    assert heard == Counter(range(150)), f"seed {seed}"


async def test_joining_and_leaving_under_load_misses_nothing_in_between(
    make_layer: MakeLayer,
) -> None:
    """Others send without a pause: what one hears is a run of numbers without a hole."""
    layer, loud = make_layer(), Elsewhere(make_layer())
    stop = asyncio.Event()
    last = 0

    async def make_noise() -> None:
        nonlocal last
        while not stop.is_set():
            last += 1
            await loud.do(loud.layer.group_send, "room", {"type": "x", "n": last})

    noise = asyncio.create_task(make_noise(), name="noise")
    try:
        for _ in range(25):
            channel = await layer.new_channel()
            await layer.group_add("room", channel)
            first = (await take(layer, channel))["n"]
            heard = [(await take(layer, channel))["n"] for _ in range(5)]
            assert heard == list(range(first + 1, first + 6))
            await layer.group_discard("room", channel)
            # What was in the mailbox by then may still come, and nothing after it.
            await layer.send(channel, {"type": "left"})
            while (message := await take(layer, channel))["type"] != "left":
                heard.append(message["n"])
            assert heard == list(range(first + 1, first + 1 + len(heard)))
            await fence(layer, channel, layer)
    finally:
        stop.set()
        await noise
        await loud.end()


async def test_two_loops_that_answer_each_other_as_fast_as_they_can(make_layer: MakeLayer) -> None:
    here, there = make_layer(), Elsewhere(make_layer())
    ours = await here.new_channel()
    theirs = await there.do(there.layer.new_channel)

    async def answer() -> None:
        for _ in range(200):
            message = await take(there.layer, theirs)
            await there.layer.send(ours, {"type": "answer", "n": message["n"]})

    answering = asyncio.create_task(there.do(answer), name="answer")
    try:
        for n in range(200):
            await here.send(theirs, {"type": "question", "n": n})
            assert await take(here, ours) == {"type": "answer", "n": n}
        await answering
    finally:
        await there.end()


async def test_a_backend_that_is_terminated_while_it_sends_sends_once_or_says_so(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any], settings: Any
) -> None:
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    layer, witness = make_layer(), Elsewhere(make_layer())
    hearing = await witness.do(member, witness.layer, "room")
    await layer.new_channel()
    certain, refused = set(), set()
    try:
        for n in range(30):
            await layer.new_channel()  # established again
            sending = asyncio.create_task(layer.group_send("room", {"type": "x", "n": n}))
            for _ in range(n % 3):
                await asyncio.sleep(0)
            await raw.execute("SELECT pg_terminate_backend(%s, 5000)", [listening_pid(layer)])
            try:
                async with asyncio.timeout(DEADLINE):
                    await sending
                certain.add(n)
            except PublishError:
                refused.add(n)
        await layer.new_channel()
        await layer.group_send("room", {"type": "end", "n": -1})
        heard: list[int] = []
        while (message := await witness.do(take, witness.layer, hearing))["type"] != "end":
            heard.append(message["n"])
    finally:
        await witness.end()
    assert heard == sorted(set(heard)), "never twice, and in order"
    assert certain <= set(heard) <= certain | refused
    assert certain | refused == set(range(30))


# -- crowds ----------------------------------------------------------------------------------------


async def test_ten_thousand_groups_take_a_handful_of_wire_channels(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await layer.new_channel()
    names = [f"group.{number}" for number in range(10_000)]
    for name in names:
        await layer.group_add(name, channel)
    port = port_of(layer)
    assert len(port.local.groups) == 10_000
    assert len([wire for wire in port.hub.heard if wire.startswith(layer.wire)]) <= 2 + 8
    chosen = random.Random(1).sample(names, 200)
    await other.group_send_many([(name, {"type": "x", "group": name}) for name in chosen])
    # Order is kept within a group; these are all different.
    heard = [(await take(layer, channel))["group"] for _ in chosen]
    assert sorted(heard) == sorted(chosen)
    for name in names:
        await layer.group_discard(name, channel)
    await other.group_send_many([(name, {"type": "x"}) for name in chosen])
    await fence(layer, channel, other)
    assert port.local.groups == {}
    assert set(port.local.boxes) <= {channel}


async def test_channels_that_come_and_go_leave_nothing_behind(layer: PostgresChannelLayer) -> None:
    for number in range(1000):
        channel = await member(layer, "room", f"own.{number}")
        await layer.group_send(f"own.{number}", {"type": "x"})
        await take(layer, channel)
        await layer.group_discard("room", channel)
        await layer.group_discard(f"own.{number}", channel)
    local = port_of(layer).local
    assert (local.groups, local.boxes) == ({}, {})


# -- garbage ---------------------------------------------------------------------------------------


def garbage(layer: PostgresChannelLayer, channel: str, chance: random.Random) -> Iterator[str]:
    """Payloads that look like ours up to a point."""
    codec = Codec()
    good = codec.frames([codec.entry(GROUP, "room", codec.message({"type": "bad"}))], utf8=True)[0]
    text = good.decode()
    yield from (text[:cut] for cut in range(0, len(text), 7))
    yield text + "x"
    for packed in (
        msgpack.packb(None),
        msgpack.packb([]),
        msgpack.packb({"a": 1}),
        msgpack.packb([0, 1, 2]),
        msgpack.packb([0, [GROUP, "room"]]),
        msgpack.packb([0, [GROUP, "room", None]]),
        msgpack.packb([0, [GROUP, 7, b""]]),
        msgpack.packb([0, [99, "room", b""]]),
        msgpack.packb([0, [DIRECT, channel, "text"]]),
        msgpack.packb([0, [-1, "room", b"x"]]),
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xdb\xff\xff\xff\xff",  # as long a text
        b"\x91" * 1500,
        b"\xc1",
    ):
        yield "u" + packed.decode("latin-1").replace("\x00", "\u0100")
    for _ in range(30):
        letter = chance.choice("ubex{r")
        yield letter + "".join(chr(chance.randrange(1, 0x180)) for _ in range(40))


async def test_garbage_on_every_wire_channel_costs_nobody_a_message(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await member(layer, "room")
    pid = listening_pid(layer)
    wires = sorted(port_of(layer).hub.heard)
    assert len(wires) >= 3
    payloads = list(garbage(layer, channel, random.Random(7)))
    sent = []
    for number, payload in enumerate(payloads):
        for wire in wires:
            await raw.execute("SELECT pg_notify(%s, %s)", [wire, payload])
        sent.append({"type": "x", "n": number})
        await other.group_send("room", sent[-1])
    assert [await take(layer, channel) for _ in sent] == sent
    await fence(layer, channel, other)
    assert layer.stats["broken"] >= len(payloads)
    assert listening_pid(layer) == pid, "and nobody had to connect again"


async def test_references_to_rows_that_are_not_there_hold_nothing_up(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, other = make_layer(), make_layer()
    channel = await member(layer, "room")
    codec = Codec()
    [wire] = [wire for wire in port_of(layer).hub.heard if wire == port_of(layer).shard("room")]
    sent: list[Message] = []
    for number in range(20):
        entry = codec.entry(GROUP, "room", 10**12 + number)
        await raw.execute(
            "SELECT pg_notify(%s, %s)", [wire, codec.frames([entry], utf8=True)[0].decode()]
        )
        sent.append({"type": "x", "n": number, "body": "y" * (number % 3 * 10_000)})
        await other.group_send("room", sent[-1])
    assert [await take(layer, channel) for _ in sent] == sent
    await fence(layer, channel, other)
    assert layer.stats["broken"] == 20


async def test_a_row_of_another_layer_cannot_be_fetched_by_reference(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, secret = make_layer(), make_layer(prefix=f"secret-{secrets.token_hex(4)}")
    channel = await member(layer, "room")
    await secret.send("theirs", {"type": "secret"})
    [[number]] = await (await raw.execute("SELECT id FROM pgnotify_layer_message")).fetchall()
    codec = Codec()
    payload = codec.frames([codec.entry(GROUP, "room", number)], utf8=True)[0].decode()
    await raw.execute("SELECT pg_notify(%s, %s)", [port_of(layer).shard("room"), payload])
    await fence(layer, channel)
    assert layer.stats["broken"] == 1


def nested(depth: int) -> Message:
    message: Message = {"type": "x"}
    for _ in range(depth):
        message = {"type": "x", "inner": message}
    return message


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "x", "value": 2**64},
        {"type": "x", "value": -(2**63) - 1},
        {"type": "x", "value": "\ud800"},
        {"type": "x", "\ud800": 1},
        {"type": "x", "value": {1, 2}},
        {"type": "x", "value": 1j},
        nested(2000),
    ],
    ids=["large", "small", "surrogate", "surrogate key", "set", "complex", "deep"],
)
async def test_what_cannot_be_packed_fails_its_own_call_and_nobody_else_s(
    layer: PostgresChannelLayer, bad: Message
) -> None:
    channel = await member(layer, "room")
    other = asyncio.create_task(layer.group_send("room", {"type": "good"}), name="good")
    for call in (layer.send(channel, bad), layer.group_send("room", bad), layer.send("w", bad)):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            await call
    await other
    assert await take(layer, channel) == {"type": "good"}
    await fence(layer, channel)


async def test_what_can_be_packed_can_be_unpacked(layer: PostgresChannelLayer) -> None:
    """Or a sender could end every consumer of a group."""
    channel = await member(layer, "room")
    deepest = 0
    for depth in (10, 100, 250, 500, 505, 508, 509, 510, 511, 512, 1000):
        try:
            await layer.group_send("room", nested(depth))
        except ValueError:
            break
        deepest = depth
        message = await take(layer, channel)
        for _ in range(depth):  # == would need a deeper stack than some have
            message = message["inner"]
        assert message == {"type": "x"}
    assert deepest >= 250
    await fence(layer, channel)


@pytest.mark.parametrize("message", [{"type": "x", "n": 1}, {"type": "x", "rows": [[1]]}])
async def test_members_share_nothing_that_they_could_change(
    layer: PostgresChannelLayer, message: Message
) -> None:
    channels = [await member(layer, "room") for _ in range(3)]
    await layer.group_send("room", message)
    received = [await take(layer, channel) for channel in channels]
    for each in received:
        assert each == message
        each["changed"] = True
        for value in each.values():
            if isinstance(value, list):
                value[0].append(2)
                value.append(3)
    assert message in ({"type": "x", "n": 1}, {"type": "x", "rows": [[1]]})


# -- edges -----------------------------------------------------------------------------------------


async def test_prefixes_that_begin_alike_are_different_layers(make_layer: MakeLayer) -> None:
    """Wire channels are made of the prefix and more: one's whole must not be another's part."""
    base = f"alike-{secrets.token_hex(4)}"
    first = make_layer(prefix=base)
    token = (await first.new_channel()).partition("!")[0][-16:]
    others = [
        make_layer(prefix=f"{base}{end}")
        for end in ("", *(f".{number}" for number in range(8)), f".{token}", ".", ".0.0")
    ][1:]
    everybody = [first, *others]
    names = [f"room.{number}" for number in range(16)]  # of all shards
    channels = [await member(each, *names) for each in everybody]
    for number, each in enumerate(everybody):
        for name in names:
            await each.group_send(name, {"type": "x", "from": number})
    for number, (each, channel) in enumerate(zip(everybody, channels, strict=True)):
        heard = [(await take(each, channel))["from"] for _ in names]
        assert heard == [number] * len(names), each.prefix
        await fence(each, channel)
    # And a flush empties one of them.
    await others[0].flush()
    for each, channel in zip(everybody, channels, strict=True):
        if each is not others[0]:
            await each.group_send("room.0", {"type": "still.there"})
            assert await take(each, channel) == {"type": "still.there"}


async def test_flushes_at_once_leave_a_layer_that_works(make_layer: MakeLayer) -> None:
    layers = [make_layer() for _ in range(3)]
    channels = [await member(each, "room") for each in layers]
    sends = [each.group_send("room", {"type": "x"}) for each in layers for _ in range(20)]
    rows = [each.send("workers", {"type": "x"}) for each in layers for _ in range(5)]
    await asyncio.gather(*sends, *(each.flush() for each in layers), *rows)
    await layers[0].flush()
    for each, channel in zip(layers, channels, strict=True):
        await each.group_add("room", channel)
    await layers[0].group_send("room", {"type": "first"})
    for each, channel in zip(layers, channels, strict=True):
        assert await take(each, channel) == {"type": "first"}
    await layers[1].send("workers", {"type": "first"})
    assert await take(layers[2], "workers") == {"type": "first"}


@pytest.mark.parametrize("name", ["process-local", "normal"])
async def test_a_capacity_of_one_is_one(make_layer: MakeLayer, name: str) -> None:
    layer = make_layer(capacity=1)
    channel = "workers" if name == "normal" else await layer.new_channel()
    for n in range(5):
        await layer.send(channel, {"type": "x", "n": n})
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"type": "too.much"})
        assert await take(layer, channel) == {"type": "x", "n": n}


async def test_a_reader_that_waits_makes_no_more_room_than_its_channel_has(
    make_layer: MakeLayer,
) -> None:
    """Two are sent before the reader has run at all."""
    layer = make_layer(capacity=1)
    channel = await layer.new_channel()
    reading = asyncio.create_task(take(layer, channel), name="reading")
    await asyncio.sleep(0)
    await layer.send(channel, {"type": "x", "n": 0})
    full = False
    try:
        await layer.send(channel, {"type": "x", "n": 1})
    except ChannelFull:
        full = True
    assert await reading == {"type": "x", "n": 0}
    if not full:
        assert await take(layer, channel) == {"type": "x", "n": 1}
    await layer.send(channel, {"type": "x", "n": 2})
    assert await take(layer, channel) == {"type": "x", "n": 2}
