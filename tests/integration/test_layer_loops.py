"""Event loops that come and go: whom a channel belongs to, and what is left of a loop that ends."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections

from django_pgnotify.exceptions import PgNotifyError, PublishError
from django_pgnotify.layers import PostgresChannelLayer, hub, loops
from django_pgnotify.layers.feed import DirectFeed
from tests.integration.test_layer import (
    DEADLINE,
    established_again,
    fence,
    listening_pid,
    member,
    passed,
    port_of,
    stop_layers,
    take,
)
from tests.proxy import TCPProxy
from tests.settings import database_url

pytestmark = pytest.mark.django_db

MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix no other test uses."""
    prefix = f"loops-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


@pytest.fixture
def layer(make_layer: MakeLayer) -> PostgresChannelLayer:
    return make_layer()


@pytest.fixture
def raw(django_db_setup: None) -> Iterator[psycopg.Connection[Any]]:
    """A connection that knows nothing of layers."""
    url = database_url(connections["default"].settings_dict)
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def connected(raw: psycopg.Connection[Any]) -> int:
    """Connections of layers to the test database."""
    query = (
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and application_name in ('pglisten', 'pgnotify-layer')"
    )
    [[count]] = raw.execute(query).fetchall()
    return int(count)


def all_gone(raw: psycopg.Connection[Any]) -> None:
    """Wait for the server to notice; fails where a connection is still open."""
    gc.collect()
    for _ in range(600):
        if connected(raw) == 0:
            return
        raw.execute("select pg_sleep(0.05)")
    pytest.fail("connections of layers are left open")


async def use(layer: PostgresChannelLayer, large: bool = True) -> None:
    channel = await member(layer, "room")
    for size in (10, 20_000) if large else (10,):
        await layer.group_send("room", {"type": "x", "body": "x" * size})
        assert len((await take(layer, channel))["body"]) == size


# -- the end of a loop -------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_loop_that_asyncio_run_ends_leaves_nothing(
    layer: PostgresChannelLayer, raw: psycopg.Connection[Any]
) -> None:
    for _ in range(3):
        asyncio.run(use(layer))
        all_gone(raw)
    assert not loops._hubs
    assert not layer._ports
    assert not layer._owners


@pytest.mark.django_db(transaction=True)
def test_a_loop_that_is_just_closed_leaves_nothing(
    make_layer: MakeLayer, raw: psycopg.Connection[Any]
) -> None:
    """Nobody cancels its tasks; closing it is all there is."""
    layers = [make_layer(), make_layer(prefix=f"other-{secrets.token_hex(4)}")]
    for what in (use, lambda layer: layer.group_send("room", {"type": "x"})):
        loop = asyncio.new_event_loop()
        for layer in layers:
            loop.run_until_complete(what(layer))
        loop.close()
        loop.close()  # again is no error
        all_gone(raw)
        assert not any(layer._ports for layer in layers)


