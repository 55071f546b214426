"""The channel layer between processes: peers, forks, ends, and the example's web processes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from websockets.asyncio.client import connect
from websockets.typing import Origin

from django_pgnotify.layers import PostgresChannelLayer
from example_project.demo_check import Board
from tests.integration.test_layer import stop_layers, take
from tests.process.shop import Shop, Web
from tests.processes import Process, database_environ, python

pytestmark = pytest.mark.django_db(transaction=True)

# Says its channel, then every message it hears; ends with a "stop".
PEER = """
import asyncio, json, sys
import django
django.setup()
from django_pgnotify.layers import PostgresChannelLayer

async def main():
    layer = PostgresChannelLayer(prefix=sys.argv[1])
    channel = await layer.new_channel()
    for group in sys.argv[2:]:
        await layer.group_add(group, channel)
    print("channel", channel, flush=True)
    message = {}
    while message.get("type") != "stop":
        message = await layer.receive(channel)
        if "body" in message:
            message["body"] = len(message["body"])
        print("heard", json.dumps(message), flush=True)

asyncio.run(main())
"""

# Sends what it is told, from a process that listens to nothing.
SPEAKER = """
import asyncio, json, sys
import django
django.setup()
from asgiref.sync import async_to_sync
from django_pgnotify.layers import PostgresChannelLayer

layer = PostgresChannelLayer(prefix=sys.argv[1])
for message in json.loads(sys.argv[3]):
    async_to_sync(layer.group_send)(sys.argv[2], message)
"""


@pytest.fixture
def layer() -> Iterator[PostgresChannelLayer]:
    yield PostgresChannelLayer(prefix=f"processes-{secrets.token_hex(4)}")
    stop_layers()


def peer(layer: PostgresChannelLayer, *groups: str) -> Process:
    return python("-c", PEER, layer.prefix, *groups, env=database_environ())


def channel_of(process: Process) -> str:
    return process.wait_for_line(r"^channel (\S+)$")[1]


def heard(process: Process, count: int) -> dict[str, Any]:
    """The ``count``-th message that a peer heard."""
    message: dict[str, Any] = json.loads(process.wait_for_line("^heard (.*)$", count=count)[1])
    return message


def test_a_message_of_a_third_process_reaches_the_members_in_two_others_once_and_in_order(
    layer: PostgresChannelLayer,
) -> None:
    messages = [{"type": "x", "n": n} for n in range(20)]
    messages += [{"type": "big", "body": "y" * 100_000}, {"type": "stop"}]
    with peer(layer, "room") as one, peer(layer, "lobby", "room") as two:
        assert channel_of(one) != channel_of(two)
        with python(
            *("-c", SPEAKER, layer.prefix, "room", json.dumps(messages)), env=database_environ()
        ) as speaker:
            assert speaker.wait() == 0, speaker.report()
        for process in (one, two):
            assert process.wait() == 0, process.report()
            lines = [json.loads(line[6:]) for line in process.stdout.splitlines()[1:]]
            assert lines == [*messages[:20], {"type": "big", "body": 100_000}, {"type": "stop"}]
            assert process.stderr == ""


def test_the_channel_of_another_process_can_be_added_sent_to_and_discarded(
    layer: PostgresChannelLayer,
) -> None:
    group_add, group_discard = async_to_sync(layer.group_add), async_to_sync(layer.group_discard)
    group_send, send = async_to_sync(layer.group_send), async_to_sync(layer.send)
    with peer(layer) as process:
        channel = channel_of(process)
        for number in range(0, 40, 4):
            group_add("room", channel)
            group_send("room", {"type": "group", "n": number})
            send(channel, {"type": "direct", "n": number})
            send(channel, {"type": "direct", "body": "y" * 50_000})
            group_discard("room", channel)
            group_send("room", {"type": "not for you"})
            send(channel, {"type": "last", "n": number})
            assert heard(process, number + 1) == {"type": "group", "n": number}
            assert heard(process, number + 2) == {"type": "direct", "n": number}
            assert heard(process, number + 3) == {"type": "direct", "body": 50_000}
            assert heard(process, number + 4) == {"type": "last", "n": number}
        send(channel, {"type": "stop"})
        assert process.wait() == 0, process.report()


def test_a_flush_empties_the_groups_of_every_process(layer: PostgresChannelLayer) -> None:
    with peer(layer, "room") as process:
        channel = channel_of(process)
        async_to_sync(layer.flush)()
        async_to_sync(layer.group_send)("room", {"type": "nobody"})
        async_to_sync(layer.send)(channel, {"type": "stop"})
        assert process.wait() == 0, process.report()
        assert heard(process, 1) == {"type": "stop"}


def test_a_process_that_was_killed_takes_nothing_from_the_others(
    layer: PostgresChannelLayer,
) -> None:
    with peer(layer, "room") as killed, peer(layer, "room") as stays:
        channel, _ = channel_of(killed), channel_of(stays)
        killed.kill()
        async_to_sync(layer.group_send)("room", {"type": "x"})
        async_to_sync(layer.send)(channel, {"type": "for nobody"})
        async_to_sync(layer.group_send)("room", {"type": "stop"})
        assert stays.wait() == 0, stays.report()
        assert heard(stays, 1) == {"type": "x"}


# -- workers of Channels ---------------------------------------------------------------------------

WORKER = """
import sys
import django
django.setup()
from asgiref.sync import async_to_sync
from channels.consumer import SyncConsumer
from channels.layers import get_channel_layer
from channels.routing import ChannelNameRouter
from channels.worker import Worker

