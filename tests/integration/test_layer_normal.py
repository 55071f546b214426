"""Normal channels: rows that wait for one receiver, whichever process it is in."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull
from django.db import connections

from django_pgnotify.exceptions import PgNotifyError, PublishError
from django_pgnotify.layers import PostgresChannelLayer
from django_pgnotify.layers import rows as rows_module
from tests.integration.test_layer import (
    DEADLINE,
    Message,
    established_again,
    lines_of,
    listening_pid,
    member,
    port_of,
    stop_layers,
    take,
    terminate,
)
from tests.proxy import TCPProxy
from tests.settings import database_url

# Rows outlive a layer; the flush after a transactional test takes them away.
pytestmark = pytest.mark.django_db(transaction=True)

MakeLayer = Callable[..., PostgresChannelLayer]


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix of this test: each is another process to the others."""
    prefix = f"normal-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


@pytest.fixture
def layer(make_layer: MakeLayer) -> PostgresChannelLayer:
    return make_layer()


@pytest.fixture
async def raw(django_db_setup: None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection that knows nothing of layers."""
    url = database_url(connections["default"].settings_dict)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        yield connection


async def rows_in(raw: psycopg.AsyncConnection[Any], table: str = "message") -> int:
    [[count]] = await (await raw.execute(f"select count(*) from pgnotify_layer_{table}")).fetchall()
    return int(count)


async def waits(layer: PostgresChannelLayer, channel: str) -> asyncio.Task[Message]:
    """A task that receives, returned once it waits and has found nothing."""
    task = asyncio.create_task(layer.receive(channel), name="receive")
    async with asyncio.timeout(DEADLINE):
        while not (shared := port_of(layer).shared.get(channel)) or shared._task or shared._news:
            assert not task.done()
            await asyncio.sleep(0)
    return task


async def test_a_message_waits_until_somebody_receives(make_layer: MakeLayer) -> None:
    for number in range(5):
        await make_layer().send("work", {"type": "x", "n": number})
    layer = make_layer()
    assert [(await take(layer, "work"))["n"] for _ in range(5)] == list(range(5))


async def test_a_receiver_that_waits_is_woken(make_layer: MakeLayer) -> None:
    ours, other = make_layer(), make_layer()
    task = await waits(ours, "work")
    await other.send("work", {"type": "x"})
    async with asyncio.timeout(DEADLINE):
        assert await task == {"type": "x"}


async def test_each_message_goes_to_one_of_many_receivers(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layers, count = [make_layer(capacity=1000) for _ in range(3)], 150
    got: list[int] = []
    done = asyncio.Event()

    async def work(layer: PostgresChannelLayer) -> None:
        while True:
            got.append((await layer.receive("work"))["n"])
            if len(got) == count:
                done.set()

    tasks = [asyncio.create_task(work(layer), name="work") for layer in layers for _ in range(3)]
    await asyncio.gather(*(layers[n % 3].send("work", {"type": "x", "n": n}) for n in range(count)))
    async with asyncio.timeout(2 * DEADLINE):
        await done.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(got) == list(range(count))
    assert await rows_in(raw) == 0


async def test_a_full_channel_refuses_its_sender_until_something_is_taken(
    make_layer: MakeLayer,
) -> None:
    config: dict[str, Any] = {"capacity": 2, "channel_capacity": {"wide.*": 4}}
    layer, other = make_layer(**config), make_layer(**config)
    for channel, capacity in (("work", 2), ("wide.work", 4)):
        for number in range(capacity):
            await layer.send(channel, {"type": "x", "n": number})
        with pytest.raises(ChannelFull):
            await other.send(channel, {"type": "x"})
        assert (await take(layer, channel))["n"] == 0
        await layer.send(channel, {"type": "x", "n": capacity})
        assert [(await take(layer, channel))["n"] for _ in range(capacity)] == [
            *range(1, capacity),
            capacity,
        ]


async def test_what_has_expired_is_neither_received_nor_counted(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer(capacity=1)
    await layer.send("work", {"type": "old"})
    await raw.execute("update pgnotify_layer_message set expires_at = now()")
    await layer.send("work", {"type": "new"})
    assert await take(layer, "work") == {"type": "new"}


EXPIRED = (
    "insert into pgnotify_layer_message (layer, channel, body, expires_at)"
    " select 'gone', 'gone', '', now() - interval '1 s' from generate_series(1, 2500)"
)


async def rows_are(raw: psycopg.AsyncConnection[Any], count: int) -> None:
    """Return once there are so many messages."""
    async with asyncio.timeout(DEADLINE):
        while await rows_in(raw) != count:
            pass


async def test_all_that_has_expired_is_pruned_by_whoever_writes(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    """However much there is: what is written faster than it is removed would grow without end."""
    await raw.execute(EXPIRED)
    await layer.send("work", {"type": "x"})
    await rows_are(raw, 1)
    assert await take(layer, "work") == {"type": "x"}


async def test_what_expires_is_pruned_though_nothing_else_is_written(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_PRUNE_EVERY", 0.3)
    layer = make_layer(expiry=0.2)
    for _ in range(2):
        await layer.send("work", {"type": "x"})
        await rows_are(raw, 0)
        async with asyncio.timeout(DEADLINE):
            while port_of(layer).hub.rows._alarm is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_what_cannot_be_pruned_fails_no_sender(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    """He would send again what has been stored."""
    await raw.execute(EXPIRED)
    await raw.execute(
        "create function refuse() returns trigger as"
        " $$ begin raise 'not these'; end $$ language plpgsql"
    )
    await raw.execute(
        "create trigger refuse before delete on pgnotify_layer_message"
        " for each row when (old.layer = 'gone') execute function refuse()"
    )
    try:
        with lines_of("django_pgnotify.layers") as lines:
            await layer.send("work", {"type": "x"})
            await lines.wait_for("could not be removed, and wait: not these")
        assert await take(layer, "work") == {"type": "x"}
    finally:
        await raw.execute("drop function refuse cascade")


async def test_a_large_message_survives(layer: PostgresChannelLayer) -> None:
    message = {"type": "x", "body": bytes(range(256)) * 4000}
    await layer.send("work", message)
    assert await take(layer, "work") == message


async def test_a_cancelled_receive_takes_nothing(make_layer: MakeLayer) -> None:
    """Whatever moment it is cancelled at: while it looks, while it is told, while it waits."""
    layer, count = make_layer(capacity=1000), 60
    await asyncio.gather(*(layer.send("work", {"type": "x", "n": n}) for n in range(count)))
    received: list[int] = []
    patience = 0
    async with asyncio.timeout(4 * DEADLINE):
        while len(received) < count:
            task = asyncio.create_task(layer.receive("work"), name="receive")
            patience = (patience + 1) % 40
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received.append((await task)["n"])
    assert received == list(range(count)), "none lost, none twice, and still in order"


async def test_what_a_cancelled_receiver_was_given_goes_to_the_next_one(
    make_layer: MakeLayer,
) -> None:
    ours, other = make_layer(), make_layer()
    first, second = await waits(ours, "work"), await waits(ours, "work")
    await other.send("work", {"type": "x"})
    async with asyncio.timeout(DEADLINE):
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        [winner] = [task for task in (first, second) if task.done()]
        [loser] = [task for task in (first, second) if not task.done()]
        assert await winner == {"type": "x"}
        loser.cancel()
        await asyncio.wait([loser])
    await other.send("work", {"type": "y"})
    assert await take(other, "work") == {"type": "y"}


async def test_a_loop_that_ends_while_it_takes_gives_back(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, count = make_layer(capacity=1000), 40
    await asyncio.gather(*(layer.send("work", {"type": "x", "n": n}) for n in range(count)))
    received: list[int] = []

    def run(steps: int) -> None:
        async def main() -> None:
            task = asyncio.create_task(layer.receive("work"), name="receive")
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.done():
                received.append((await task)["n"])

        asyncio.run(main())  # which cancels what is still under way

    for steps in range(0, 60, 4):
        await asyncio.to_thread(run, steps)
    assert await rows_in(raw) == count - len(received)
    while len(received) < count:
        received.append((await take(layer, "work"))["n"])
    assert sorted(received) == list(range(count))


async def test_a_normal_channel_can_be_in_a_group(make_layer: MakeLayer) -> None:
    ours, other = make_layer(capacity=2), make_layer(capacity=2)
    local = await member(ours, "room")
    await ours.group_add("room", "work")
    await ours.group_add("room", "work")  # once more changes nothing
    await ours.group_add("lobby", "idle")
    for number in range(3):  # one more than "work" holds, which is passed over
        await other.group_send("room", {"type": "x", "n": number})
        assert (await take(ours, local))["n"] == number
    assert [(await take(other, "work"))["n"] for _ in range(2)] == [0, 1]
    assert other.stats["dropped"] == 1
    await ours.group_discard("room", "work")
    await ours.group_discard("room", "work")  # not to be in it is no error
    await other.group_send("room", {"type": "not for work"})
    await other.send("work", {"type": "direct"})
    assert await take(ours, "work") == {"type": "direct"}


async def test_the_membership_of_a_normal_channel_expires(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer = make_layer()
    await layer.group_add("room", "work")
    await raw.execute("update pgnotify_layer_member set expires_at = now()")
    await layer.group_send("room", {"type": "late"})
    await layer.group_add("room", "work")
    await layer.group_send("room", {"type": "x"})
    assert await take(layer, "work") == {"type": "x"}
    assert await rows_in(raw, "member") == 1


async def test_a_membership_that_has_expired_costs_nobody_who_sends_to_groups_anything(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    """Nobody may come to prune it for days."""
    layer = make_layer()
    channel = await member(layer, "room")
    await raw.execute(
        "insert into pgnotify_layer_member (layer, group_name, channel, expires_at)"
        " values ('gone', 'room', 'jobs', now() - interval '1 s')"
    )
    await layer.group_send("room", {"type": "x"})
    assert await take(layer, channel) == {"type": "x"}
    assert port_of(layer).hub.rows.connection is None, "no rows have been looked for"
    await layer.group_add("room", "jobs")
    async with asyncio.timeout(DEADLINE):
        while await rows_in(raw, "member") != 1:  # whoever joins prunes
            pass


async def test_a_flush_takes_rows_and_members_of_this_layer_only(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    layer, other = make_layer(), make_layer(prefix=f"other-{secrets.token_hex(4)}")
    for each in (layer, other):
        await each.send("work", {"type": "x"})
        await each.group_add("room", "work")
    await layer.flush()
    assert await rows_in(raw) == await rows_in(raw, "member") == 1
    await layer.group_send("room", {"type": "nobody"})
    await layer.send("work", {"type": "after"})
    assert await take(layer, "work") == {"type": "after"}
    assert await take(other, "work") == {"type": "x"}


async def test_a_receiver_that_waits_hears_of_rows_that_came_while_it_was_deaf(
    make_layer: MakeLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    """The NOTIFY is lost with the connection; the row is not."""
    layer = make_layer()
    task = await waits(layer, "work")
    with established_again() as again:
        await terminate(raw, listening_pid(layer))
        await asyncio.to_thread(async_to_sync(make_layer().send), "work", {"type": "x"})
        await again()
    async with asyncio.timeout(DEADLINE):
        assert await task == {"type": "x"}


async def test_a_receiver_waits_on_while_the_rows_cannot_be_reached(
    make_layer: MakeLayer,
    proxy: TCPProxy,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
) -> None:
    entry = {**connections["default"].settings_dict, "HOST": proxy.host, "PORT": str(proxy.port)}
    monkeypatch.setitem(connections.settings, "proxied", entry)
    settings.PGNOTIFY_RECONNECT_MAX_DELAY = 0.2
    layer, there = make_layer(using="proxied"), make_layer()
    task = await waits(layer, "work")
    with lines_of("django_pgnotify.layers") as lines:
        await asyncio.to_thread(proxy.close)
        with pytest.raises(PublishError, match="could not reach its tables"):
            await layer.send("work", {"type": "lost"})
        port_of(layer).shared["work"].wake()
        await lines.wait_for("Cannot look for messages of 'work'")
    await there.send("work", {"type": "x"})
    await asyncio.to_thread(proxy.open)
    async with asyncio.timeout(2 * DEADLINE):
        assert await task == {"type": "x"}


async def test_it_works_though_the_connection_for_rows_is_terminated_again_and_again(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    for number in range(5):
        await layer.send("work", {"type": "x", "n": number})
        connection = port_of(layer).hub.rows.connection
        assert connection is not None
        await terminate(raw, connection.backend_pid)
        assert (await take(layer, "work"))["n"] == number


async def test_missing_tables_are_named_with_what_makes_them(
    layer: PostgresChannelLayer, raw: psycopg.AsyncConnection[Any]
) -> None:
    channel = await member(layer, "room")
    await layer.group_send("room", {"type": "before"})
    assert await take(layer, channel) == {"type": "before"}
    for table in ("message", "member"):
        await raw.execute(f"alter table pgnotify_layer_{table} rename to hidden_{table}")
    try:
        for call in (
            layer.send("work", {"type": "x"}),
            layer.group_add("room", "work"),
            layer.group_send("room", {"type": "x", "body": "y" * 20_000}),
            take(layer, "work"),
        ):
            with pytest.raises(PgNotifyError, match=r"manage\.py migrate django_pgnotify"):
                await call
        # What needs no row goes on: on this session, and on one that has never seen the tables.
        for number in range(2):
            await layer.group_send("room", {"type": "x", "n": number})
            assert await take(layer, channel) == {"type": "x", "n": number}
            with established_again() as again:
                await terminate(raw, listening_pid(layer))
                await again()
    finally:
        for table in ("message", "member"):
            await raw.execute(f"alter table hidden_{table} rename to pgnotify_layer_{table}")


def test_it_works_from_synchronous_code(layer: PostgresChannelLayer) -> None:
    for number in range(5):
        async_to_sync(layer.send)("work", {"type": "x", "n": number})
    for number in range(5):
        assert async_to_sync(take)(layer, "work")["n"] == number
