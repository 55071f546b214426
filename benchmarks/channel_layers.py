"""Processes in which a channel layer is used: some consumers, a sender, or both.

    python -m benchmarks.channel_layers LAYER CONSUMERS SENDS ACKNOWLEDGEMENTS

Every layer is driven by the same loops. A consumer receives, notes the time, and receives again. A
process reads one command a line from its standard input and answers each with one line; commands
are JSON, so that sender and consumers can be the same process or two.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.figures import percentile
from benchmarks.recording import LostEvents

GROUP = "benchmark"
BODY = "x" * 100
CAPACITY = 1_000_000
"""So that nothing is dropped while a sender is ahead of the consumers."""
SENDERS = 20
TIMEOUT = 30.0
"""Seconds after which a message counts as lost."""


# -- the layers ------------------------------------------------------------------------------------


def memory() -> Any:
    from channels.layers import InMemoryChannelLayer

    return InMemoryChannelLayer(capacity=CAPACITY)


def redis_hosts() -> list[dict[str, Any]]:
    # redis-py 8 gives up reading after 5 s, which is how long channels_redis' core has it wait.
    return [{"address": os.environ["BENCHMARK_REDIS"], "socket_timeout": None}]


def redis_core() -> Any:
    from channels_redis.core import RedisChannelLayer

    return RedisChannelLayer(hosts=redis_hosts(), capacity=CAPACITY)


def redis_pubsub() -> Any:
    from channels_redis.pubsub import RedisPubSubChannelLayer

    return RedisPubSubChannelLayer(hosts=redis_hosts())


def channels_postgres() -> Any:
    from channels_postgres.core import PostgresChannelLayer
    from django.db import connection

    return PostgresChannelLayer(**{**connection.settings_dict, "TIME_ZONE": None})


def ours() -> Any:
    from django_pgnotify.layers import PostgresChannelLayer

    return PostgresChannelLayer(capacity=CAPACITY)


LAYERS = {
    "memory": memory,
    "redis-core": redis_core,
    "redis-pubsub": redis_pubsub,
    "channels-postgres": channels_postgres,
    "ours": ours,
}


# -- in the process --------------------------------------------------------------------------------


class Acknowledgements:
    """How many messages all consumers have received; in this process, or over a socket from it."""

    def __init__(self, descriptor: int, sends: bool, consumes: bool) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        self._socket = None if sends and consumes else socket.socket(fileno=descriptor)
        if self._socket is not None and sends:
            asyncio.get_running_loop().add_reader(self._socket, self._read, self._socket)

    def add(self) -> None:
        if self._socket is None:
            self._added(1)
        else:
            self._socket.send(b".")

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while self._count < count:
                self._changed.clear()
                await self._changed.wait()
        self._count -= count

    def _read(self, source: socket.socket) -> None:
        self._added(len(source.recv(65536)))

    def _added(self, count: int) -> None:
        self._count += count
        self._changed.set()


class Round:
    """What the consumers receive of ``count`` messages; each acknowledged if the sender asks."""

    def __init__(self, name: str, count: int, consumers: int, acknowledge: bool) -> None:
        self.name = name
        self.left = count * consumers
        self.finished = asyncio.Event()
        self.last = 0
        self.latencies: list[int] = []
        self._consumers = consumers
        self._acknowledge = acknowledge

    def took(self, sent: int, now: int) -> bool:
        """Whether this was the last delivery of a message that the sender waits for."""
        self.latencies.append(now - sent)
        self.left -= 1
        self.last = now
        if not self.left:
            self.finished.set()
        return self._acknowledge and self.left % self._consumers == 0


class Peer:
    """The process: commands, and what they need."""

    def __init__(self, layer: Any, acknowledgements: Acknowledgements) -> None:
        self._layer = layer
        self._acknowledgements = acknowledgements
        self._round = Round("", 0, 1, False)
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, count: int) -> dict[str, Any]:
        """Have ``count`` more consumers."""
        for _ in range(count):
            channel = await self._layer.new_channel()
            await self._layer.group_add(GROUP, channel)
            self._tasks.add(asyncio.create_task(self._consume(channel), name=channel))
        return {}

    async def expect(self, name: str, count: int, acknowledge: bool) -> dict[str, Any]:
        """Begin a round; messages of another name do not count."""
        self._round = Round(name, count, len(self._tasks), acknowledge)
        return {}

    async def send(self, name: str, count: int, way: str) -> dict[str, Any]:
        begun = time.monotonic_ns()
        match way:
            case "one":
                for _ in range(count):
                    await self._send(name)
            case "many":
                await asyncio.gather(
                    *(self.send(name, count // SENDERS, "one") for _ in range(SENDERS))
                )
            case "acknowledged":
                for _ in range(count):
                    await self._send(name)
                    await self._acknowledgements.wait_for(1)
        return {"begun": begun}

    async def result(self, timeout: float) -> dict[str, Any]:
        """The round's figures, once everything has arrived; what is missing if that takes long."""
        try:
            async with asyncio.timeout(timeout):
                await self._round.finished.wait()
        except TimeoutError:
            for task in self._tasks:
                if task.done():
                    await task  # why it receives no more
            return {"left": self._round.left}
        return {
            "left": 0,
            "last": self._round.last,
            "p50": percentile(self._round.latencies, 50),
            "p99": percentile(self._round.latencies, 99),
        }

    async def _send(self, name: str) -> None:
        sent = time.monotonic_ns()
        message = {"type": "benchmark.message", "name": name, "body": BODY, "sent": sent}
        await self._layer.group_send(GROUP, message)

    async def _consume(self, channel: str) -> None:
        now = time.monotonic_ns
        while True:
            message = await self._layer.receive(channel)
            received = now()
            current = self._round
            if message["name"] == current.name and current.took(message["sent"], received):
                self._acknowledgements.add()


