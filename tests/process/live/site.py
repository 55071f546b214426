"""Starts the site under daphne or uvicorn, and reads its streams over HTTP."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, Self

from example_project.embedded import free_port
from tests.integration.streaming import DEADLINE, Browser
from tests.processes import Process, database_environ, python

HOST = "127.0.0.1"
APPLICATION = "tests.process.live.asgi:application"
COMMANDS = {
    "daphne": ["daphne", "-b", HOST, "-p", "{port}", APPLICATION],
    # It waits for its streams to end by themselves otherwise, and they do not.
    "uvicorn": [
        *("uvicorn", "--host", HOST, "--port", "{port}", "--timeout-graceful-shutdown", "1"),
        *("--lifespan", "off", APPLICATION),
    ],
}
READY = {"daphne": "Listening on TCP address", "uvicorn": "Uvicorn running on"}


class Site:
    """One server process; it can be stopped and started again on its port."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.process: Process

    def start(self) -> Self:
        command = [part.format(port=self.port) for part in COMMANDS[self.kind]]
        environ = {"DJANGO_SETTINGS_MODULE": "tests.process.live.settings", "PYTHONUNBUFFERED": "1"}
        self.process = python("-m", *command, env={**database_environ(), **environ})
        self.process.wait_for_line(READY[self.kind])
        return self

    def stop(self) -> None:
        self.process.terminate()

    async def restart(self) -> None:
        await asyncio.to_thread(self.stop)
        await asyncio.to_thread(self.start)

    # -- HTTP ---------------------------------------------------------------------------------

    async def get(self, path: str, **headers: str) -> Answer:
        """An answer with its whole body."""
        async with self.answer(path, **headers) as answer:
            async with asyncio.timeout(DEADLINE):
                body = b"".join([part async for part in answer.body])
            return answer._replace(text=body.decode())

    async def status(self) -> Any:
        return json.loads((await self.get("/status/")).text)

    @asynccontextmanager
    async def answer(self, path: str, **headers: str) -> AsyncIterator[Answer]:
        """An answer whose body is still to be read; at the end of the block we hang up."""
        reader, writer = await asyncio.open_connection(HOST, self.port, limit=2**16)
        try:
            lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}:{self.port}", "Connection: close"]
            lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode())
            await writer.drain()
            async with asyncio.timeout(DEADLINE):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            yield Answer(int(head[0].split()[1]), fields, _body(reader, fields))
        finally:
            writer.close()

    @asynccontextmanager
    async def watching(
        self, path: str, last_id: str = "", **headers: str
    ) -> AsyncIterator[Browser]:
        """A browser that has got the first chunk of a stream."""
        if last_id:
            headers["Last_Event_ID"] = last_id
        async with self.answer(path, **headers) as answer:
            assert answer.status == 200, answer
            browser = Browser(answer.body, last_id)
            while browser.retry is None:
                assert await browser.chunk()
            yield browser


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: AsyncIterator[bytes]
    text: str = ""


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    zipped = headers.get("content-encoding") == "gzip"
    if headers.get("transfer-encoding") != "chunked":
        body = await reader.read(-1)
        yield zlib.decompress(body, 31) if zipped else body
        return
    try:
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size)
            await reader.readexactly(2)
            yield chunk
    except (ValueError, asyncio.IncompleteReadError, ConnectionError):
        return  # the server has gone


@contextmanager
def serving(kind: str) -> Iterator[Site]:
    site = Site(kind).start()
    try:
        yield site
    finally:
        site.process.kill()