class Jobs(SyncConsumer):
    def job_run(self, message):
        done = {"type": "done", "n": message["n"]}
        async_to_sync(self.channel_layer.send)(message["reply"], done)

application = ChannelNameRouter({sys.argv[1]: Jobs.as_asgi()})
print("ready", flush=True)
Worker(application, [sys.argv[1]], get_channel_layer()).run()
"""


def test_workers_of_channels_share_the_jobs_of_a_normal_channel() -> None:
    name = f"jobs-{secrets.token_hex(4)}"
    layer = PostgresChannelLayer()  # as in the settings of the workers
    try:
        reply = async_to_sync(layer.new_channel)()

        def send(number: int) -> None:
            async_to_sync(layer.send)(name, {"type": "job.run", "n": number, "reply": reply})

        send(0)  # which waits until somebody works
        with (
            python("-c", WORKER, name, env=database_environ()) as one,
            python("-c", WORKER, name, env=database_environ()) as two,
        ):
            for worker in (one, two):
                worker.wait_for_line("^ready$")
            for number in range(1, 30):
                send(number)
            answers = [async_to_sync(take)(layer, reply) for _ in range(30)]
            assert sorted(answer["n"] for answer in answers) == list(range(30))
            for worker in (one, two):
                worker.kill()
    finally:
        stop_layers()


# -- forks -------------------------------------------------------------------------------------

FORK = """
import asyncio, os, sys
import django
django.setup()
from asgiref.sync import async_to_sync
from django.db import connection
from django_pgnotify.layers import PostgresChannelLayer

layer = PostgresChannelLayer(prefix=sys.argv[1])
new_channel, group_add = async_to_sync(layer.new_channel), async_to_sync(layer.group_add)
group_send = async_to_sync(layer.group_send)

def take(channel):
    async def wait():
        async with asyncio.timeout(10):
            return await layer.receive(channel)
    return async_to_sync(wait)()

mine = new_channel()
group_add("room", mine)
group_add("family", mine)
group_send("room", {"type": "before"})
assert take(mine) == {"type": "before"}

