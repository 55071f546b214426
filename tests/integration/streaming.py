"""A browser without a browser: opens a stream in this process, and reads what it is sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from django.contrib.auth.models import AnonymousUser
from django.http.response import HttpResponseBase, StreamingHttpResponse
from django.test import AsyncRequestFactory

from django_pgnotify.streams.view import View

DEADLINE = 30.0
"""Seconds a wait may take; it is spent only by a test that fails."""


class Block(NamedTuple):
    """A block that a browser would tell the page of."""

    event: str
    data: Any
    id: str


class Browser:
    """Reads one stream as the WHATWG's standard says."""

    def __init__(self, body: AsyncIterator[bytes], last_id: str = "") -> None:
        self.last_id = last_id
        self.retry: int | None = None
        self.comments = 0
        self.silent_ids = 0
        self._body = body
        self._text = ""
        self._blocks: list[Block] = []

    async def block(self) -> Block | None:
        """The next block; None at the end."""
        while not self._blocks:
            if not await self.chunk():
                return None
        return self._blocks.pop(0)

    async def blocks(self, count: int) -> list[Block]:
        found: list[Block] = []
        async with asyncio.timeout(DEADLINE):
            while len(found) < count:
                block = await self.block()
                assert block is not None, f"the stream ended after {found}"
                found.append(block)
        return found

    def at_hand(self, most: int) -> list[Block]:
        """Up to ``most`` of those that have arrived."""
        found, self._blocks = self._blocks[:most], self._blocks[most:]
        return found

    async def data(self, count: int) -> list[Any]:
        """The ``data`` members of the next events."""
        blocks = await self.blocks(count)
        assert {block.event for block in blocks} <= {"message"}, blocks
        return [block.data["data"] for block in blocks]

    async def rest(self) -> list[Block]:
        """All to the end of the stream."""
        found = []
        async with asyncio.timeout(DEADLINE):
            while (block := await self.block()) is not None:
                found.append(block)
        return found

    async def chunk(self) -> bool:
        """Read on; False at the end."""
        async with asyncio.timeout(DEADLINE):
            chunk = await anext(self._body, None)
        if chunk is None:
            return False
        self._text += chunk.decode()
        *blocks, self._text = self._text.split("\n\n")
        for block in blocks:
            self._read(block)
        return True

    def _read(self, block: str) -> None:
        event, data = "message", []
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not name:
                self.comments += 1
            elif name == "event":
                event = value
            elif name == "data":
                data.append(value)
            elif name == "id":
                self.last_id = value
                self.silent_ids += "data: " not in block
            else:
                assert name == "retry", line
                self.retry = int(value)
        if data:
            self._blocks.append(Block(event, json.loads("\n".join(data)), self.last_id))


async def respond(
    view: View,
    query: str = "",
    *,
    last_id: str = "",
    user: Any = None,
    method: str = "GET",
    **kwargs: Any,
) -> HttpResponseBase:
    """What the view answers."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    request = AsyncRequestFactory().generic(method, f"/events/{query}", headers=headers)
    request.user = AnonymousUser() if user is None else user
    return await view(request, **kwargs)


@asynccontextmanager
async def watching(
    view: View, query: str = "", *, last_id: str = "", **options: Any
) -> AsyncIterator[Browser]:
    """A browser that has got the first chunk; at the end of the block it goes away."""
    response = await respond(view, query, last_id=last_id, **options)
    assert isinstance(response, StreamingHttpResponse), response
    body = aiter(response)
    browser = Browser(body, last_id)
    try:
        assert await browser.chunk()
        yield browser
    finally:
        await body.aclose()  # type: ignore[attr-defined]
        response.close()
        for _ in range(3):  # it leaves in the next steps of the loop
            await asyncio.sleep(0)


def is_id(text: str) -> bool:
    return re.fullmatch(r"[!-~]{20,3000}", text) is not None
