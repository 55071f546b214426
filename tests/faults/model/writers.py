"""Writers that do everything a transaction can do, and a ledger that says what was committed.

Each key has a row with the number of its last event. A writer locks it, counts on, and publishes in
the same transaction, so after the run the ledger names every committed event, whatever became of
the writer: a rollback, of a savepoint too, takes number and event back together.
"""

from __future__ import annotations

import random
import threading
import time

import psycopg
from django.db import Error, connection, transaction

from django_pgnotify import publish, publish_many
from tests.faults.model.receivers import TOPIC

KEYS = [f"key-{number:02}" for number in range(40)]
TABLES = """
    CREATE TABLE ledger (key text PRIMARY KEY, seq bigint NOT NULL DEFAULT 0);
    CREATE TABLE exact (id bigserial PRIMARY KEY, key text NOT NULL, seq bigint NOT NULL);
"""
LONGEST_DELAY = 0.08


class _OnPurpose(Exception):
    """Rolls back."""


class Writer(threading.Thread):
    """One writer; its choices follow from the seed."""

    def __init__(self, seed: str, url: str, *, prepares: bool) -> None:
        super().__init__(name=f"writer {seed}", daemon=True)
        self.error: BaseException | None = None
        self.kinds: dict[str, int] = {}
        self._random = random.Random(seed)
        self._url = url
        self._prepares = prepares
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        kinds = [
            (self._one, 30),
            (self._many, 25),
            (self._delayed, 20),
            (self._rolled_back, 8),
            (self._savepoints, 12),
            (self._prepared, 5 if self._prepares else 0),
        ]
        doers, weights = zip(*kinds, strict=True)
        try:
            while not self._stopping.is_set():
                [do] = self._random.choices(doers, weights)
                try:
                    do()
                    self.kinds[do.__name__] = self.kinds.get(do.__name__, 0) + 1
                except (Error, psycopg.Error):
                    # The server went away; the ledger knows whether this was committed.
                    connection.close()
                    self._stopping.wait(0.05)
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            connection.close()

    # -- kinds of transaction -----------------------------------------------------------------

    def _one(self) -> None:
        with transaction.atomic():
            self._publish(self._random.choice(KEYS))

    def _many(self) -> None:
        key, count = self._random.choice(KEYS), self._random.randint(2, 60)
        with transaction.atomic():
            last = self._count_on(key, count)
            items = [{"seq": seq} for seq in range(last - count + 1, last + 1)]
            publish_many(TOPIC, items, key=key)

    def _delayed(self) -> None:
        """Its transaction id is old when it writes, and its event waits for the commit."""
        with transaction.atomic():
            if self._random.random() < 0.5:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_current_xact_id()")
                self._sleep()
            for key in self._some_keys():
                self._publish(key)
            self._sleep()

    def _rolled_back(self) -> None:
        try:
            with transaction.atomic():
                for key in self._some_keys():
                    self._publish(key)
                raise _OnPurpose
        except _OnPurpose:
            pass

    def _savepoints(self) -> None:
        with transaction.atomic():
            for key in self._some_keys():
                try:
                    with transaction.atomic():
                        self._publish(key)
                        if self._random.random() < 0.4:
                            raise _OnPurpose
                except _OnPurpose:
                    pass

    def _prepared(self) -> None:
        """Two-phase commit, by a program that knows nothing of Django, and sends no NOTIFY."""
        name = f"model-{self._random.getrandbits(64):x}"
        key = self._random.choice(KEYS)
        with psycopg.connect(self._url, autocommit=True) as other:
            other.execute("BEGIN")
            row = other.execute(
                "UPDATE ledger SET seq = seq + 1 WHERE key = %s RETURNING seq", [key]
            ).fetchone()
            assert row is not None
            other.execute(
                "INSERT INTO pgnotify_event_log (topic, key, source, body) VALUES"
                " (%s, %s, 'prepared', json_build_object('key', %s::text, 'data',"
                " json_build_object('seq', %s::bigint)))",
                [TOPIC.name, key, key, row[0]],
            )
            other.execute(f"PREPARE TRANSACTION '{name}'")
            self._sleep()
            verb = "COMMIT" if self._random.random() < 0.7 else "ROLLBACK"
            other.execute(f"{verb} PREPARED '{name}'")

    # -- parts --------------------------------------------------------------------------------

    def _publish(self, key: str) -> None:
        publish(TOPIC, {"seq": self._count_on(key, 1)}, key=key)

    def _count_on(self, key: str, count: int) -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE ledger SET seq = seq + %s WHERE key = %s RETURNING seq", [count, key]
            )
            [last] = cursor.fetchone()
            return int(last)

    def _some_keys(self) -> list[str]:
        # In one order, so that writers never deadlock.
        return sorted(self._random.sample(KEYS, self._random.randint(1, 3)))

    def _sleep(self) -> None:
        time.sleep(self._random.uniform(0.0, LONGEST_DELAY))
