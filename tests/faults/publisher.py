"""A publisher that never rests: numbered events under several keys, and what became of each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from django.db import Error, connection, transaction

from django_pgnotify import publish
from django_pgnotify.stats import publishing_stats
from tests.faults.checker import Published, Status
from tests.faults.project.receivers import TOPIC

KEYS = ("amber", "birch", "cedar", "daisy", "elder")
PAUSE = 0.004
PAUSE_AFTER_FAILURE = 0.05
ROLLED_BACK = 0.02
"""Share of the transactions that are rolled back on purpose."""

TABLE = "CREATE TABLE IF NOT EXISTS number (n bigint, key text)"
INSERT = "INSERT INTO number SELECT g, 'n' FROM generate_series(%s::bigint, %s::bigint) AS g"


class _OnPurpose(Exception):
    """Rolls a transaction back."""


class Publisher(threading.Thread):
    """Publishes one to three numbers per transaction, after the commit, until :meth:`finish`."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="publisher", daemon=True)
        self.published: list[Published] = []
        self.error: BaseException | None = None
        self._random = random.Random(f"publisher {seed}")
        self._sequence = dict.fromkeys(KEYS, 0)
        self._orders: SimpleQueue[tuple[int, bool, threading.Event]] = SimpleQueue()
        self._stopping = threading.Event()

    @property
    def next_number(self) -> int:
        """A number that is published after now, at the latest the one after the present ones."""
        return len(self.published) + 1

    def last_sent(self) -> int:
        return next((each.n for each in reversed(self.published) if each.status == "sent"), 0)

    def burst(self, count: int, *, raising: bool = False) -> None:
        """Publish ``count`` numbers in one transaction, and return when that is done."""
        done = threading.Event()
        self._orders.put((count, raising, done))
        done.wait(30)

    def finish(self) -> None:
        self._stopping.set()
        self.join(30)

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    count, raising, done = self._orders.get(timeout=PAUSE)
                except Empty:
                    self._transaction(self._random.randint(1, 3))
                else:
                    self._transaction(count, raising=raising)
                    done.set()
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            connection.close()

    def _transaction(self, count: int, *, raising: bool = False) -> None:
        numbers = [self._number(len(self.published) + 1 + i) for i in range(count)]
        rolls_back = count < 10 and self._random.random() < ROLLED_BACK
        before, failed = time.time(), publishing_stats["publish_failed"]
        status: Status
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute(INSERT, [numbers[0][0], numbers[-1][0]])
                for n, key, seq in numbers:
                    data = {"n": n, "seq": seq, **({"raise": True} if raising else {})}
                    publish(TOPIC, data, key=key)
                if rolls_back:
                    raise _OnPurpose
        except _OnPurpose:
            status = "rolled back"
        except Error:
            # The commit may have been made all the same; its hooks were not run.
            status = "uncommitted"
        else:
            status = "sent" if publishing_stats["publish_failed"] == failed else "unsent"
        after = time.time()
        self.published += [Published(n, key, seq, before, after, status) for n, key, seq in numbers]
        if status in ("uncommitted", "unsent"):
            connection.close()
            self._stopping.wait(PAUSE_AFTER_FAILURE)

    def _number(self, n: int) -> tuple[int, str, int]:
        key = self._random.choice(KEYS)
        self._sequence[key] += 1
        return n, key, self._sequence[key]


def until(condition: Callable[[], bool], timeout: float, interval: float = 0.01) -> bool:
    """Whether ``condition`` came true within ``timeout`` seconds; other processes are watched."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True
