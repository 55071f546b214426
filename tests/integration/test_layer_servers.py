"""The channel layer on servers of other encodings, and with a pooler in between."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull
from django.db import connections

from django_pgnotify.layers import PostgresChannelLayer
from django_pgnotify.layers.rows import Rows
from tests.integration.test_layer import (
    fence,
    heard_until,
    member,
    port_of,
    stop_layers,
    take,
    wire_of,
)
from tests.integration.test_probe import PGBOUNCER, start_pooler
from tests.settings import database_url

pytestmark = pytest.mark.django_db(transaction=True)

MakeLayer = Callable[..., PostgresChannelLayer]

BYTES = {"type": "x", "body": bytes(range(256)) * 10, "text": "naïve — 東京 🙂 \x00 ÿ Ā"}


@pytest.fixture
def make_layer(django_db_setup: None) -> Iterator[MakeLayer]:
    """Makes layers that share a prefix no other test uses."""
    prefix = f"servers-{secrets.token_hex(4)}"

    def make(**config: Any) -> PostgresChannelLayer:
        return PostgresChannelLayer(**{"prefix": prefix, **config})

    yield make
    stop_layers()


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "UTF8"])
def encoded(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, django_db_setup: None
) -> Iterator[str]:
    """An alias of an empty database of that encoding."""
    entry = connections["default"].settings_dict
    name = f"test_layer_{request.param.lower()}"
    with psycopg.connect(database_url(entry), autocommit=True) as connection:
        identifier = psycopg.sql.Identifier(name)
        connection.execute(psycopg.sql.SQL("drop database if exists {}").format(identifier))
        connection.execute(
            psycopg.sql.SQL(
                "create database {} template template0 encoding {} lc_collate 'C' lc_ctype 'C'"
            ).format(identifier, psycopg.sql.Literal(request.param))
        )
        monkeypatch.setitem(connections.settings, "encoded", {**entry, "NAME": name})
        yield "encoded"
        stop_layers()
        connection.execute(psycopg.sql.SQL("drop database {} with (force)").format(identifier))


def test_every_byte_survives_whatever_the_encoding_of_the_server(
    make_layer: MakeLayer, encoded: str
) -> None:
    """And without the tables: groups and process-local channels need none."""
    layer = make_layer(using=encoded)

    async def main() -> None:
        channel = await member(layer, "room")
        for _ in range(2):
            await layer.group_send("room", BYTES)
            assert await take(layer, channel) == BYTES
        await asyncio.gather(*(layer.group_send("room", {**BYTES, "n": n}) for n in range(10)))
        assert [(await take(layer, channel))["n"] for _ in range(10)] == list(range(10))

    asyncio.run(main())


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_an_encoding_that_the_project_chose_for_itself_changes_nothing(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    entry = connections["default"].settings_dict
    options = {**entry["OPTIONS"], "client_encoding": encoding}
    monkeypatch.setitem(connections.settings, "chosen", {**entry, "OPTIONS": options})
    ours, other = make_layer(using="chosen"), make_layer()
    channel, there = await member(ours, "room"), await member(other, "room")
    for sender in (ours, other):
        await sender.group_send("room", BYTES)
        assert await take(ours, channel) == BYTES
        assert await take(other, there) == BYTES
        await sender.send("work", {**BYTES, "body": "x" * 20_000})
        assert (await take(ours, "work"))["text"] == BYTES["text"]


async def test_through_a_transaction_pooler_it_sends_and_keeps_rows(
    make_layer: MakeLayer,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Listening goes past the pooler (PGNOTIFY_LISTEN_DATABASE); rows, and whoever only sends,
    go through it, where each statement may be another backend's."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed (apt-get install pgbouncer)")
    entry = connections["default"].settings_dict
    if str(entry["HOST"]).startswith("/"):
        pytest.skip("the server is reached through a Unix socket")
    process, port = await asyncio.to_thread(
        start_pooler, "transaction", tmp_path_factory.mktemp("pgbouncer")
    )
    with process:
        pooled = {**entry, "HOST": "127.0.0.1", "PORT": str(port)}
        monkeypatch.setitem(connections.settings, "pooled", pooled)
        settings.PGNOTIFY_DATABASE, settings.PGNOTIFY_LISTEN_DATABASE = "pooled", "default"
        layer = make_layer(capacity=30)
        channel = await member(layer, "room")
        await layer.group_add("room", "work")
        for number in range(10):
            await asyncio.to_thread(
                async_to_sync(layer.group_send), "room", {"type": "x", "n": number}
            )
            assert (await take(layer, channel))["n"] == number
            assert (await take(layer, "work"))["n"] == number
        await layer.group_send("room", {"type": "x", "body": "y" * 20_000})
        assert len((await take(layer, channel))["body"]) == 20_000
        rows = port_of(layer).hub.rows.connection
        assert rows is not None
        assert rows.pooled
        await layer.close()
        await asyncio.to_thread(stop_layers)


async def test_a_hundred_frames_leave_in_one_statement(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=1000, shards=1)
    url = database_url(connections["default"].settings_dict)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as raw:
        channel, wire = await member(layer, "room"), wire_of(layer, "room")
        await raw.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(wire)))
        body = secrets.token_bytes(100)
        await asyncio.gather(
            *(layer.group_send("room", {"type": "x", "n": n, "body": body}) for n in range(500))
        )
        assert [(await take(layer, channel))["n"] for _ in range(500)] == list(range(500))
        frames = await heard_until(raw, wire, "mark")
    assert len(frames) < 25, "500 messages of 120 bytes"
    await fence(layer, channel)


async def test_a_layer_that_is_full_of_rows_says_so_to_every_sender_at_once(
    make_layer: MakeLayer,
) -> None:
    """One connection sends one after the other, so what it sends is counted exactly."""
    layer = make_layer(capacity=5)
    results = await asyncio.gather(
        *(layer.send("work", {"type": "x", "n": n}) for n in range(20)), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None)] * 5 + [ChannelFull] * 15
    assert [(await take(layer, "work"))["n"] for _ in range(5)] == list(range(5))


async def test_rows_that_are_closed_do_not_open_again(django_db_setup: None) -> None:
    rows = Rows("default")
    connection = await rows.connected()
    assert rows.connection is connection
    rows.close()
    rows.close()
    assert connection.closed
    with pytest.raises(Exception, match="stopped"):
        await rows.connected()
