"""What `make demo-check` does with the running demo: one change, followed to everywhere it goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from http.cookiejar import CookieJar
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPCookieProcessor, Request, build_opener

import psycopg
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Origin

from .supervisor import Demo, DemoError

DEADLINE = 15.0  # seconds, for each hop
POLL_EVERY = 0.002

T = TypeVar("T")


class MissingError(DemoError):
    """A hop was not seen within its deadline."""


class Browser:
    """Cookies, CSRF and a login, as a person's browser has them, on one web process."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._cookies = CookieJar()
        self._opener = build_opener(HTTPCookieProcessor(self._cookies))

    async def get(self, path: str) -> str:
        return await self._open(Request(self.base + path))

    async def get_json(self, path: str) -> Any:
        return json.loads(await self.get(path))

    async def post(self, path: str, *, accept: str = "text/html", **form: str) -> str:
        token = next(cookie.value for cookie in self._cookies if cookie.name == "csrftoken")
        body = urlencode({**form, "csrfmiddlewaretoken": token or ""}).encode()
        return await self._open(Request(self.base + path, body, {"Accept": accept}))

    async def post_json(self, path: str) -> Any:
        return json.loads(await self.post(path, accept="application/json"))

    async def log_in(self) -> None:
        login = "/admin/login/?next=/admin/"
        await self.get(login)
        page = await self.post(login, username="admin", password="admin", next="/admin/")
        if "Back office" not in page or "Log in" in page:
            raise DemoError(f"{self.base}{login} did not let admin in")

    async def _open(self, request: Request) -> str:
        def read() -> str:
            with self._opener.open(request, timeout=DEADLINE) as answer:
                body: bytes = answer.read()
                return body.decode()

        try:
            return await asyncio.to_thread(read)
        except HTTPError as error:
            raise DemoError(f"{request.get_method()} {request.full_url}: {error}") from error
        except URLError as error:
            raise DemoError(f"{request.full_url}: {error.reason}") from error


class Board:
    """A board's websocket; every message is kept with the moment it came."""

    def __init__(self, name: str, socket: ClientConnection) -> None:
        self.name = name
        self._socket = socket
        self._messages: list[tuple[float, dict[str, Any]]] = []
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read(), name=f"websocket of {name}")

    async def _read(self) -> None:
        async for text in self._socket:
            async with self._news:
                self._messages.append((time.time(), json.loads(text)))
                self._news.notify_all()

    async def message(self, type_: str, **wanted: Any) -> float:
        """Wait for a message with these values, and return when it came."""

        def find() -> float | None:
            for moment, message in self._messages:
                if message["type"] == type_ and wanted.items() <= message.items():
                    return moment
            return None

        try:
            async with asyncio.timeout(DEADLINE), self._news:
                await self._news.wait_for(lambda: find() is not None)
        except TimeoutError:
            came = [message["type"] for _, message in self._messages] or "nothing"
            raise MissingError(
                f"the websocket of {self.name} got no {type_!r} message with {wanted} within "
                f"{DEADLINE:g} s (it got: {came})"
            ) from None
        moment = find()
        assert moment is not None
        return moment

    async def close(self) -> None:
        await self._socket.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


class Desk:
    """A stream of server-sent events of the courier desk, as a browser reads one."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.name = name
        self.last_id = ""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, name: str, base: str, last_id: str = "") -> Desk:
        """Connect; every parcel from here on will be told of."""
        address = urlsplit(base)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        lines = ["GET /courier/events/ HTTP/1.1", f"Host: {address.netloc}"]
        lines += [f"Last-Event-ID: {last_id}"] if last_id else []
        writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(DEADLINE):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
        if "200" not in head.split("\r\n")[0]:
            raise DemoError(f"{base}/courier/events/ answered {head!r}")
        desk = cls(name, reader, writer)
        if not last_id:
            while not desk.last_id:
                await desk._field()
        return desk

    async def parcel(self, pk: int) -> float:
        """Wait for the parcel of an order, and return when it came."""
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    name, value = await self._field()
                    if name == "data" and json.loads(value)["data"]["order"] == pk:
                        return time.time()
        except (TimeoutError, asyncio.IncompleteReadError):
            raise MissingError(
                f"the stream of {self.name} told of no parcel of order {pk} within {DEADLINE:g} s"
            ) from None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _field(self) -> tuple[str, str]:
        """The next line that has a field; lines of the chunked encoding have none."""
        while True:
            line = (await self._reader.readuntil(b"\n")).decode().rstrip("\r\n")
            name, colon, value = line.partition(": ")
            if name == "id":
                self.last_id = value
            if colon:
                return name, value


async def until(what: str, probe: Callable[[], Awaitable[T | None]]) -> tuple[T, float]:
    """Ask until there is an answer; return it and when it was seen."""
    deadline = time.monotonic() + DEADLINE
    while (answer := await probe()) is None:
        if time.monotonic() > deadline:
            raise MissingError(f"{what} within {DEADLINE:g} s")
        await asyncio.sleep(POLL_EVERY)
    return answer, time.time()


class Report:
    """Prints a line per hop as it is known, and keeps what went wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    async def hop(self, label: str, start: float, arrival: Coroutine[Any, Any, float]) -> None:
        try:
            took = f"{max(0.0, (await arrival - start) * 1000):8.1f} ms"
        except DemoError as problem:
            took = " MISSING"
            self.problems.append(str(problem))
        print(f"  {label:<58}{took}", flush=True)