child = os.fork()
if child == 0:
    own = new_channel()
    assert own.partition("!")[0] != mine.partition("!")[0], "an identity of its own"
    group_add("family", own)
    group_send("family", {"type": "of the child", "body": "x" * 20_000})
    assert take(own)["type"] == "of the child"
    group_send("room", {"type": "not for the child"})  # whose parent is in it, not the child
    group_send("family", {"type": "end"})
    assert take(own) == {"type": "end"}
    try:
        take(mine)
    except Exception as error:
        assert "another process" in str(error), error
    print("child: ok", flush=True)
    sys.exit(0)  # through the interpreter's end, with all its exit handlers

assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert take(mine)["type"] == "of the child"
assert take(mine) == {"type": "not for the child"}
assert take(mine) == {"type": "end"}
# The child ended; neither what listens here nor what sends here has noticed.
for number in range(20):
    group_send("room", {"type": "after", "n": number, "body": "x" * (number % 2) * 9_000})
    assert take(mine)["n"] == number
assert layer.stats["gaps"] == 0, layer.stats.snapshot()
print("parent: ok", flush=True)
"""


def test_a_forked_child_is_a_process_of_its_own_and_leaves_its_parents_connections_alone(
    layer: PostgresChannelLayer,
) -> None:
    with python("-c", FORK, layer.prefix, env=database_environ()) as process:
        status = process.wait()
    assert status == 0, process.report()
    assert process.stdout.splitlines() == ["child: ok", "parent: ok"]
    assert "lost synchronization" not in process.stderr
    assert "Traceback" not in process.stderr


# -- the end of a process ------------------------------------------------------------------------

ENDS = {
    "after a message": "asyncio.run(hello())",
    "after sending only": "asyncio.run(layer.group_send('room', {'type': 'x'}))",
    "while somebody waits for a message": """
async def main():
    await hello()
    task = asyncio.create_task(layer.receive(await layer.new_channel()), name="waits")
    await asyncio.sleep(0)
asyncio.run(main())
""",
    "while a daemon thread waits for a message": """
asyncio.run(hello())
waiting = threading.Event()
async def wait():
    channel = await layer.new_channel()
    waiting.set()
    await layer.receive(channel)
threading.Thread(target=lambda: asyncio.run(wait()), daemon=True).start()
assert waiting.wait(10)
""",
    "by sys.exit": "asyncio.run(hello()); sys.exit(0)",
    "with a message under way": """
async def main():
    await hello()
    for n in range(50):
        asyncio.create_task(layer.group_send('room', {'type': 'x', 'n': n}), name='send')
    await asyncio.sleep(0)
asyncio.run(main())
""",
    "with a message sent by an exit handler": """
atexit.register(lambda: asyncio.run(layer.group_send('room', {'type': 'bye'})))
asyncio.run(hello())
""",
    "with a message sent by an exit handler that runs last": """
asyncio.run(hello())
""",
    "before anything was heard": "layer = None",
    "after a closed layer": """
async def main():
    await hello()
    await layer.close()
asyncio.run(main())
""",
}

PREAMBLE = """
import asyncio, atexit, logging, sys, threading
import django
django.setup()
logging.getLogger("asyncio").setLevel(logging.ERROR)  # not that a busy machine was slow
layer = None
def last():
    # Registered before the layer's own handlers, so it runs after them.
    if "last" in sys.argv[2]:
        try:
            asyncio.run(layer.group_send("room", {"type": "bye"}))
        except Exception:
            pass
atexit.register(last)
from django_pgnotify.layers import PostgresChannelLayer
layer = PostgresChannelLayer(prefix=sys.argv[1])
async def hello():
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "hello"})
    assert await layer.receive(channel) == {"type": "hello"}
    print("hello", flush=True)
