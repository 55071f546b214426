"""When a receiver was called: a ring of timestamps in memory that listener and driver share.

To record is one store, so that it costs every variant the same and next to nothing; the driver
reads along without asking the listener anything. CLOCK_MONOTONIC is one clock for all processes
of a machine.
"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

SLOTS = 1 << 17
"""Calls that can be told apart before the ring begins anew; ``peers/libpq.c`` knows it too."""

VARIABLE = "BENCHMARK_RECORDING"
POLL = 0.0005


def _open(path: str | os.PathLike[str]) -> memoryview:
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), SLOTS * 8)).cast("q")


def recorder() -> Callable[[object], None]:
    """The receiver of a listener process: notes the time of each call."""
    times = _open(os.environ[VARIABLE])
    for _ in times[:: mmap.PAGESIZE // 8]:
        pass  # all of it is resident from here on, and does not pass for growth later
    place = itertools.count().__next__
    now = time.monotonic_ns
    mask = SLOTS - 1

    def record(event: object) -> None:
        times[place() & mask] = now()

    return record


class LostEvents(Exception):
    """Receivers were not called as often as they should have been."""


class Recording:
    """The driver's side; ``path`` is made here unless somebody else does."""

    def __init__(self, path: Path, *, make: bool = True) -> None:
        if make:
            path.write_bytes(bytes(SLOTS * 8))
        self.path = path
        self.environ = {VARIABLE: str(path)}
        self._times = _open(path)
        self._taken = 0
        self._latest = 0

    def take(self, count: int, timeout: float = 60.0) -> list[int]:
        """The times, in ns, of the next ``count`` calls; waits for them."""
        if count > SLOTS:
            raise ValueError(f"count={count}: the ring has {SLOTS} slots")
        if not self._arrived(count, timeout):
            arrived = sum(
                self._times[(self._taken + n) % SLOTS] > self._latest for n in range(count)
            )
            raise LostEvents(f"{arrived} of {count} calls within {timeout:g} s")
        times = [self._times[(self._taken + n) % SLOTS] for n in range(count)]
        self._taken += count
        self._latest = max(times)
        return times

    def _arrived(self, count: int, timeout: float) -> bool:
        last = (self._taken + count - 1) % SLOTS
        deadline = time.monotonic() + timeout
        while self._times[last] <= self._latest:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True