async def drive(demo: Demo) -> list[str]:
    """Follow a change through the demo; return what was missing, an empty list if nothing was."""
    report = Report()
    (name_1, url_1), (name_2, url_2) = demo.webs.items()
    browser, other = Browser(url_1), Browser(url_2)
    await browser.log_in()
    boards: list[Board] = []
    database = await psycopg.AsyncConnection.connect(demo.database_url, autocommit=True)
    try:
        for name, url in demo.webs.items():
            socket = await connect(f"ws{url.removeprefix('http')}/ws/board/", origin=Origin(url))
            boards.append(Board(name, socket))
        for board in boards:
            await board.message("snapshot")
        board_1, board_2 = boards

        pk = (await browser.post_json("/orders/place/"))["pk"]
        for board in boards:
            await board.message("order", pk=pk, status="new")
        await summary_is(other, await counts(database), from_cache=True)

        # One button on web process 1, followed to everywhere it goes.
        watch = asyncio.create_task(seen_slip(database, pk))
        start = (await browser.post_json(f"/orders/{pk}/advance/"))["committed_at"]
        expected = await counts(database)
        fresh = asyncio.create_task(summary_is(other, expected))
        origin = f"commit on {name_1} →"
        await report.hop(f"{origin} receiver's packing slip in the database", start, joined(watch))
        for board in (board_1, board_2):
            arrival = board.message("order", pk=pk, status="paid")
            await report.hop(f"{origin} browser on {board.name}", start, arrival)
        await report.hop(f"{origin} cached summary of {name_2} is fresh", start, joined(fresh))
        await summary_is(other, expected, from_cache=True)

        # The same through the admin.
        start = time.time()
        await browser.post("/admin/shop/order/", action="advance", _selected_action=str(pk))
        arrival = board_2.message("order", pk=pk, status="packed")
        await report.hop(f"admin action sent to {name_1} → browser on {name_2}", start, arrival)

        # A parcel, as a server-sent event of a durable topic; and one for whoever was away.
        desk = await Desk.open(name_2, url_2)
        try:
            start = (await browser.post_json(f"/orders/{pk}/advance/"))["committed_at"]
            await report.hop(f"{origin} event stream on {name_2}", start, desk.parcel(pk))
        finally:
            await desk.close()
        missed = await shipped_elsewhere(browser)
        start = time.time()
        desk = await Desk.open(name_1, url_1, desk.last_id)
        try:
            label = f"event stream resumed on {name_1} → the parcel it missed"
            await report.hop(label, start, desk.parcel(missed))
        finally:
            await desk.close()

        # And a NOTIFY of somebody who has never heard of Django.
        job = f"roast 20 kg for O'Brien {uuid.uuid4().hex[:8]}"
        watch = asyncio.create_task(seen_job(demo.database_url, job))
        start = time.time()
        await database.execute("SELECT pg_notify('jobs', %s)", [job])
        await report.hop(
            "foreign NOTIFY jobs → receiver's row in the database", start, joined(watch)
        )
    except MissingError as problem:
        report.problems.append(str(problem))
    finally:
        for board in boards:
            await board.close()
        await database.close()
    return report.problems


async def shipped_elsewhere(browser: Browser) -> int:
    """Place an order and take it to the courier; its key."""
    pk: int = (await browser.post_json("/orders/place/"))["pk"]
    for _ in range(3):
        await browser.post_json(f"/orders/{pk}/advance/")
    return pk


async def joined(task: asyncio.Task[float]) -> float:
    return await task


async def counts(database: psycopg.AsyncConnection[Any]) -> dict[str, int]:
    rows = await database.execute("SELECT status, count(*) FROM shop_order GROUP BY status")
    return dict(await rows.fetchall())


async def summary_is(
    browser: Browser, expected: dict[str, int], from_cache: bool | None = None
) -> float:
    """Wait for the summary to show these orders, out of the cache if asked; return when."""

    async def probe() -> bool | None:
        figures = await browser.get_json("/summary.json")
        shown = {status: count for status, count in figures["by_status"].items() if count}
        right = shown == expected and from_cache in (None, figures["from_cache"])
        return right or None

    cached = " out of its cache" if from_cache else ""
    _, moment = await until(f"{browser.base}/summary.json did not show {expected}{cached}", probe)
    return moment


async def seen_slip(database: psycopg.AsyncConnection[Any], pk: int) -> float:
    async def probe() -> Any:
        rows = await database.execute("SELECT 1 FROM shop_packingslip WHERE order_id = %s", [pk])
        return await rows.fetchone()

    _, moment = await until(f"the receiver wrote no packing slip for order {pk}", probe)
    return moment


async def seen_job(database_url: str, text: str) -> float:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as database:

        async def probe() -> Any:
            rows = await database.execute(
                "SELECT 1 FROM shop_activity WHERE kind = 'job' AND text = %s", [text]
            )
            return await rows.fetchone()

        _, moment = await until("the receiver of 'jobs' wrote no row for a foreign NOTIFY", probe)
        return moment
