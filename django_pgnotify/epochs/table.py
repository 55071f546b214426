"""The epoch table: 64-bit words that all processes of a node read, and some of them write.

A name (of a tag, a key, …) has a slot, and its epoch is the word in it; names may share one. To
bump a name is to store a word there that was never there before. Whoever captured the epochs of
some names before they read a row, and finds them unchanged, knows that nobody has invalidated it
since. One word more, the global epoch, is part of every capture. The heartbeat says how far the
table is up to date: everything that was committed by then has been applied.

Each word is read and written by one machine instruction (aligned, eight bytes), so nothing is
locked between processes and a process that is stopped or dies keeps nobody waiting. A word is a
*stamp*: the time of day in microseconds and, in its low bits, who wrote it. Two writers never store
the same one, so a bump cannot be lost in another; and a value that was loaded on another node,
where epochs mean nothing here, can be judged by the time at which its load began.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from array import array
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, Self

from ..exceptions import InvalidArgument, InvalidEpochTable
from .clock import NANOSECONDS, WRITERS, boot_id, node_clock, time_of, wall_clock
from .mapped import (
    BOOT_ID,
    GLOBAL,
    HEADER_WORDS,
    HEARTBEAT,
    LATEST,
    SLOTS,
    TABLE_ID,
    claim_writer,
    identity_of,
    map_file,
)

logger = logging.getLogger("django_pgnotify.caching")

DEFAULT_SLOTS = 65_536

LOOK_EVERY = 50_000_000
"""Nanoseconds after which a reader looks whether the file is still the one it has mapped."""

_RETRY_AFTER = 1_000_000_000


class Lease(NamedTuple):
    """A moment before a value was loaded: what :meth:`EpochTable.settle` judges it by."""

    table: int
    everything: int
    """The global epoch."""
    latest: int
    """The last stamp that had been stored in the table."""
    at: int
    """Microseconds since 1970."""


class Snapshot(NamedTuple):
    """The epochs of some names at one moment: what a value that is loaded afterwards depends on."""

    names: tuple[str, ...]
    read: Any
    """Takes the words of the table to what ``epochs`` can be compared with."""
    epochs: tuple[int, ...]
    """The global epoch, and that of each name."""
    table: int
    """The id of the table that these are of; 0 where it was dead."""
    at: int
    """Microseconds since 1970."""


class EpochTable:
    """A table in a file that the processes of a node share, or in the memory of one.

    Attributes:
        words: header and slots, for the hit path alone; another object once the file was replaced.
        checked_until: reading of ``node_clock`` after which :meth:`verify` wants to be called.
        is_dead: whether there is no file behind it, so that nothing may be taken by it.
        path: of the file, None for a table in memory.
    """

    def __init__(self, words: memoryview, slots: int, path: str | None = None) -> None:
        self.words = words
        self.slots = slots
        self.path = path
        self.checked_until = 0 if path else 1 << 63
        self.is_dead = False
        self._owner = 0
        self._retry_at = 0
        self._identity = (0, 0, 0)
        self._problem = ""
        self._writer: int | None = None
        self._lock = threading.Lock()
        _tables.add(self)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], slots: int = DEFAULT_SLOTS, owner: str = ""
    ) -> Self:
        """The table in the file at ``path``, which is made where there is none.

        Any number of processes may do so at once. A table that was written before the machine
        started anew is kept and everything in it is stale.

        Args:
            slots: how many names have a slot of their own, about; 8 bytes each.
            owner: what the table is about, such as a database; another one's table is refused.

        Raises:
            InvalidEpochTable: the file cannot be made or mapped, is another user's, may be written
                to by others, has another size or owner, or is no table at all.
        """
        _check_slots(slots)
        table = cls.dead(os.fspath(path), slots, owner)
        table._map()
        return table

    @classmethod
    def in_process(cls, slots: int = DEFAULT_SLOTS) -> Self:
        """A table that no other process sees; a forked child begins anew."""
        _check_slots(slots)
        table = cls(_blank(slots), slots)
        table._begin()
        return table

    @classmethod
    def dead(cls, path: str, slots: int, owner: str = "") -> Self:
        """A table that has no heartbeat until its file can be mapped, which it tries."""
        table = cls(_blank(slots), slots, path)
        table._owner = _hash(owner) if owner else 0
        table.is_dead = True
        return table

    # -- names and epochs ---------------------------------------------------------------------

    def slot_of(self, name: str) -> int:
        """The slot of a name, from 0 to ``slots`` - 1; the same in every process and version."""
        return _hash(name) % self.slots

    def capture(self, names: Iterable[str]) -> Snapshot:
        """The epochs of ``names`` now. Capture first and read the value's source afterwards."""
        names = tuple(names)
        read = self.reader(names)
        words = self.words
        return Snapshot(names, read, read(words), words[TABLE_ID], wall_clock())

    def reader(self, names: Iterable[str]) -> Any:
        """What takes the words of the table to the epochs of ``names``, the global one first."""
        places = [HEADER_WORDS + _hash(name) % self.slots for name in names]
        return itemgetter(GLOBAL, *(places or [GLOBAL]))

    def is_current(self, snapshot: Snapshot) -> bool:
        """Whether none of the names has been bumped since."""
        return bool(snapshot.read(self.words) == snapshot.epochs)

    def bump(self, names: Iterable[str]) -> int:
        """Make stale what depends on any of ``names``; returns the stamp that was stored."""
        places = list({HEADER_WORDS + _hash(name) % self.slots for name in names})
        self._look()
        stamp = self._store(places[:_TOGETHER])
        for start in range(_TOGETHER, len(places), _TOGETHER):
            stamp = self._store(places[start : start + _TOGETHER])
        return stamp

    def bump_all(self) -> int:
        """Make everything stale."""
        self._look()
        return self._store((GLOBAL,))

    def lease(self) -> Lease:
        """This moment. Take a lease first, load a value afterwards, and settle it then."""
        words = self.words
        latest = words[LATEST]
        return Lease(words[TABLE_ID], words[GLOBAL], latest, wall_clock())

    def settle(self, lease: Lease, names: Iterable[str]) -> Snapshot | None:
        """The epochs of ``names`` at the time of ``lease``; None if one was bumped since then.

        Unlike with :meth:`capture`, nobody needs to know beforehand what a value will depend on.
        """
        found = self.capture(names)
        everything, *epochs = found.epochs
        if (
            found.table != lease.table
            or everything != lease.everything
            or any(epoch > lease.latest for epoch in epochs)
        ):
            return None
        return found._replace(at=lease.at)

    def _store(self, places: Iterable[int]) -> int:
        with self._lock:
            # Under the lock both: another thread may map another file at any time.
            words = self.words
            if self._writer is None:
                self._writer = self._claim()
            while True:
                # Later than every stamp before, should the clock have been set back too.
                now = max(wall_clock(), time_of(words[LATEST]) + 1)
                stamp = now * WRITERS + self._writer
                for place in places:
                    words[place] = stamp
                # Once more, should others have overtaken us, or we have been stopped, since we
                # read the clock: leases and other nodes go by it.
                if words[LATEST] < stamp and wall_clock() - now < _AT_ONCE:
                    words[LATEST] = stamp
                    return stamp

    # -- the heartbeat ------------------------------------------------------------------------

    def beat(self, proven_at: int) -> None:
        """Everything that was committed by ``proven_at`` has been applied.

        Args:
            proven_at: a reading of ``node_clock``, in nanoseconds.
        """
        with self._lock:
            words = self.words
            words[HEARTBEAT] = max(words[HEARTBEAT], proven_at)

    @property
    def heartbeat(self) -> int:
        """The reading of ``node_clock`` by which everything has been applied; 0 for never."""
        return int(self.words[HEARTBEAT])

    def age(self) -> float:
        """Seconds since the heartbeat; infinite where there was none."""
        heartbeat = self.heartbeat
        return (node_clock() - heartbeat) / NANOSECONDS if heartbeat else float("inf")

    @property
    def id(self) -> int:
        """64 random bits of this table and this boot."""
        return int(self.words[TABLE_ID])

    @property
    def problem(self) -> str:
        """Why its file cannot be used; empty where it can."""
        return self._problem

    # -- the file -----------------------------------------------------------------------------

    def verify(self, now: int) -> None:
        """Look whether the file is still the one that is mapped; take the one that is there if not.

        What was captured in the old one is stale in the new one. A file that is taken away or cut
        off is noticed within ``LOOK_EVERY``.
        """
        if self.path is None or (self.is_dead and now < self._retry_at):
            return
        if self._is_mapped():
            self.checked_until = now + LOOK_EVERY
            return
        with self._lock:
            if self._is_mapped() or (self.is_dead and now < self._retry_at):
                return  # another thread has, or could not, meanwhile
            try:
                self._map()
            except InvalidEpochTable as exc:
                self.words = _blank(self.slots)
                self.is_dead = True
                self._identity = (0, 0, 0)
                self._retry_at, self.checked_until = now + _RETRY_AFTER, 0
                if str(exc) != self._problem:
                    logger.error("Caches are bypassed: %s", exc)
                self._problem = str(exc)

    def close(self) -> None:
        """Let go of the file. What uses the table then finds no heartbeat."""
        with self._lock:
            self.path = None
            self.is_dead = True
            self.words = _blank(self.slots)
            self.checked_until = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _is_mapped(self) -> bool:
        """Whether the file that is there is the one that is mapped; closed, there is nothing to."""
        path = self.path  # once: another thread may close it
        if path is None:
            return True
        try:
            return identity_of(os.stat(path, follow_symlinks=False)) == self._identity
        except OSError:
            return False

    def _map(self) -> None:
        if self.path is None:
            return
        self.words, self._identity = map_file(self.path, self.slots, self._owner)
        self._problem = ""
        self._writer = None
        self.is_dead = False
        self.checked_until = node_clock() + LOOK_EVERY

    def _look(self) -> None:
        """Have the words be those of the file that others have, too."""
        if self.path is not None:
            self.verify(node_clock())

    def _claim(self) -> int:
        if self.path is None or self._identity == (0, 0, 0):
            return 0
        return claim_writer(self.path, self._identity, self.words)

    def _begin(self) -> None:
        words = self.words
        words[HEARTBEAT] = 0
        words[BOOT_ID] = boot_id()
        words[SLOTS] = self.slots
        words[TABLE_ID] = int.from_bytes(os.urandom(8), "little")
        words[GLOBAL] = words[LATEST] = max(words[LATEST] + 1, wall_clock() * WRITERS)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._writer = None
        if self.path is None and not self.is_dead:
            self._begin()


_TOGETHER = 256
"""Words that are stored under one stamp, which takes some 20 µs."""

_AT_ONCE = 1000
"""Microseconds between reading the clock and having stored, beyond which it is done once more."""


@lru_cache(maxsize=4096)
def _hash(name: str) -> int:
    text = name.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _blank(slots: int) -> memoryview:
    return memoryview(array("Q", bytes(8 * (HEADER_WORDS + slots))))


def _check_slots(slots: object) -> None:
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise InvalidArgument(f"slots= takes a whole number of at least 1; got {slots!r}.")


_tables: weakref.WeakSet[EpochTable] = weakref.WeakSet()


def _all_forked() -> None:
    for table in list(_tables):
        table._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all_forked)