def test_a_loop_that_ends_in_another_thread_leaves_nothing(
    layer: PostgresChannelLayer, raw: psycopg.Connection[Any]
) -> None:
    threads = [
        threading.Thread(target=lambda: asyncio.run(use(layer, large=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * DEADLINE)
    all_gone(raw)


def test_a_loop_that_ends_with_messages_under_way_is_quiet(
    layer: PostgresChannelLayer, raw: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        await use(layer, large=False)
        for number in range(50):
            task = asyncio.ensure_future(layer.group_send("room", {"type": "x", "n": number}))
            tasks.append(task)
        await asyncio.sleep(0)

    tasks: list[asyncio.Future[None]] = []
    asyncio.run(main())
    assert all(task.done() for task in tasks)
    all_gone(raw)


def test_a_channel_of_a_loop_that_has_ended_is_an_error_to_receive_from(
    layer: PostgresChannelLayer,
) -> None:
    channel = asyncio.run(layer.new_channel())
    with pytest.raises(PgNotifyError, match="has ended"):
        asyncio.run(layer.receive(channel))


async def test_a_loop_that_stands_still_is_an_error_to_receive_from(
    layer: PostgresChannelLayer,
) -> None:
    other = asyncio.new_event_loop()
    channel = await asyncio.to_thread(other.run_until_complete, layer.new_channel())
    with pytest.raises(PublishError, match="does not run"):
        await layer.receive(channel)
    await asyncio.to_thread(other.close)


async def test_the_layer_hears_again_though_somebody_cancelled_all_tasks(
    layer: PostgresChannelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_REVIVAL_BASE", 0.01)
    channel = await member(layer, "room")
    waiting = asyncio.create_task(layer.receive(channel), name="waits")
    await asyncio.sleep(0)
    with established_again() as again:
        for task in asyncio.all_tasks():
            if task.get_name() == "pgnotify-layer-listener":
                task.cancel()
        await again()
    assert layer.stats["gaps"] == 1
    await asyncio.to_thread(async_to_sync(layer.group_send), "room", {"type": "hello"})
    async with asyncio.timeout(DEADLINE):
        assert await waiting == {"type": "hello"}


def test_layers_are_made_in_one_thread_while_loops_end_in_another(make_layer: MakeLayer) -> None:
    done = threading.Event()
    made: list[PostgresChannelLayer] = []

    def make() -> None:
        try:
            made.extend(make_layer() for _ in range(300))
        finally:
            done.set()

    loop = asyncio.new_event_loop()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as threads:
            making = threads.submit(make)
            while not done.is_set():
                for callback in loops.on_loop_closed:
                    callback(loop)
            making.result()
    finally:
        sys.setswitchinterval(interval)
        loop.close()


def slowly(reset: Callable[[], None]) -> tuple[Callable[[], None], list[int]]:
    """A reset that waits for a second one to begin, and one entry for each that has begun."""
    both, begun = threading.Event(), list[int]()

    def reset_slowly() -> None:
        begun.append(1)
        if len(begun) > 1:
            both.set()
        both.wait(0.1)
        reset()

    return reset_slowly, begun


def test_two_threads_of_a_forked_child_begin_anew_once(
    layer: PostgresChannelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second one forgets whom the first one's channels belong to."""
    reset_slowly, begun = slowly(layer._reset)
    monkeypatch.setattr(layer, "_reset", reset_slowly)
    monkeypatch.setattr(loops, "generation", loops.generation + 1)
    with ThreadPoolExecutor(2) as threads:
        channels = list(threads.map(asyncio.run, [port_name(layer), port_name(layer)]))
    assert len(set(channels)) == 2
    assert len(begun) == 1


def test_two_threads_of_a_forked_child_begin_to_hear_what_is_forwarded_once(
    layer: PostgresChannelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both subscribe, and members are told twice."""
    feed = layer.feed
    assert isinstance(feed, DirectFeed)
    reset_slowly, begun = slowly(feed._reset)
    monkeypatch.setattr(feed, "_reset", reset_slowly)
    feed._pid = 0  # of another process
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(asyncio.run, [feed.listening(), feed.listening()]))
    assert len(begun) == 1


async def port_name(layer: PostgresChannelLayer) -> str:
    port = layer._port()
    assert port is not None
    return port.new_channel("specific.")


# -- loops that pass ---------------------------------------------------------------------------


def test_calls_from_synchronous_code_share_one_connection(
    layer: PostgresChannelLayer, raw: psycopg.Connection[Any]
) -> None:
    before = connected(raw)
    for number in range(20):
        async_to_sync(layer.group_send)("room", {"type": "x", "n": number})
    assert connected(raw) - before == 1
    assert threading.active_count() < 20
    stop_layers()
    all_gone(raw)


def test_synchronous_code_works_again_after_the_thread_was_stopped(
    layer: PostgresChannelLayer,
) -> None:
    for _ in range(3):
        channel = async_to_sync(member)(layer, "room")
        async_to_sync(layer.group_send)("room", {"type": "x"})
        assert async_to_sync(take)(layer, channel) == {"type": "x"}
        stop_layers()


def test_the_loop_of_passing_ones_runs_before_anybody_is_sent_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where its thread is slow to begin, the first call was refused."""
    stop_layers()
    returned = threading.Event()
    run = loops.Home._run

    def run_late(home: loops.Home) -> None:
        returned.wait(0.1)
        run(home)

    monkeypatch.setattr(loops.Home, "_run", run_late)
    home = loops.home_loop()
    running = home.is_running()
    returned.set()
    stop_layers()
    assert running


async def nothing() -> None:
    pass


@pytest.mark.parametrize("closed", ["before", "after"])
async def test_a_loop_that_ends_while_it_is_asked_refuses_and_nobody_waits_for_ever(
    closed: str,
) -> None:
    other = asyncio.new_event_loop()
    loops._close_with(other)
    if closed == "before":
        other.close()
    other.is_running = lambda: True  # type: ignore[method-assign]  # as it did a moment ago
    asking = asyncio.create_task(loops.run_on(other, nothing))
    await asyncio.sleep(0)
    if closed == "after":
        del other.is_running
        other.close()
    with pytest.raises(PublishError, match="does not run"):
        await asyncio.wait_for(asking, DEADLINE)
    assert other not in loops._calls


async def test_synchronous_code_below_a_running_loop_uses_that_loop(
    layer: PostgresChannelLayer,
) -> None:
    """A synchronous consumer or view: asgiref takes its calls to the loop above it."""
    channel = await member(layer, "room")
    await sync_to_async(async_to_sync(layer.group_send))("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}
    assert list(layer._ports) == [asyncio.get_running_loop()]


async def test_a_channel_of_synchronous_code_can_be_used_from_a_loop(
    layer: PostgresChannelLayer,
) -> None:
    channel = await asyncio.to_thread(async_to_sync(layer.new_channel))
    ours = await member(layer, "room")
    await layer.group_add("room", channel)  # which is another loop's
    await layer.group_send("room", {"type": "x"})
    assert await take(layer, ours) == {"type": "x"}
    assert await take(layer, channel) == {"type": "x"}
    await layer.send(channel, {"type": "direct"})
    assert await asyncio.to_thread(async_to_sync(take), layer, channel) == {"type": "direct"}
    await layer.group_discard("room", channel)
    await layer.group_send("room", {"type": "y"})
    assert await take(layer, ours) == {"type": "y"}
    await layer.send(channel, {"type": "last"})
    assert await take(layer, channel) == {"type": "last"}


@pytest.mark.django_db(transaction=True)
async def test_a_cancelled_receive_on_another_loop_loses_nothing(
    layer: PostgresChannelLayer,
) -> None:
    channel = await asyncio.to_thread(async_to_sync(layer.new_channel))
    for name in (channel, "work"):
        count = 40
        for number in range(count):
            await layer.send(name, {"type": "x", "n": number})
        received: list[int] = []
        steps = 0

        async def impatient(name: str = name, received: list[int] = received) -> None:
            nonlocal steps
            task = asyncio.create_task(layer.receive(name), name="receive")
            steps = (steps + 1) % 30
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                received.append(task.result()["n"])

        async with asyncio.timeout(4 * DEADLINE):
            while len(received) < count:
                if name == channel:
                    await impatient()
                else:
                    await asyncio.to_thread(async_to_sync(impatient))
        assert sorted(received) == list(range(count))


# -- channels of others ------------------------------------------------------------------------


async def test_a_channel_that_nobody_answers_for_is_added_in_vain(
    make_layer: MakeLayer, settings: Any
) -> None:
    """Its process has ended; a name that was kept somewhere must not be an error."""
    settings.PGNOTIFY_HEARTBEAT_TIMEOUT = 0.2
    layer = make_layer()
    for channel in (f"specific.{'0' * 16}!1", "of.no.process!1"):
        await layer.group_add("room", channel)
        await layer.send(channel, {"type": "x"})
        await layer.group_discard("room", channel)


async def test_to_discard_at_once_what_another_process_is_still_adding_wins(
    make_layer: MakeLayer,
) -> None:
    ours, theirs = make_layer(), make_layer()
    channel = await theirs.new_channel()
    for number in range(10):
        adding = asyncio.create_task(ours.group_add(f"room.{number}", channel), name="adding")
        await asyncio.sleep(0)
        await ours.group_discard(f"room.{number}", channel)
        adding.cancel()
        await asyncio.wait([adding])
        await ours.group_send(f"room.{number}", {"type": "x"})
        await fence(theirs, channel, ours)


async def test_a_process_listens_to_the_shards_of_its_own_groups_only(
    make_layer: MakeLayer, raw: psycopg.Connection[Any]
) -> None:
    idle, busy = make_layer(shards=64), make_layer(shards=64)
    channel, other = await busy.new_channel(), await idle.new_channel()
    [group, distant] = distinct_shards(busy, 2)
    await busy.group_add(group, channel)
    assert port_of(busy).shard(group) in port_of(busy).hub.heard
    assert port_of(busy).shard(distant) not in port_of(busy).hub.heard
    await busy.group_discard(group, channel)
    # Left at the next sweep, and listened to again when needed.
    port_of(busy).local.sweep_due = 0.0
    await busy.new_channel()
    assert port_of(busy).shard(group) not in port_of(busy).hub.heard
    await busy.group_add(group, channel)
    await idle.group_send(group, {"type": "x"})
    assert await take(busy, channel) == {"type": "x"}
    await fence(idle, other)


def distinct_shards(layer: PostgresChannelLayer, count: int) -> list[str]:
    """Groups of different shards."""
    found: dict[str, str] = {}
    number = 0
    while len(found) < count:
        found.setdefault(port_of(layer).shard(f"group.{number}"), f"group.{number}")
        number += 1
    return list(found.values())


async def test_receiving_for_all_channels_of_a_prefix_at_once(layer: PostgresChannelLayer) -> None:
    """The name up to its "!", as servers receive for all their sockets."""
    first, second = await layer.new_channel(), await layer.new_channel()
    head = first[: first.index("!") + 1]
    await layer.send(second, {"type": "x", "n": 0})
    await layer.send(first, {"type": "x", "n": 1})
    assert [(await take(layer, head))["n"] for _ in range(2)] == [0, 1]
    everybody = asyncio.create_task(layer.receive(head), name="everybody")
    await asyncio.sleep(0)
    third = await layer.new_channel()  # made while it waits
    await layer.send(third, {"type": "x", "n": 2})
    async with asyncio.timeout(DEADLINE):
        assert (await everybody)["n"] == 2
    # One that is cancelled leaves the message to the reader of the channel.
    everybody = asyncio.create_task(layer.receive(head), name="everybody")
    await asyncio.sleep(0)
    await layer.send(first, {"type": "x", "n": 3})
    everybody.cancel()
    await asyncio.wait([everybody])
    assert (await take(layer, first))["n"] == 3
    elsewhere = await layer.new_channel("other.")
    await layer.send(elsewhere, {"type": "x", "n": 4})
    assert (await take(layer, elsewhere))["n"] == 4


# -- the way out -------------------------------------------------------------------------------


async def test_a_heartbeat_has_its_turn_though_sends_never_pause(
    make_layer: MakeLayer, settings: Any
) -> None:
    settings.PGNOTIFY_HEARTBEAT_INTERVAL = 0.05
    layer = make_layer(capacity=100_000)
    channel = await member(layer, "room")
    listener = port_of(layer).hub._listener
    assert listener is not None
    stop = False

    async def send() -> None:
        while not stop:
            await layer.group_send("room", {"type": "x"})

    async def drain() -> None:
        while not stop:
            await layer.receive(channel)

    tasks = [asyncio.create_task(send(), name="send") for _ in range(5)]
    tasks.append(asyncio.create_task(drain(), name="drain"))
    proofs: set[float | None] = set()
    async with asyncio.timeout(3 * DEADLINE):
        while len(proofs) < 5:
            proofs.add(listener.session.proven_at)
            await asyncio.sleep(0.01)
    stop = True
    await asyncio.gather(*tasks[:-1])
    tasks[-1].cancel()
    await asyncio.wait(tasks)
    assert layer.stats["gaps"] == 0


async def test_messages_to_many_groups_leave_in_few_statements_and_in_order(
    layer: PostgresChannelLayer,
) -> None:
    groups = [f"group.{number}" for number in range(30)]
    channel = await member(layer, *groups)
    sent = [(group, {"type": "x", "group": group, "n": n}) for n in range(3) for group in groups]
    await layer.group_send_many(sent)
    heard: dict[str, list[int]] = {}
    for _ in sent:
        message = await take(layer, channel)
        heard.setdefault(message["group"], []).append(message["n"])
    assert heard == {group: [0, 1, 2] for group in groups}
    with pytest.raises(TypeError):
        await layer.group_send_many([("room", {"type": "x"}), ("bad name", {"type": "x"})])


async def test_what_is_delivered_in_the_process_reaches_its_members_alone(
    make_layer: MakeLayer,
) -> None:
    ours, other = make_layer(), make_layer()
    here, there = await member(ours, "room"), await member(other, "room")
    await asyncio.to_thread(ours.deliver, "room", {"type": "x"})
    assert await take(ours, here) == {"type": "x"}
    await fence(other, there)
    for bad in (("bad name", {"type": "x"}), ("room", "text"), ("room", {"x": object()})):
        with pytest.raises(TypeError):
            ours.deliver(*bad)


async def test_a_server_that_swallows_everything_is_a_publish_error_in_time(
    make_layer: MakeLayer,
    proxy: TCPProxy,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
) -> None:
    entry = {**connections["default"].settings_dict, "HOST": proxy.host, "PORT": str(proxy.port)}
    monkeypatch.setitem(connections.settings, "proxied", entry)
    layer = make_layer(using="proxied")
    channel = await member(layer, "room")
    await layer.group_send("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}
    settings.PGNOTIFY_CONNECT_TIMEOUT = 0.3
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    proxy.blackhole()
    with pytest.raises(PublishError, match="no answer within"):
        async with asyncio.timeout(2 * DEADLINE):
            await layer.group_send("room", {"type": "swallowed"})
    settings.PGNOTIFY_CONNECT_TIMEOUT = DEADLINE
    proxy.resume()
    await layer.group_add("room", channel)  # heard again
    await layer.group_send("room", {"type": "after"})
    while (await take(layer, channel))["type"] != "after":
        pass


async def test_a_burst_while_backends_are_terminated_loses_nothing_outside_gaps(
    make_layer: MakeLayer, raw: psycopg.Connection[Any], settings: Any
) -> None:
    """Senders are told what was not sent; a receiver misses only what a gap stands for."""
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.1
    layer = make_layer(gap_messages=True, capacity=100_000)
    channel = await member(layer, "room")
    failed: set[int] = set()
    stop = False

    async def send(start: int) -> int:
        number = start
        while not stop:
            try:
                await layer.group_send("room", {"type": "x", "n": number})
            except PublishError:
                failed.add(number)
            number += 1
        return number

    sending = [asyncio.create_task(send(start), name="send") for start in (0, 1_000_000)]
    for _ in range(6):
        with established_again() as again:
            pid = listening_pid(layer)
            await asyncio.to_thread(raw.execute, "select pg_terminate_backend(%s, 5000)", [pid])
            await again()
    stop = True
    ends = await asyncio.gather(*sending)
    await passed(layer)
    received: list[list[int]] = [[]]
    for _ in range(len(port_of(layer).local.boxes[channel].messages)):
        message = await take(layer, channel)
        if message["type"] == "pgnotify.gap":
            received.append([])
        else:
            received[-1].append(message["n"])
    assert len(received) == 7, "six gaps"
    for start, end in zip((0, 1_000_000), ends, strict=True):
        got = [[n for n in part if start <= n < end] for part in received]
        flat = [n for part in got for n in part]
        assert flat == sorted(set(flat)), "in order, none twice"
        for part in got:
            if part:
                missing = set(range(part[0], part[-1] + 1)) - set(part) - failed
                assert not missing, "missed outside of a gap"


async def test_a_fork_below_a_running_loop_inherits_nothing(layer: PostgresChannelLayer) -> None:
    channel = await member(layer, "room")
    generation = loops.generation
    child = os.fork()
    if child == 0:
        code = 1
        try:
            inherited = loops._hubs or loops.generation != generation + 1
            code = 2 if inherited or layer._owner(channel) is None else 0
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    await layer.group_send("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}
    assert layer.stats["gaps"] == 0
