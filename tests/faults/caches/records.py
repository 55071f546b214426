"""What writers, readers and the prober note down, and how it is kept on disk.

Times are nanoseconds of CLOCK_MONOTONIC, which is one clock for all processes of a machine. A
*stamp* names one attempt to write one row; a row carries the stamp of its last write, and a cached
value is that stamp. 0 is the stamp of a row that was never written.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COMMITTED, ROLLED_BACK, IN_DOUBT, KILLED = range(4)
"""What became of a write, as its writer knows it. KILLED: it never learned; nothing was noted."""

LOADED = 1
"""Flag of a read: the loader ran, so the value did not come from a cache."""

_READ = struct.Struct("=qqqHBB")
_WRITE = struct.Struct("=qqqqqHBB")
_FLUSH = 400


class Read(NamedTuple):
    """One look at a cached row."""

    begun: int
    ended: int
    stamp: int
    row: int
    way: int
    flags: int


class Write(NamedTuple):
    """One attempt to write a row.

    ``locked``: when its row lock was held, so everything before was committed or gone;
    ``leaving``: just before COMMIT was sent; ``done``: when the outermost block had returned, or
    raised. ``before`` is the stamp that it replaces.
    """

    stamp: int
    before: int
    locked: int
    leaving: int
    done: int
    row: int
    node: int
    outcome: int


class Probe(NamedTuple):
    """A tag that was invalidated from outside, and seen to be so in a node's table."""

    published: int
    """When its publication began."""
    seen: int
    """When the table was found to have it."""


class ReadLog:
    """Appends reads to a file of this process, some hundreds at a time."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []

    def add(self, read: Read) -> None:
        self._waiting.append(_READ.pack(*read))
        if len(self._waiting) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        os.write(self._file, b"".join(self._waiting))
        self._waiting.clear()


class WriteLog:
    """Appends writes to a file of this process.

    An attempt is noted twice: as KILLED just before COMMIT, and once its outcome is known. Each
    note is one write(), whole even if we are killed next.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, writes: list[Write]) -> None:
        os.write(self._file, b"".join(_WRITE.pack(*write) for write in writes))


def reads(path: Path) -> Iterator[Read]:
    data = path.read_bytes()
    whole = len(data) - len(data) % _READ.size  # its last block may have been cut by a kill
    return map(Read._make, _READ.iter_unpack(data[:whole]))


def writes(path: Path) -> dict[int, Write]:
    """By stamp; the last note of an attempt counts."""
    return {write.stamp: write for write in map(Write._make, _WRITE.iter_unpack(path.read_bytes()))}