async def serve(name: str, consumers: int, sends: bool, descriptor: int) -> None:
    peer = Peer(LAYERS[name](), Acknowledgements(descriptor, sends, consumers > 0))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        command, arguments = json.loads(line)
        try:
            answer = await getattr(peer, command)(**arguments)
        except Exception as exc:  # noqa: BLE001 - the table tells of it
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), flush=True)
    os._exit(0)  # layers differ in how they end, and nothing of that is measured


def main(name: str, consumers: int, sends: bool, descriptor: int) -> None:
    import django

    django.setup()
    asyncio.run(serve(name, consumers, sends, descriptor))


# -- the driver's side -----------------------------------------------------------------------------


class Driven:
    """A layer in use: one process for both sides, or one for each."""

    def __init__(self, sender: subprocess.Popen[str], consumers: subprocess.Popen[str]) -> None:
        self._sender = sender
        self._consumers = consumers
        self._rounds = 0

    def set_up(self, count: int) -> None:
        """``count`` consumers that have each received something.

        One of them first: channels_postgres would have a listener for each that begins before
        the first one listens.
        """
        for more in (1, count - 1):
            _ask(self._consumers, "join", count=more)
            self._until_heard()

    def _until_heard(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            name = self._begin(1, acknowledge=False)
            _ask(self._sender, "send", name=name, count=1, way="one")
            if not _ask(self._consumers, "result", timeout=1.0)["left"]:
                return
        raise LostEvents("no consumer hears anything")

    def rate(self, count: int, way: str) -> float:
        """Messages a second, from before the first is sent to the last delivery."""
        if count % SENDERS:
            raise ValueError(f"count={count}: {SENDERS} senders share it")
        name = self._begin(count, acknowledge=False)
        begun: int = _ask(self._sender, "send", name=name, count=count, way=way)["begun"]
        last: int = self._result()["last"]
        return count / (last - begun) * 1e9

    def latencies(self, count: int) -> tuple[float, float]:
        """p50 and p99 in µs, each message being sent when the one before has arrived."""
        name = self._begin(count, acknowledge=True)
        _ask(self._sender, "send", name=name, count=count, way="acknowledged")
        result = self._result()
        return result["p50"] / 1e3, result["p99"] / 1e3

    def _begin(self, count: int, *, acknowledge: bool) -> str:
        self._rounds += 1
        name = f"round {self._rounds}"
        _ask(self._consumers, "expect", name=name, count=count, acknowledge=acknowledge)
        return name

    def _result(self) -> dict[str, Any]:
        result = _ask(self._consumers, "result", timeout=TIMEOUT)
        if result["left"]:
            raise LostEvents(f"{result['left']} deliveries are missing after {TIMEOUT:g} s")
        return result


@contextmanager
def driven(
    layer: str, consumers: int, *, separate: bool, environ: Mapping[str, str]
) -> Iterator[Driven]:
    """Start a layer of LAYERS with its consumers, ready to be measured."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())

        def start(consumers: int, sends: bool, end: socket.socket) -> subprocess.Popen[str]:
            return stack.enter_context(_process(layer, consumers, sends, end.fileno(), environ))

        if separate:
            running = Driven(start(0, True, ours), start(consumers, False, theirs))
        else:
            both = start(consumers, True, ours)
            running = Driven(both, both)
        running.set_up(consumers)
        yield running


@contextmanager
def _process(
    layer: str, consumers: int, sends: bool, descriptor: int, environ: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    arguments = (layer, str(consumers), str(int(sends)), str(descriptor))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.channel_layers", *arguments],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor],
        text=True,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _ask(process: subprocess.Popen[str], command: str, **arguments: Any) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([command, arguments]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of a layer has ended in {command!r}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise LostEvents(f"{answer['error']} in {command!r}")
    return answer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
