"""The processes of the demo: started, watched, and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from .embedded import HOST, EmbeddedPostgres, can_hold_data, free_port

ROOT = Path(__file__).resolve().parent.parent
DEMO_DIR = ROOT / ".demo"
FIRST_PORT = 8000

READY_WITHIN = 60.0  # seconds, for each child
STOP_WITHIN = 15.0

COLOURS = {"pglisten": 35, "web 1": 36, "web 2": 34, "simulate": 33}


class DemoError(Exception):
    """Something did not start, ended before it should, or did not do what it should.

    The message is the cause; ``witnesses`` are the children whose logs may say more.
    """

    def __init__(self, cause: str, *witnesses: Child) -> None:
        super().__init__(cause)
        self.witnesses = witnesses


@dataclass
class Child:
    """One process of the demo, its log lines prefixed with its name."""

    name: str
    process: asyncio.subprocess.Process
    echo: bool
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=25))
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def start(
        cls, name: str, *argv: str, env: dict[str, str], ready: str | None, echo: bool = True
    ) -> Child:
        """Run ``python argv``; ``ready`` is in the line that says it is."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *argv,
            env=env,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Ctrl-C in the terminal comes to us alone: we stop the children, in order, once.
            start_new_session=True,
        )
        child = cls(name, process, echo)
        child.pump = asyncio.create_task(child._pump(ready), name=f"log of {name}")
        return child

    pump: asyncio.Task[None] = field(init=False)

    async def _pump(self, ready: str | None) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.tail.append(line)
            if self.echo:
                say(line, self.name)
            if ready is not None and ready in line:
                self.ready.set()
        await self.process.wait()
        self.ended.set()

    async def wait_ready(self) -> None:
        await first_of(READY_WITHIN, self.ready.wait(), self.ended.wait())
        if not self.ready.is_set():
            raise DemoError(
                self.obituary()
                if self.ended.is_set()
                else f"{self.name} was not ready within {READY_WITHIN:g} s",
                self,
            )

    async def stop(self) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            await first_of(STOP_WITHIN, self.ended.wait())
        if not self.ended.is_set():
            say(f"{self.name} did not stop within {STOP_WITHIN:g} s: killed")
            self.kill()
            await self.process.wait()
        await self.pump

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def obituary(self) -> str:
        return f"{self.name} ended with exit code {self.process.returncode}"

    def show_log(self) -> None:
        """Its last lines, unless they have been on the screen already."""
        if not self.echo:
            for line in self.tail:
                say(line, self.name)


@dataclass
class Demo:
    """The running whole."""

    database_url: str
    database: str
    psql: str
    webs: dict[str, str]
    env: dict[str, str]
    children: list[Child] = field(default_factory=list)

    async def any_ended(self) -> Child:
        """Return the first child that ends."""
        waits = {
            asyncio.create_task(child.ended.wait(), name=f"end of {child.name}"): child
            for child in self.children
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return waits[done.pop()]
        finally:
            for task in waits:
                task.cancel()


@contextlib.asynccontextmanager
async def running(*, check: bool, simulate: bool, version: int) -> AsyncIterator[Demo]:
    """Start everything, in order; stop everything, in the opposite order."""
    async with contextlib.AsyncExitStack() as stack:
        folder = DEMO_DIR
        if check:
            # Beside a demo that may be running, and leaving nothing behind.
            folder = Path(tempfile.mkdtemp(prefix="pgnotify-demo-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)

        url, database, psql = await database_of(stack, folder, check, version)
        names = ("web 1", "web 2")
        ports = [free_port() for _ in names] if check else free_ports_from(FIRST_PORT, len(names))
        webs = {name: f"http://{HOST}:{port}" for name, port in zip(names, ports, strict=True)}
        env = {
            **os.environ,
            "DATABASE_URL": url,
            "DEMO_DIR": str(folder),
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
            "PYTHONUNBUFFERED": "1",
        }
        demo = Demo(url, database, psql, webs, env)

        for command in (["migrate", "--verbosity", "0"], ["seed"]):
            await finished(command[0], "manage.py", *command, env=env, echo=not check)

        async def launch(name: str, *argv: str, ready: str | None, **extra: str) -> Child:
            child = await Child.start(
                name, *argv, env={**env, **extra}, ready=ready, echo=not check
            )
            demo.children.append(child)
            stack.push_async_callback(child.stop)
            return child

        started = [await launch("pglisten", "manage.py", "pglisten", ready="pglisten: ready")]
        for name, port in zip(names, ports, strict=True):
            others = [
                f"{other.replace(' ', '_')}={webs[other]}" for other in names if other != name
            ]
            started.append(
                await launch(
                    name,
                    *("-m", "daphne", "-b", HOST, "-p", str(port)),
                    "example_project.asgi:application",
                    ready="Listening on TCP address",
                    WEB_NAME=name,
                    WEB_PEERS=" ".join(others),
                )
            )
        for child in started:
            await child.wait_ready()
        if simulate:
            await launch("simulate", "manage.py", "simulate", ready=None)
        yield demo
        if not check:
            say("stopping")


async def database_of(
    stack: contextlib.AsyncExitStack, folder: Path, check: bool, version: int
) -> tuple[str, str, str]:
    """The URL of the database, what to call its server, and a psql."""
    if url := os.environ.get("DATABASE_URL"):
        try:
            async with await psycopg.AsyncConnection.connect(url, connect_timeout=10) as connection:
                release = connection.info.parameter_status("server_version")
        except psycopg.Error as error:
            cause = " ".join(str(error).split())
            raise DemoError(f"the server of DATABASE_URL does not answer: {cause}") from error
        return url, f"PostgreSQL {release} of DATABASE_URL", "psql"
    data_dir: Path | None = folder / f"postgresql-{version}"
    if check:
        data_dir = None
    elif not can_hold_data(folder):
        data_dir = None
        say(f"{folder} is closed to the user that runs PostgreSQL: data is temporary this time")
    server = EmbeddedPostgres(data_dir, version)
    stack.callback(server.close)
    await asyncio.to_thread(server.start)
    url = await asyncio.to_thread(server.create_database, "shop")
    if not check:
        note = folder / "database-url"
        note.write_text(url + "\n")
        stack.callback(note.unlink, missing_ok=True)
    release = await asyncio.to_thread(server.execute, "SHOW server_version")
    return url, f"embedded PostgreSQL {release}, {url}", shutil.which("psql") or str(server.psql)


async def finished(name: str, *argv: str, env: dict[str, str], echo: bool) -> None:
    """Run a command to its end."""
    child = await Child.start(name, *argv, env=env, ready=None, echo=echo)
    try:
        await child.ended.wait()
    finally:
        await child.stop()
    if child.process.returncode:
        raise DemoError(child.obituary(), child)


async def first_of(seconds: float, *waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for one of them, or for the time to pass."""
    tasks = [asyncio.create_task(wait, name="one of several") for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def free_ports_from(first: int, count: int) -> list[int]:
    """The first ports from ``first`` on that nobody listens on."""
    ports: list[int] = []
    for port in range(first, first + 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise DemoError(f"no free port from {first} on")


def say(text: str, who: str = "demo") -> None:
    prefix = f"{who:>8} |"
    if sys.stdout.isatty():
        prefix = f"\033[{COLOURS.get(who, 1)}m{prefix}\033[0m"
    print(prefix, text, flush=True)
