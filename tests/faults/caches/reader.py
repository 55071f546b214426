"""A reader: one look after the other through all ways, in a thread and in an event loop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections import Counter
from pathlib import Path

from django.core.cache import caches
from django.db import Error, connection, connections, transaction

from tests.faults.caches.models import NUMBERS, stamp_of
from tests.faults.caches.records import ReadLog
from tests.faults.caches.ways import Way, atimed, timed

MOST_LOOKS = 20
"""Looks at a row by one way before it is another's turn, so that there are hits to be judged."""
LONGEST_PAUSE = 0.004
PAUSE_AFTER_FAILURE = 0.05
IN_THE_PAST = 0.1
"""Share of the rounds that begin in a transaction of which the snapshot grows old."""
LONGEST_PAST = 0.3
TASKS = 2
"""Looks that the event loop has under way at once."""


class Reader:
    """Reads until :attr:`stopping`; its records go to files of this process."""

    def __init__(self, name: str, seed: str, folder: Path, ways: list[Way]) -> None:
        self._name = f"{name}-{os.getpid()}"
        self._seed = f"{seed} {os.getpid()}"
        self._folder = folder
        self._ways = ways
        self.failed: Counter[str] = Counter()
        self.stopping = threading.Event()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._look_on, name="sync"),
            threading.Thread(target=asyncio.run, args=(self._look_on_async(),), name="async"),
        ]
        for thread in threads:
            thread.start()
        # The main thread is woken by signals, which a thread that is joined is not.
        while not self.stopping.wait(0.5):
            pass
        for thread in threads:
            thread.join()
        (self._folder / f"{self._name}.stats").write_text(json.dumps(near_stats()))

    def _look_on(self) -> None:
        chance = random.Random(f"sync {self._seed}")
        log = ReadLog(self._folder / f"{self._name}-sync.reads")
        while not self.stopping.is_set():
            number, row = chance.randrange(len(self._ways)), chance.choice(NUMBERS)
            if chance.random() < IN_THE_PAST:
                self._look_in_the_past(self._ways[number], row, chance)
            for _ in range(chance.randint(1, MOST_LOOKS)):
                try:
                    log.add(timed(self._ways[number], number, row))
                except Error as exc:
                    self._note_failure(exc)
                    connection.close()
                    self.stopping.wait(PAUSE_AFTER_FAILURE)
                self.stopping.wait(chance.uniform(0.0, LONGEST_PAUSE))
        log.flush()
        connections.close_all()

    def _look_in_the_past(self, way: Way, row: int, chance: random.Random) -> None:
        """Read in a transaction that sees an old snapshot; what it loads is nobody else's to see.

        It is not judged: such a transaction wants to see what was.
        """
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                stamp_of(row)
                self.stopping.wait(chance.uniform(0.0, LONGEST_PAST))
                way.read(row)
        except Error as exc:
            self._note_failure(exc)
            connection.close()

    async def _look_on_async(self) -> None:
        from asgiref.sync import sync_to_async

        chance = random.Random(f"async {self._seed}")
        log = ReadLog(self._folder / f"{self._name}-async.reads")
        numbers = [number for number, way in enumerate(self._ways) if way.aread is not None]

        async def look() -> None:
            while not self.stopping.is_set():
                number, row = chance.choice(numbers), chance.choice(NUMBERS)
                for _ in range(chance.randint(1, MOST_LOOKS)):
                    try:
                        log.add(await atimed(self._ways[number], number, row))
                    except Error as exc:
                        self._note_failure(exc)
                        await sync_to_async(connection.close)()
                        await asyncio.sleep(PAUSE_AFTER_FAILURE)
                    await asyncio.sleep(chance.uniform(0.0, LONGEST_PAUSE))

        if numbers:
            await asyncio.gather(*(look() for _ in range(TASKS)))
        log.flush()
        await sync_to_async(connections.close_all)()

    def _note_failure(self, exc: Error) -> None:
        self.failed[type(exc).__name__] += 1


def near_stats() -> dict[str, dict[str, int]]:
    """By alias, what the near caches of this process have counted."""
    return {
        alias: stats()
        for alias in caches
        if callable(stats := getattr(caches[alias], "stats", None))
    }


def fork_readers(count: int, name: str, seed: str, folder: Path, ways: list[Way]) -> None:
    """Fill the caches of this process, and fork: each child begins with what was inherited."""
    for way in ways:
        for row in NUMBERS:
            way.read(row)
    connections.close_all()
    children = []
    for _ in range(count):
        if (pid := os.fork()) == 0:
            _read_until_terminated(Reader(name, seed, folder, ways))
            os._exit(0)
        children.append(pid)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("reading", flush=True)
    signal.sigwait({signal.SIGTERM})
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(ends):
        raise SystemExit(f"forked readers ended with {ends}")


def read_here(name: str, seed: str, folder: Path, ways: list[Way]) -> None:
    _read_until_terminated(Reader(name, seed, folder, ways), "reading")


def _read_until_terminated(reader: Reader, announcement: str = "") -> None:
    signal.signal(signal.SIGTERM, lambda *_: reader.stopping.set())
    if announcement:
        print(announcement, flush=True)
    reader.run()
