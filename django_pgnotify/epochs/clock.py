"""The clocks of the epoch table: one that all processes of a node share, and one for stamps."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

WRITER_BITS = 12
"""The low bits of a stamp say who wrote it, so that two writers never write the same one."""

WRITERS = 1 << WRITER_BITS

NANOSECONDS = 1_000_000_000

# CLOCK_BOOTTIME goes on while the machine is suspended: a heartbeat of before is as old as it is.
node_clock: Callable[[], int] = (
    partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic_ns
)
"""Nanoseconds since the machine started, the same in all of its processes."""


def wall_clock() -> int:
    """Microseconds since 1970, the unit of a stamp's time."""
    return time.time_ns() // 1000


def time_of(stamp: int) -> int:
    """When a stamp was made, in microseconds since 1970."""
    return stamp >> WRITER_BITS


@cache
def boot_id() -> int:
    """64 bits that are new each time the machine starts; 0 where the system has no such thing."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return 0
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
