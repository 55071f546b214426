"""A writer: transactions of every kind, and what became of each.

Whatever it writes, a lock keeps others off the row until its transaction has ended, so that the
versions of a row are a chain.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from django.db import Error, connection, transaction

from django_pgnotify.caching import invalidate_tags, model_tag
from django_pgnotify.publishing.announcer import announcer
from django_pgnotify.stats import publishing_stats
from tests.faults.caches.models import Row, model_of, pk_of
from tests.faults.caches.records import (
    COMMITTED,
    IN_DOUBT,
    KILLED,
    ROLLED_BACK,
    ReadLog,
    Write,
    WriteLog,
)
from tests.faults.caches.ways import Way, declared_tag, row_tag, timed, ways

LONGEST_PAUSE = 0.1
PAUSE_AFTER_FAILURE = 0.1
ANNOUNCED_WITHIN = 30.0
STAMPS = 1_000_000
"""Stamps that one life of a writer may give out."""


class _OnPurpose(Exception):
    """Rolls back."""


class Writer:
    """Args:
    number: distinct among all writers of the run, their successors included.
    rows: the rows that it writes.
    """

    def __init__(self, number: int, node: int, seed: str, folder: Path, rows: range) -> None:
        self._next = number * STAMPS
        self.node = node
        self._random = random.Random(seed)
        self._rows = rows
        self.log = WriteLog(folder / f"writer-{number}.writes")
        self._reads = ReadLog(folder / f"writer-{number}.reads")
        self._ways = ways()
        self.kinds: Counter[str] = Counter()
        self.stopping = threading.Event()

    def run(self) -> None:
        kinds = [
            (self._autocommit, 25),
            (self._several, 30),
            (self._savepoints, 15),
            (self._rolled_back, 15),
            (self._bulk, 15),
        ]
        doers, weights = zip(*kinds, strict=True)
        while not self.stopping.is_set():
            [do] = self._random.choices(doers, weights)
            try:
                do()
                self.kinds[do.__name__.strip("_")] += 1
            except Error:
                self.kinds["failed"] += 1
                connection.close()
                self.stopping.wait(PAUSE_AFTER_FAILURE)
            self.stopping.wait(self._random.uniform(0.0, LONGEST_PAUSE))
        self._reads.flush()
        connection.close()

    # -- kinds of transaction -----------------------------------------------------------------

    def _autocommit(self) -> None:
        [row] = self._some(1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [row])
        attempt = Attempt(self)
        item = attempt.lock(row)
        with attempt.ending():
            item.save()
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [row])
        self._look(attempt)

    def _several(self) -> None:
        with self._transaction() as attempt:
            for row in self._some(3):
                attempt.write(row)
                if self._random.random() < 0.3:
                    self._read_inside(row, attempt)

    def _savepoints(self) -> None:
        with self._transaction() as attempt:
            for row in self._some(3):
                kept = len(attempt.rows)
                try:
                    with transaction.atomic():
                        attempt.write(row)
                        self._read_inside(row, attempt)
                        if self._random.random() < 0.4:
                            raise _OnPurpose
                except _OnPurpose:
                    attempt.forget(kept)

    def _rolled_back(self) -> None:
        try:
            with self._transaction() as attempt:
                for row in self._some(2):
                    attempt.write(row)
                    self._read_inside(row, attempt)
                raise _OnPurpose
        except _OnPurpose:
            self._look(attempt)

    def _bulk(self) -> None:
        """update() sends no signals, so the program says itself what it has made stale."""
        rows = self._some(4)
        with self._transaction() as attempt:
            for row in rows:
                item = attempt.lock(row)
                model_of(row)._default_manager.filter(pk=pk_of(row)).update(stamp=item.stamp)
            models = {model_of(row) for row in rows}
            invalidate_tags(
                *map(row_tag, rows), *map(declared_tag, rows), *(model_tag(one) for one in models)
            )

    # -- parts --------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[Attempt]:
        attempt = Attempt(self)
        with attempt.watched(), transaction.atomic():
            yield attempt
            attempt.leave()
        self._look(attempt)

    def stamp(self) -> int:
        self._next += 1
        return self._next

    def _some(self, most: int) -> list[int]:
        # In one order, so that writers never deadlock.
        return sorted(self._random.sample(self._rows, self._random.randint(1, most)))

    def _some_ways(self, count: int) -> list[tuple[int, Way]]:
        return self._random.sample(list(enumerate(self._ways)), min(count, len(self._ways)))

    def _read_inside(self, row: int, attempt: Attempt) -> None:
        """What is loaded here has not been committed, and nobody else may get to see it."""
        for _, way in self._some_ways(4):
            stamp = way.read(row)
            if way.sees_own_changes and stamp != attempt.last_stamp:
                raise RuntimeError(
                    f"row {row} by {way.name!r}: the transaction wrote {attempt.last_stamp} and "
                    f"reads {stamp}"
                )

    def _look(self, attempt: Attempt) -> None:
        """Read at once what was written."""
        for row in attempt.rows:
            for number, way in self._some_ways(3):
                self._reads.add(timed(way, number, row))


class Attempt:
    """What one transaction writes, and its outcome."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._written: list[tuple[int, int, int, int]] = []
        self._leaving = 0

    @property
    def rows(self) -> list[int]:
        return [row for *_, row in self._written]

    @property
    def last_stamp(self) -> int:
        return self._written[-1][0]

    def forget(self, kept: int) -> None:
        """A savepoint was rolled back; those rows are others' to write once we have ended."""
        gone, self._written = self._written[kept:], self._written[:kept]
        self._note(gone, time.monotonic_ns(), ROLLED_BACK)

    def lock(self, row: int) -> Row:
        """Lock a row until the transaction ends, and give it its next stamp, unsaved."""
        if connection.in_atomic_block:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", [row])
        locked = time.monotonic_ns()
        item = model_of(row)._default_manager.get(pk=pk_of(row))
        before, item.stamp = item.stamp, self._writer.stamp()
        self._written.append((item.stamp, before, locked, row))
        return item

    def write(self, row: int) -> None:
        self.lock(row).save()

    def leave(self) -> None:
        """COMMIT is next: noted, in case that we do not live to see its end."""
        self._leaving = time.monotonic_ns()
        self._note(self._written, self._leaving, KILLED)

    @contextmanager
    def ending(self) -> Iterator[None]:
        with self.watched():
            self.leave()
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        failed = publishing_stats["publish_failed"]
        try:
            yield
        except BaseException:
            self._note(
                self._written, time.monotonic_ns(), IN_DOUBT if self._leaving else ROLLED_BACK
            )
            raise
        if publishing_stats["publish_failed"] != failed:
            # Others know of it once the announcer has reached the server again.
            announcer.flush(ANNOUNCED_WITHIN)
        self._note(self._written, time.monotonic_ns(), COMMITTED)

    def _note(self, written: Iterable[tuple[int, int, int, int]], done: int, outcome: int) -> None:
        node, leaving = self._writer.node, self._leaving or done
        notes = [
            Write(stamp, before, locked, leaving, done, row, node, outcome)
            for stamp, before, locked, row in written
        ]
        self._writer.log.add(notes)