"""


@pytest.mark.parametrize("when", ENDS)
def test_the_interpreter_ends_at_once_and_quietly(layer: PostgresChannelLayer, when: str) -> None:
    with python(
        *("-X", "dev", "-W", "ignore::DeprecationWarning"),
        *("-c", PREAMBLE + ENDS[when], layer.prefix, when),
        env=database_environ(),
    ) as process:
        status = process.wait(timeout=15)
    assert status == 0, process.report()
    assert process.stderr == ""


# -- the example's web processes -----------------------------------------------------------------


@asynccontextmanager
async def board(web: Web) -> AsyncIterator[Board]:
    """A websocket of the order board that has got its first whole board."""
    socket = await connect(f"ws{web.url.removeprefix('http')}/ws/board/", origin=Origin(web.url))
    board = Board(web.name, socket)
    try:
        await board.message("snapshot")
        yield board
    finally:
        await board.close()


async def test_a_change_in_a_third_process_reaches_sockets_of_two_web_processes(
    shop: Shop,
) -> None:
    pk = int(await asyncio.to_thread(shop.elsewhere, "print(orders.place().pk)"))
    async with board(shop.webs[0]) as first, board(shop.webs[1]) as second:
        await asyncio.to_thread(shop.elsewhere, f"orders.advance({pk}); orders.advance({pk})")
        for each in (first, second):
            # What a card shows is read when it is sent, so the step in between may be skipped.
            await each.message("order", pk=pk, status="packed")


async def test_a_message_to_the_boards_group_reaches_sockets_of_two_web_processes(
    shop: Shop,
) -> None:
    """Without pglisten: the layer alone, from a process that has never listened."""
    code = (
        "from asgiref.sync import async_to_sync\n"
        "from channels.layers import get_channel_layer\n"
        "pk = Order.objects.order_by('pk').first().pk\n"
        "event = {'pk': pk, 'published_at': 'by hand'}\n"
        "message = {'type': 'order.changed', 'event': event}\n"
        "async_to_sync(get_channel_layer().group_send)('orders', message)\n"
        "print(pk)"
    )
    async with board(shop.webs[0]) as first, board(shop.webs[1]) as second:
        pk = int(await asyncio.to_thread(shop.elsewhere, code))
        for each in (first, second):
            await each.message("order", pk=pk, published_at="by hand")


async def test_boards_hear_again_after_every_listening_backend_was_terminated(
    shop: Shop,
) -> None:
    pk = int(await asyncio.to_thread(shop.elsewhere, "print(orders.place().pk)"))
    gaps = [
        web.process.stderr.count("layer may have missed messages")
        for web in shop.webs
        if web.process
    ]
    ready = shop.listener.stdout.count("pglisten: ready")
    async with board(shop.webs[0]) as first, board(shop.webs[1]) as second:
        async with await psycopg.AsyncConnection.connect(
            shop.database_url, autocommit=True
        ) as connection:
            cursor = await connection.execute(
                "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity"
                " where datname = current_database() and application_name = 'pglisten'"
            )
            # Those of two web processes, and that of pglisten itself.
            assert await cursor.fetchone() == (3,)
        for web, before in zip(shop.webs, gaps, strict=True):
            assert web.process is not None
            await asyncio.to_thread(
                web.process.wait_for_line, "layer may have missed messages", count=before + 1
            )
        await asyncio.to_thread(shop.listener.wait_for_line, "^pglisten: ready", count=ready + 1)
        await asyncio.to_thread(shop.elsewhere, f"orders.advance({pk})")
        for each in (first, second):
            await each.message("order", pk=pk, status="paid")


async def test_this_process_can_talk_to_itself_while_others_do(
    layer: PostgresChannelLayer,
) -> None:
    """Many senders and a peer at once: everybody hears everything, in one order."""
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    with peer(layer, "room") as process:
        await asyncio.to_thread(channel_of, process)
        await asyncio.gather(
            *(layer.group_send("room", {"type": "x", "n": number}) for number in range(80))
        )
        await layer.group_send("room", {"type": "stop"})
        ours = []
        while (message := await take(layer, channel))["type"] != "stop":
            ours.append(message)
        assert await asyncio.to_thread(process.wait) == 0, process.report()
    theirs = [json.loads(line[6:]) for line in process.stdout.splitlines()[1:-1]]
    assert [message["n"] for message in ours] == list(range(80))
    assert theirs == ours
