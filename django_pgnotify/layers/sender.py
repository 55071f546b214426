"""Sends the layer's messages: one thread and one connection per process and database.

A connection of its own, because a message must leave now, not with the commit of whatever request
sends it; a thread of its own, so that it serves any number of event loops, those that
``async_to_sync`` makes for one call included. What arrives while a statement is in flight leaves
together in the next.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import psycopg

from ..conf import conf
from ..exceptions import PublishError
from ..listening.connection import with_keepalives
from ..listening.listener import connection_params
from ..wire import PAYLOAD_LIMIT

logger = logging.getLogger("django_pgnotify.layers")

REFERENCE = "ref:"
BATCH = 100
_PRUNE_EVERY = 100
_EXIT_TIMEOUT = 2.0

_NOTIFY = (
    "SELECT pg_notify(channel, payload) FROM unnest(%s::text[], %s::text[]) AS m(channel, payload)"
)
_STORE = (
    "WITH stored AS (INSERT INTO pgnotify_stored_event (body) VALUES (%s) RETURNING id) "
    "SELECT pg_notify(%s, %s || id) FROM stored"
)
_FETCH = "SELECT body FROM pgnotify_stored_event WHERE id = %s"
_PRUNE = (
    "DELETE FROM pgnotify_stored_event WHERE id IN (SELECT id FROM pgnotify_stored_event "
    "WHERE created_at < now() - make_interval(secs => %s) ORDER BY id LIMIT 1000)"
)


class _Send(NamedTuple):
    done: Future[None]
    channel: str
    payload: str


class _Fetch(NamedTuple):
    done: Future[str | None]
    row: int


class Sender:
    """See the module. Get one with :func:`sender`."""

    def __init__(self, using: str) -> None:
        self.using = using
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[_Send | _Fetch | None] = queue.SimpleQueue()
        self._connection: psycopg.Connection[Any] | None = None
        self._stored = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="pgnotify-layer", daemon=True)
        self._thread.start()

    def send(self, channel: str, payload: str) -> Future[None]:
        """NOTIFY; the future is done when PostgreSQL has it, or fails with PublishError."""
        job = _Send(Future(), channel, payload)
        self._put(job)
        return job.done

    def fetch(self, row: int) -> Future[str | None]:
        """The body of a stored message, None if it has been pruned."""
        job = _Fetch(Future(), row)
        self._put(job)
        return job.done

    def _put(self, job: _Send | _Fetch) -> None:
        self._jobs.put(job)
        if self._ended:
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Nobody works any more: whoever still waits must not wait for ever."""
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.done.set_running_or_notify_cancel():
                    job.done.set_exception(PublishError("The channel layer has been stopped."))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Send what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join(_EXIT_TIMEOUT)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            last = False
            while len(batch) < BATCH and not last:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                else:
                    batch.append(more)
            self._work(batch)
            if last:
                break
        self._ended = True
        self._refuse_rest()
        if self._connection is not None:
            self._connection.close()

    def _work(self, batch: list[_Send | _Fetch]) -> None:
        small: list[_Send] = []
        for job in batch:
            if not job.done.set_running_or_notify_cancel():
                continue
            if isinstance(job, _Send) and len(job.payload) <= PAYLOAD_LIMIT:
                small.append(job)
                continue
            # In order: what was sent before leaves before.
            self._notify(small)
            small = []
            if isinstance(job, _Send):
                self._finish([job], partial(self._store, job))
            else:
                self._fetch(job)
        self._notify(small)

    def _notify(self, jobs: list[_Send]) -> None:
        if jobs:
            params = [[job.channel for job in jobs], [job.payload for job in jobs]]
            self._finish(jobs, lambda connection: connection.execute(_NOTIFY, params))

    def _store(self, job: _Send, connection: psycopg.Connection[Any]) -> None:
        connection.execute(_STORE, (job.payload, job.channel, REFERENCE))
        self._stored += 1
        if self._stored % _PRUNE_EVERY == 0:
            connection.execute(_PRUNE, (conf.STORED_RETENTION,))

    def _fetch(self, job: _Fetch) -> None:
        try:
            row = self._retrying(
                lambda connection: connection.execute(_FETCH, (job.row,)).fetchone()
            )
        except Exception as exc:  # noqa: BLE001 - the thread must go on, whatever it was
            logger.error("A stored message could not be fetched: %s", exc)
            row = None
        job.done.set_result(None if row is None else row[0])

    def _finish(self, jobs: list[_Send], work: Callable[[psycopg.Connection[Any]], object]) -> None:
        try:
            self._retrying(work)
        except Exception as exc:  # noqa: BLE001 - whoever waits must be told, whatever it was
            for job in jobs:
                error = PublishError(f"The channel layer could not send: {exc}")
                error.__cause__ = exc
                job.done.set_exception(error)
        else:
            for job in jobs:
                job.done.set_result(None)

    def _retrying(self, work: Callable[[psycopg.Connection[Any]], Any]) -> Any:
        """Do ``work``; once more on a fresh connection if the one we had turns out to be dead."""
        had_connection = self._connection is not None
        try:
            return work(self._connected())
        except psycopg.OperationalError:
            broken, self._connection = self._connection, None
            if broken is not None:
                broken.close()
            if not had_connection:
                raise
        return work(self._connected())

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            params = with_keepalives(connection_params(self.using), conf.CONNECT_TIMEOUT)
            params |= {"application_name": "pgnotify-layer", "prepare_threshold": None}
            self._connection = psycopg.connect(**params, autocommit=True)
        return self._connection


_senders: dict[str, Sender] = {}
_guard = threading.Lock()
_inherited: list[Sender] = []


def sender(using: str) -> Sender:
    """The sender of this process on alias ``using``."""
    with _guard:
        found = _senders.get(using)
        if found is None or not found.alive:
            found = _senders[using] = Sender(using)
        return found


def _stop_all() -> None:
    with _guard:
        stopping = list(_senders.values())
        _senders.clear()
    for entry in stopping:
        entry.stop()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()  # the parent may have held it
    _inherited.extend(_senders.values())  # to collect them would use the parent's connection
    _senders.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
