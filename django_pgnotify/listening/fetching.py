"""The thread in which an intake fetches stored events, with a connection of its own.

Not through ``sync_to_async``: that has one thread for a whole process, and what somebody does in it
may wait for a lock of the database, or for the very event that is to be fetched.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from django.db import close_old_connections, connections

_IDLE_FOR = 1.0


class Fetcher:
    """Fetches from alias ``using``, one request after the other.

    Its thread starts with the first of them and ends when there was none for a moment.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._changed = threading.Condition()
        self._asked: deque[tuple[Sequence[int], Future[dict[int, str]]]] = deque()
        self._running = False

    async def fetch(self, ids: Sequence[int]) -> dict[int, str]:
        """The events' JSON texts by id; those whose row is gone are absent.

        Raises:
            django.db.Error: the database could not be asked.
            RuntimeError: no thread can be started.
        """
        found: Future[dict[int, str]] = Future()
        with self._changed:
            if not self._running:
                # A daemon: a database that does not answer must not keep a process from ending.
                threading.Thread(target=self._run, name="pgnotify-fetch", daemon=True).start()
                self._running = True
            self._asked.append((ids, found))
            self._changed.notify()
        return await asyncio.wrap_future(found)

    def _run(self) -> None:
        try:
            while (asked := self._next()) is not None:
                ids, found = asked
                if found.set_running_or_notify_cancel():
                    try:
                        rows = self._fetch(ids)
                    except BaseException as exc:  # noqa: BLE001 - raised where it is awaited
                        found.set_exception(exc)
                    else:
                        found.set_result(rows)
        finally:
            connections.close_all()

    def _next(self) -> tuple[Sequence[int], Future[dict[int, str]]] | None:
        with self._changed:
            if self._changed.wait_for(lambda: self._asked, _IDLE_FOR):
                return self._asked.popleft()
            self._running = False
            return None

    def _fetch(self, ids: Sequence[int]) -> dict[int, str]:
        from ..publishing.store import fetch  # models are not importable before the apps are

        close_old_connections()
        try:
            return fetch(ids, self._using)
        finally:
            close_old_connections()
