"""Shares the durable consumers among the ``pglisten`` processes of a deployment.

A process holds a consumer by a session advisory lock on a connection of its own, so a process that
dies lets go of it at once, and another takes over. A second, shared lock on each consumer says
"I could run it": counting those tells a process its fair share.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from django.db import DatabaseError, InterfaceError, connections

from ..backoff import Backoff
from ..conf import conf
from ..listening.connection import SERVER_KEEPALIVES
from ..listening.parameters import connection_params, with_keepalives
from ..registry import Receiver, Subscription
from ..stats import Stats
from .locks import GRANTED, TABLE, Keys
from .log import reason
from .shares import PATIENCE, decide
from .state import create, register
from .worker import Observe, Worker

logger = logging.getLogger("django_pgnotify.durable")

KEPT = 30.0
"""Seconds for which a consumer that nobody else took is not offered to them again."""

_CANDIDATES = f"SELECT key, count(DISTINCT pid) FROM ({GRANTED}) AS granted GROUP BY key"  # noqa: S608

_TOPICS = "SELECT name, topics FROM pgnotify_consumer WHERE name = ANY (%s)"

_TROUBLE = (psycopg.Error, DatabaseError, InterfaceError, OSError)


class Consumers:
    """The durable consumers that this process could run, and those that it does.

    Args:
        entries: the receivers with the streams they read from the log.
        using: alias of the database that has the log.
        locks: alias whose connection holds the locks: one that goes past a pooler.
        stats: for the workers.
        observe: told of what has been handled, on a worker's thread.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Receiver, tuple[Subscription, ...]]],
        *,
        using: str,
        locks: str,
        stats: Stats,
        observe: Observe | None = None,
    ) -> None:
        self._entries = {receiver.uid: (receiver, streams) for receiver, streams in entries}
        self._using = using
        self._locks = locks
        self._stats = stats
        self._observe = observe
        self._guard = threading.Lock()
        self._workers: dict[str, Worker] = {}
        self._waited: dict[str, int] = {}
        self._kept_until: dict[str, float] = {}
        self._left: set[str] = set()
        self._stopping = threading.Event()
        self._registered: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="pgnotify-consumers", daemon=True)

    # -- from the loop ------------------------------------------------------------------------

    def start(self, registered: Callable[[], None]) -> None:
        """Begin; ``registered`` is called on the loop once every consumer exists: what is
        published from then on, it will get."""
        self._registered = registered
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def wake(self, topics: frozenset[str] | None = None) -> None:
        """There may be something new on these topics; None means of any kind."""
        for worker in self._running():
            if topics is None or not topics.isdisjoint(worker.topics):
                worker.wake(asked=topics is None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping.set()
        for worker in self._running():
            worker.stop()

    async def close(self, timeout: float) -> bool:
        """Let the event at hand finish, store the cursors; whether that was done in time."""
        self.stop()
        if self._thread.ident is None:
            return True
        await asyncio.to_thread(self._thread.join, timeout)
        return not self._thread.is_alive()

    @property
    def held(self) -> list[str]:
        """The names of the consumers that this process runs."""
        return sorted(worker.receiver.uid for worker in self._running())

    def _running(self) -> list[Worker]:
        with self._guard:
            return list(self._workers.values())

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        pauses = Backoff(0.1, conf.RECONNECT_MAX_DELAY)
        said = ""
        while not self._stopping.is_set():
            try:
                self._share(pauses)
            except _TROUBLE as exc:
                cause = reason(exc, self._using)
                if cause != said:
                    logger.error("Durable consumers wait for the database: %s", cause)
                    if self._registered is not None:
                        logger.warning(
                            "This listener is not ready until its durable consumers exist: %s",
                            ", ".join(self._entries),
                        )
                said = cause
            except Exception:
                logger.exception("Durable consumers stumbled, and go on")
            finally:
                self._end_all()
                connections.close_all()
            self._stopping.wait(pauses.next())

    def _share(self, pauses: Backoff) -> None:
        # Only at the start: what has changed since then is the word of code that started later.
        make = create if self._registered is None else register
        for receiver, streams in self._entries.values():
            make(receiver.uid, _topics(streams), receiver.start, self._using)
        connections[self._using].close()
        params = {"application_name": "pglisten consumers", **connection_params(self._locks)}
        with psycopg.connect(
            **with_keepalives(params, conf.CONNECT_TIMEOUT), autocommit=True
        ) as connection:
            connection.execute(SERVER_KEEPALIVES)
            [(table,)] = connection.execute(TABLE)
            keys = {name: Keys(int(table), name) for name in self._entries}
            for key in keys.values():
                connection.execute("SELECT pg_advisory_lock_shared(%s)", [key.candidate])
            self._left = set()
            if self._registered is not None:
                with suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(self._registered)
                self._registered = None
            while not self._stopping.is_set():
                self._look(connection, keys)
                pauses.reset()
                self._stopping.wait(conf.LEADER_POLL_INTERVAL)
            # With the connection the locks are gone: nobody may take over before all is stored.
            self._end_all()

    def _look(self, connection: psycopg.Connection[Any], keys: dict[str, Keys]) -> None:
        self._bury(connection, keys)
        self._leave(connection, keys)
        keys = {name: key for name, key in keys.items() if name not in self._left}
        counts = dict(connection.execute(_CANDIDATES).fetchall())
        wanted = {name: counts.get(key.candidate, 1) for name, key in keys.items()}
        held = {worker.receiver.uid for worker in self._running()} - self._left
        take, let_go = decide(wanted, held, self._waited)
        for name in let_go:
            if time.monotonic() >= self._kept_until.get(name, 0.0):
                self._workers[name].stop()
                self._waited[name] = 0
        for name in wanted.keys() - held:
            self._waited[name] = self._waited.get(name, 0) + 1
        for name in take:
            [(taken,)] = connection.execute("SELECT pg_try_advisory_lock(%s)", [keys[name].holder])
            if not taken:
                self._waited[name] = 0
                continue
            if self._waited.get(name, 0) > PATIENCE:
                self._kept_until[name] = time.monotonic() + KEPT
            self._begin(name)

    def _leave(self, connection: psycopg.Connection[Any], keys: dict[str, Keys]) -> None:
        """Leave consumers to others while they have topics that this process does not read."""
        left = set()
        for name, topics in connection.execute(_TOPICS, [list(keys)]).fetchall():
            mine = _topics(self._entries[name][1])
            if set(topics) <= set(mine):
                continue
            left.add(name)
            if name not in self._left:
                logger.warning(
                    "Consumer %s is left to others: code that started later has it read %s, this "
                    "process only %s; restart pglisten with that code",
                    name,
                    topics,
                    mine,
                )
                connection.execute("SELECT pg_advisory_unlock_shared(%s)", [keys[name].candidate])
                if (worker := self._workers.get(name)) is not None:
                    worker.stop()
        for name in self._left - left:
            connection.execute("SELECT pg_advisory_lock_shared(%s)", [keys[name].candidate])
        self._left = left

    def _begin(self, name: str) -> None:
        receiver, streams = self._entries[name]
        worker = Worker(
            receiver,
            streams,
            using=self._using,
            loop=self._loop,
            stats=self._stats,
            observe=self._observe,
        )
        logger.info("This process runs the consumer %s", name)
        with self._guard:
            self._workers[name] = worker
        worker.start()

    def _bury(self, connection: psycopg.Connection[Any], keys: dict[str, Keys]) -> None:
        """Free the locks of workers that have ended."""
        for worker in self._running():
            if not worker.alive:
                name = worker.receiver.uid
                connection.execute("SELECT pg_advisory_unlock(%s)", [keys[name].holder])
                with self._guard:
                    del self._workers[name]
                logger.info("This process has let go of the consumer %s", name)

    def _end_all(self) -> None:
        workers = self._running()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
        with self._guard:
            self._workers.clear()


def _topics(streams: Sequence[Subscription]) -> list[str]:
    return list(dict.fromkeys(one.topic for one in streams))
