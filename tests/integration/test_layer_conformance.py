"""The published Channels layer specification, asked of our layer and of three others alike.

https://channels.readthedocs.io/en/stable/channel_layer_spec.html, section by section. Where a peer
does not do what it says, the test names it with the reason. Left out are what Channels itself
has dropped: single-reader names with a question mark, and ``receive()`` of several channels. And
the capacity "on the non-local part" of process-local channels is asked for only in so far as a
channel that is full does not block its sender.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull, MessageTooLarge

from tests.integration.layer_backends import (
    DEADLINE_OF_THE_LATE,
    OURS,
    Backend,
    Message,
    backend,
    expected_to_fail,
    falls_short,
    may_fall_short,
    parameters,
)
from tests.integration.test_layer import stop_layers
from tests.redis_server import MISSING, available, redis_server

NO_CHECKS = "it checks no names"
NO_CAPACITY = "its channels have no capacity"
NO_EXPIRY = "nothing of it expires"
TAKES_BACK = "a reader takes back what another is about to be done with: some arrive twice"
FULL_NAME = "it receives by the full name only"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", parameters(metafunc.function))


@pytest.fixture(scope="module")
def redis_url() -> Iterator[Callable[[], str]]:
    """Starts a redis-server when first called."""
    with ExitStack() as stack:
        started: list[str] = []

        def url() -> str:
            if not available():
                pytest.skip(MISSING)
            if not started:
                started.append(stack.enter_context(redis_server()))
            return started[0]

        yield url


@pytest.fixture
async def place(
    kind: str, redis_url: Callable[[], str], request: pytest.FixtureRequest
) -> AsyncIterator[Backend]:
    async with backend(kind, redis_url) as made:
        if kind in expected_to_fail(request.function):
            made.deadline = DEADLINE_OF_THE_LATE
        yield made
    if kind == OURS:
        await asyncio.to_thread(stop_layers)


@pytest.fixture
def layer(place: Backend) -> Any:
    return place.layer()


# -- messages --------------------------------------------------------------------------------------

SURVIVE: dict[str, Any] = {
    "every byte": bytes(range(256)),
    "no bytes": b"",
    "unicode": "naïve — 東京 🙂 ￿ \x00 '\"\\ {} %s\r\n",
    "no text": "",
    "integers of 64 bits": [0, -1, 2**31, 2**63 - 1, -(2**63)],
    "doubles": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3],
    "lists": [[], [1, [2, [3, []]]]],
    "dicts": {"": {}, "a": {"b": {"c": [{"d": None}]}}},
    "booleans": [True, False],
    "nothing": None,
}


@pytest.mark.parametrize("value", SURVIVE.values(), ids=SURVIVE)
async def test_what_a_message_may_hold_survives(place: Backend, layer: Any, value: Any) -> None:
    channel = await place.member(layer, "room")
    message = {"type": "test.message", "value": value}
    await layer.send(channel, message)
    received = await place.take(layer, channel)
    await place.layer().group_send("room", message)
    assert received == await place.take(layer, channel) == message
    # What is equal in Python need not be the same: True is 1, -0.0 is 0.0.
    assert repr(received["value"]) == repr(value)


@falls_short(memory="it hands tuples on as they are")
async def test_tuples_arrive_as_lists(place: Backend, layer: Any) -> None:
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "test.message", "pair": (1, ("a", b"b"))})
    assert await place.take(layer, channel) == {"type": "test.message", "pair": [1, ["a", b"b"]]}


@falls_short(core="members in one process get one object")
async def test_a_message_is_one_s_own(place: Backend, layer: Any) -> None:
    """Neither the sender nor another member of the group changes what one has received."""
    one, two = await place.member(layer, "room"), await place.member(layer, "room")
    sent: Message = {"type": "test.message", "rows": [1]}
    await layer.group_send("room", sent)
    sent["rows"].append(2)
    first = await place.take(layer, one)
    first["rows"].append(3)
    assert (await place.take(layer, two))["rows"] == [1]


@pytest.mark.parametrize("bad", [None, "text", ["list"], 7, b"bytes"], ids=repr)
@falls_short(pubsub="it sends anything")
async def test_a_message_that_is_no_dict_is_refused(place: Backend, layer: Any, bad: Any) -> None:
    channel = await place.member(layer, "room")
    refusals = (TypeError, AssertionError, AttributeError)
    with pytest.raises(refusals):
        await layer.send(channel, bad)
    with pytest.raises(refusals):
        await layer.group_send("room", bad)


@pytest.mark.parametrize("text", ["x", "é"], ids=["ASCII", "other letters"])
async def test_a_megabyte_of_json_is_not_too_large(place: Backend, layer: Any, text: str) -> None:
    channel = await place.member(layer, "room")
    empty = len(json.dumps({"type": "test.message", "body": ""}, ensure_ascii=False))
    body = text * ((2**20 - empty) // len(text.encode()))
    message = {"type": "test.message", "body": body}
    assert 2**20 - 1 <= len(json.dumps(message, ensure_ascii=False).encode()) <= 2**20
    await layer.send(channel, message)
    assert await place.take(layer, channel) == message
    await place.layer().group_send("room", message)
    assert await place.take(layer, channel) == message
    await place.layer().send("workers", message)
    await layer.send(channel, {"type": "still.there"})
    assert await place.take(layer, channel) == {"type": "still.there"}


# -- names -----------------------------------------------------------------------------------------

ALL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"


async def test_names_have_letters_digits_periods_hyphens_and_underscores(
    place: Backend, layer: Any
) -> None:
    for name in (ALL, ".", "-", "_", "0", "None"):
        channel = await place.member(layer, name)
        await layer.group_send(name, {"type": "to.group"})
        assert await place.take(layer, channel) == {"type": "to.group"}
        await layer.group_discard(name, channel)


@falls_short(memory="99 characters are its most", core="99 characters are its most")
async def test_a_name_may_have_a_hundred_bytes(place: Backend, layer: Any) -> None:
    name = "x" * 100
    channel = await place.member(layer, name)
    await layer.group_send(name, {"type": "to.group"})
    assert await place.take(layer, channel) == {"type": "to.group"}
    receiving = asyncio.create_task(place.take(layer, name))
    await place.layer().send(name, {"type": "to.channel"})
    assert await receiving == {"type": "to.channel"}


INVALID = ["", " ", "a b", "a/b", "a?b", "naïve", "x" * 1000, "a!b!c", "!", 7, None, b"bytes"]


@pytest.mark.parametrize("name", INVALID, ids=lambda name: repr(name)[:12])
@falls_short(pubsub=NO_CHECKS)
async def test_an_invalid_channel_name_is_a_type_error_everywhere(
    place: Backend, layer: Any, name: Any
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: layer.send(name, {"type": "x"}),
        lambda: place.take(layer, name),
        lambda: layer.group_add("room", name),
        lambda: layer.group_discard("room", name),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            await call()


@pytest.mark.parametrize("name", [*INVALID, "a!b"], ids=lambda name: repr(name)[:12])
@falls_short(pubsub=NO_CHECKS)
async def test_an_invalid_group_name_is_a_type_error_everywhere(
    place: Backend, layer: Any, name: Any
) -> None:
    channel = await layer.new_channel()
    calls: list[Callable[[], Any]] = [
        lambda: layer.group_add(name, channel),
        lambda: layer.group_discard(name, channel),
        lambda: layer.group_send(name, {"type": "x"}),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            await call()


@pytest.mark.parametrize("name", ["room\n", "specific.x!é"], ids=["a line's end", "not ASCII"])
@falls_short(
    memory="Channels' patterns let it through",
    core="Channels' patterns let it through",
    pubsub=NO_CHECKS,
)
async def test_a_name_that_looks_valid_at_its_beginning_is_refused(layer: Any, name: str) -> None:
    with pytest.raises(TypeError):
        await layer.send(name, {"type": "x"})


# -- channels --------------------------------------------------------------------------------------


@falls_short(pubsub="its names have no exclamation mark")
async def test_a_new_channel_is_specific_to_its_process(place: Backend, layer: Any) -> None:
    names = {await each.new_channel() for each in (layer, place.layer()) for _ in range(50)}
    assert len(names) == 100
    for name in names:
        assert re.fullmatch(r"[a-zA-Z0-9._-]+![a-zA-Z0-9._-]+", name)
        assert len(name) <= 100


async def test_a_channel_is_first_in_first_out(place: Backend) -> None:
    layer = place.layer(capacity=1000)
    channel = await layer.new_channel()
    sent = [{"type": "test.message", "n": n} for n in range(200)]
    for message in sent:
        await layer.send(channel, message)
    assert await place.take_all(layer, channel, 200) == sent


async def test_a_channel_of_another_process_is_sent_to_in_order(place: Backend) -> None:
    layer, other = place.layer(capacity=1000), place.layer(capacity=1000)
    channel = await layer.new_channel()
    sent = [{"type": "test.message", "n": n} for n in range(100)]
    for message in sent:
        await other.send(channel, message)
    assert await place.take_all(layer, channel, 100) == sent


async def test_channels_do_not_receive_each_other_s_messages(place: Backend, layer: Any) -> None:
    one, two = await layer.new_channel(), await layer.new_channel()
    await layer.send(two, {"type": "for.two"})
    await layer.send(one, {"type": "for.one"})
    assert await place.take(layer, one) == {"type": "for.one"}
    assert await place.take(layer, two) == {"type": "for.two"}


async def test_who_receives_first_gets_what_is_sent_later(place: Backend, layer: Any) -> None:
    channel = await layer.new_channel()
    receiving = asyncio.create_task(place.take(layer, channel))
    await asyncio.sleep(0)
    await layer.send(channel, {"type": "later"})
    assert await receiving == {"type": "later"}


async def test_each_message_of_a_channel_goes_to_one_of_its_readers(place: Backend) -> None:
    layer = place.layer(capacity=1000)
    channel = await layer.new_channel()
    await each_goes_to_one(place, layer, [layer, layer, layer], channel)


@falls_short(pubsub="every process that reads a channel gets a copy")
@may_fall_short(core=TAKES_BACK)
async def test_each_message_of_a_normal_channel_goes_to_one_reader_of_any_process(
    place: Backend,
) -> None:
    layers = [place.layer(capacity=1000) for _ in range(3)]
    await each_goes_to_one(place, layers[0], [*layers, *layers], "workers")


async def each_goes_to_one(place: Backend, sender: Any, readers: list[Any], channel: str) -> None:
    """100 messages; then a stop for each reader, which ends with it."""
    got: Counter[int] = Counter()

    async def read(layer: Any) -> None:
        while (message := await place.take(layer, channel))["type"] != "stop":
            got[message["n"]] += 1

    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(read(reader))
        await asyncio.sleep(0)
        for n in range(100):
            await sender.send(channel, {"type": "work", "n": n})
        for _ in readers:
            await sender.send(channel, {"type": "stop"})
    assert got == Counter(range(100))


@falls_short(pubsub="what nobody reads is lost")
@may_fall_short(core=TAKES_BACK)
async def test_a_normal_channel_keeps_its_messages_until_somebody_reads(place: Backend) -> None:
    sender, reader = place.layer(capacity=1000), place.layer(capacity=1000)
    sent = [{"type": "work", "n": n, "body": b"\x00\xff"} for n in range(20)]
    for message in sent:
        await sender.send("workers", message)
    received = await place.take_all(reader, "workers", 10)
    received += await place.take_all(sender, "workers", 10)
    assert received == sent


@falls_short(memory="it is one process", pubsub="what nobody reads is lost")
async def test_a_normal_channel_outlives_the_process_that_sent(place: Backend) -> None:
    sender = place.new()
    await sender.send("workers", {"type": "work"})
    await place.close(sender)
    assert await place.take(place.layer(), "workers") == {"type": "work"}


@pytest.mark.parametrize("name", ["normal", "specific"])
@falls_short(pubsub="a receive() that is cancelled ends the channel")
async def test_a_reader_that_gives_up_takes_nothing_with_it(
    place: Backend, layer: Any, name: str
) -> None:
    channel = "workers" if name == "normal" else await layer.new_channel()
    for n in range(5):
        leaving = asyncio.create_task(layer.receive(channel))
        for _ in range(n):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await layer.send(channel, {"type": "work", "n": n})
        assert await place.take(layer, channel) == {"type": "work", "n": n}


@falls_short(memory=FULL_NAME, core=FULL_NAME, pubsub="its names have no exclamation mark")
async def test_a_process_can_receive_for_all_of_its_channels_at_once(
    place: Backend, layer: Any
) -> None:
    one, two = await layer.new_channel(), await layer.new_channel()
    prefix = one[: one.index("!") + 1]
    assert two.startswith(prefix)
    sent = [{"type": "test.message", "n": n} for n in range(6)]
    for message, channel in zip(sent, (one, two) * 3, strict=True):
        await place.layer().send(channel, message)
    assert await place.take_all(layer, prefix, 6) == sent


async def test_a_busy_channel_does_not_starve_a_quiet_one(place: Backend) -> None:
    layer = place.layer(capacity=2000)
    busy, quiet = await place.member(layer, "busy"), await place.member(layer, "quiet")
    for n in range(500):
        await layer.group_send("busy", {"type": "busy", "n": n})
    await layer.group_send("quiet", {"type": "quiet"})
    assert await place.take(layer, quiet) == {"type": "quiet"}
    assert [each["n"] for each in await place.take_all(layer, busy, 500)] == list(range(500))


# -- expiry ----------------------------------------------------------------------------------------


@falls_short(pubsub=NO_EXPIRY)
async def test_what_nobody_reads_in_time_is_dropped(place: Backend) -> None:
    layer = place.layer(expiry=place.short)
    channel = await layer.new_channel()
    for name in (channel, "workers"):
        await layer.send(name, {"type": "early"})
    await asyncio.sleep(place.past)  # it is the time itself that has to pass
    for name in (channel, "workers"):
        await layer.send(name, {"type": "late"})
        assert await place.take(layer, name) == {"type": "late"}


@falls_short(pubsub=NO_EXPIRY)
async def test_a_membership_ends_after_group_expiry(place: Backend) -> None:
    layer = place.layer(group_expiry=place.short)
    channel = await place.member(layer, "room")
    await asyncio.sleep(place.past)
    await layer.group_send("room", {"type": "late"})
    # A membership that is renewed counts anew.
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "renewed"})
    assert await place.take(layer, channel) == {"type": "renewed"}


@falls_short(pubsub="it has no such attribute")
def test_group_expiry_is_a_day_unless_said_otherwise(layer: Any, place: Backend) -> None:
    async def look() -> tuple[int, int]:
        return layer.group_expiry, place.layer(group_expiry=7).group_expiry

    assert asyncio.run(look()) == (86_400, 7)


# -- capacity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "specific"])
@falls_short(pubsub=NO_CAPACITY)
async def test_a_channel_at_its_capacity_is_full_for_whoever_sends(
    place: Backend, name: str
) -> None:
    layer = place.layer(capacity=3)
    channel = "workers" if name == "normal" else await layer.new_channel()
    for n in range(3):
        await layer.send(channel, {"type": "x", "n": n})
    for _ in range(3):
        with pytest.raises(ChannelFull):
            async with asyncio.timeout(place.deadline):  # it must not wait for room
                await layer.send(channel, {"type": "too.much"})
    assert (await place.take(layer, channel))["n"] == 0
    if name == "normal":  # there is room again
        await layer.send(channel, {"type": "x", "n": 3})
    left = 3 if name == "normal" else 2
    assert [each["n"] for each in await place.take_all(layer, channel, left)] == [1, 2, 3][:left]


@falls_short(memory="it does not compile the patterns", pubsub=NO_CAPACITY)
async def test_capacities_go_by_the_names_of_channels(place: Backend) -> None:
    layer = place.layer(
        capacity=4, channel_capacity={"mail.*": 1, re.compile(r"^video\.[0-9]+$"): 2}
    )
    for channel, capacity in (("mail.out", 1), ("video.7", 2), ("video.x", 4)):
        for _ in range(capacity):
            await layer.send(channel, {"type": "x"})
        with pytest.raises(ChannelFull):
            await layer.send(channel, {"type": "x"})


@falls_short(pubsub=NO_CAPACITY)
async def test_a_group_is_never_full_and_drops_what_does_not_fit(place: Backend) -> None:
    slow, quick = place.layer(capacity=5), place.layer(capacity=5)
    full, roomy = await place.member(slow, "room"), await place.member(quick, "room")
    sent = [{"type": "x", "n": n} for n in range(12)]
    for message in sent:
        await quick.group_send("room", message)
        assert await place.take(quick, roomy) == message, "others miss nothing"
    assert await place.take_all(slow, full, 5) == sent[:5], "the oldest, in order"
    await quick.group_discard("room", roomy)
    await quick.group_send("room", {"type": "last"})
    assert await place.take(slow, full) == {"type": "last"}


@falls_short(pubsub="normal channels cannot join groups")
async def test_a_full_normal_channel_in_a_group_is_no_error_either(place: Backend) -> None:
    layer = place.layer(capacity=2)
    channel = await place.member(layer, "room")
    await layer.group_add("room", "workers")
    for n in range(4):
        await layer.group_send("room", {"type": "x", "n": n})
        assert (await place.take(layer, channel))["n"] == n
    assert [each["n"] for each in await place.take_all(layer, "workers", 2)] == [0, 1]


# -- groups ----------------------------------------------------------------------------------------


async def test_a_group_message_reaches_each_member_once_and_nobody_else(place: Backend) -> None:
    one, two = place.layer(), place.layer()
    members = [(each, await place.member(each, "room")) for each in (one, one, two, two)]
    both = await place.member(one, "room", "lobby")
    outside = await place.member(two, "lobby")
    for sender in (one, two, place.layer()):
        await sender.group_send("room", {"type": "hello"})
        for layer, channel in [*members, (one, both)]:
            assert await place.take(layer, channel) == {"type": "hello"}
            await place.nothing_for(layer, channel, sender)
        await place.nothing_for(two, outside, sender)


async def test_group_messages_of_one_sender_arrive_in_order(place: Backend) -> None:
    layer, other = place.layer(capacity=1000), place.layer(capacity=1000)
    channels = [await place.member(layer, "room") for _ in range(3)]
    sent = [{"type": "x", "n": n, "body": "y" * (n % 5 * 5000)} for n in range(60)]
    for message in sent:
        await other.group_send("room", message)
    for channel in channels:
        assert await place.take_all(layer, channel, 60) == sent


@may_fall_short(pubsub="to join does not wait until the server has it")
async def test_who_has_joined_misses_nothing_and_who_has_left_hears_nothing(
    place: Backend,
) -> None:
    layer, other = place.layer(), place.layer()
    channel = await layer.new_channel()
    for n in range(30):
        await layer.group_add("room", channel)
        await other.group_send("room", {"type": "x", "n": n})
        assert await place.take(layer, channel) == {"type": "x", "n": n}
        await layer.group_discard("room", channel)
        await other.group_send("room", {"type": "missed", "n": n})
    await place.nothing_for(layer, channel, other)


async def test_to_join_twice_is_to_be_a_member_once(place: Backend, layer: Any) -> None:
    channel = await place.member(layer, "room", "room")
    await layer.group_send("room", {"type": "hello"})
    assert await place.take(layer, channel) == {"type": "hello"}
    await place.nothing_for(layer, channel, layer)
    await layer.group_discard("room", channel)
    await layer.group_send("room", {"type": "hello"})
    await place.nothing_for(layer, channel, layer)


async def test_to_leave_what_one_is_not_in_is_no_error(place: Backend, layer: Any) -> None:
    channel = await place.member(layer, "lobby")
    await layer.group_discard("room", channel)
    await layer.group_discard("room", channel)
    await layer.group_send("lobby", {"type": "hello"})
    assert await place.take(layer, channel) == {"type": "hello"}


async def test_a_group_without_members_can_be_sent_to(place: Backend, layer: Any) -> None:
    await layer.group_send("nobody", {"type": "x"})
    channel = await place.member(layer, "nobody")
    await place.nothing_for(layer, channel, layer)


@falls_short(pubsub="only the process of a channel can have it join")
async def test_a_channel_can_be_added_and_discarded_by_another_process(place: Backend) -> None:
    owner, other = place.layer(), place.layer()
    channel = await owner.new_channel()
    receiving = asyncio.create_task(place.take(owner, channel))
    await other.group_add("room", channel)
    await other.group_send("room", {"type": "hello"})
    assert await receiving == {"type": "hello"}
    await other.group_discard("room", channel)
    await other.group_send("room", {"type": "missed"})
    await place.nothing_for(owner, channel, other)


@falls_short(pubsub="normal channels cannot join groups")
async def test_a_normal_channel_can_be_in_a_group(place: Backend) -> None:
    one, two = place.layer(), place.layer()
    await one.group_add("room", "workers")
    for n in range(5):
        await two.group_send("room", {"type": "work", "n": n})
    received = await place.take_all(two, "workers", 5)
    assert [each["n"] for each in received] == list(range(5))
    await two.group_discard("room", "workers")
    await one.group_send("room", {"type": "missed"})
    await one.send("workers", {"type": "direct"})
    assert await place.take(two, "workers") == {"type": "direct"}


@falls_short(pubsub="two of one prefix are meant, but channel names are sent without it")
async def test_layers_of_different_prefixes_share_nothing(place: Backend) -> None:
    one, two = place.layer(prefix="one"), place.layer(prefix="two", capacity=99)
    mine, theirs = await place.member(one, "room"), await place.member(two, "room")
    await two.group_send("room", {"type": "two"})
    await one.group_send("room", {"type": "one"})
    assert await place.take(one, mine) == {"type": "one"}
    assert await place.take(two, theirs) == {"type": "two"}
    await two.send("workers", {"type": "two"})
    await one.send("workers", {"type": "one"})
    assert await place.take(one, "workers") == {"type": "one"}
    assert await place.take(two, "workers") == {"type": "two"}


# -- flush -----------------------------------------------------------------------------------------


@falls_short(pubsub="it forgets what is its own, and ends what waits for it")
async def test_after_flush_there_are_no_messages_and_no_groups(place: Backend) -> None:
    one, two = place.layer(), place.layer()
    here, there = await place.member(one, "room"), await place.member(two, "room")
    await one.group_send("room", {"type": "before"})
    for layer, channel in ((one, here), (two, there)):
        assert await place.take(layer, channel) == {"type": "before"}
    await one.send(here, {"type": "before"})
    for n in range(3):
        await two.send("workers", {"type": "before", "n": n})
    await one.flush()
    await one.group_send("room", {"type": "to.nobody"})
    for layer, channel in ((one, here), (two, there), (one, "workers"), (two, "workers")):
        await one.send(channel, {"type": "after"})
        assert await place.take(layer, channel) == {"type": "after"}
    await two.group_add("room", there)
    await one.group_send("room", {"type": "again"})
    assert await place.take(two, there) == {"type": "again"}


# -- the object ------------------------------------------------------------------------------------


async def test_it_says_what_it_can_do(layer: Any) -> None:
    assert set(layer.extensions) >= {"groups", "flush"}
    assert isinstance(layer.extensions, list)


@falls_short(
    memory="neither is an attribute", core="neither is an attribute", pubsub="neither is one"
)
async def test_its_exceptions_are_attributes(layer: Any) -> None:
    assert layer.ChannelFull is ChannelFull
    assert layer.MessageTooLarge is MessageTooLarge


async def test_its_methods_are_coroutine_functions_with_positional_arguments(layer: Any) -> None:
    names = ("send", "receive", "new_channel", "flush", "group_add", "group_discard", "group_send")
    for name, count in zip(names, (2, 1, 0, 0, 2, 2, 2), strict=True):
        method = getattr(layer, name)
        assert inspect.iscoroutinefunction(method), name
        inspect.signature(method).bind(*[None] * count)


@may_fall_short(memory="its queues are for one thread")
async def test_sync_code_sends_through_async_to_sync(place: Backend) -> None:
    """A loop for each call, in another thread, while we receive on ours."""
    layer = place.layer()
    channel = await place.member(layer, "room")

    def send() -> None:
        for n in range(5):
            async_to_sync(layer.group_send)("room", {"type": "x", "n": n})

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    received = await place.take_all(layer, channel, 10)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert sorted(each["n"] for each in received) == sorted([*range(5)] * 2)
