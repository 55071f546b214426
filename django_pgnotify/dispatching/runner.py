"""Workers: call one lane's receiver, in a thread or on the loop, until the lane is empty.

Sync receivers run in threads with Django's connection hygiene; async ones are tasks of the
listener's loop. Both are limited by the same number of slots.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from asgiref.sync import sync_to_async
from django.db import close_old_connections

from .. import signals
from ..backoff import Backoff
from ..events import Event
from ..registry import describe
from ..stats import Stats
from .lane import Lane

logger = logging.getLogger("django_pgnotify.dispatching")

SLICE = 0.1
"""Seconds after which a worker thread lets other lanes have its slot."""

LOOP_SLICE = 0.01
"""The same for async receivers, which share the loop with the reader."""

RETRY_BASE = 0.2
RETRY_CAP = 30.0
HYGIENE_INTERVAL = 1.0
"""Seconds between two looks at the connections that async receivers use."""


class Runner:
    """Runs workers for lanes.

    Args:
        concurrency: workers at once, of all lanes together.
        stats: ``handled``, ``failed`` and ``retried`` are counted here.
        changed: called from any thread whenever a worker has ended.
    """

    def __init__(self, concurrency: int, stats: Stats, changed: Callable[[], None]) -> None:
        self._stats = stats
        self._changed = changed
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="pgnotify-receiver")
        self._slots = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = threading.Event()
        self._hygiene_due = 0.0

    def start(self, lane: Lane) -> None:
        """Put one hired worker of ``lane`` to work."""
        if lane.receiver.is_async:
            task = asyncio.create_task(
                self._work_on_loop(lane), name=f"pgnotify-{lane.receiver.uid}"
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            # A fresh context: nothing of the listener's own leaks into receivers.
            self._threads.submit(contextvars.Context().run, self._work_in_thread, lane)

    def stop_retrying(self) -> None:
        """Failures are final from here on, so that a shutdown need not wait for pauses."""
        self._stopping.set()

    def close(self) -> None:
        """Cancel async receivers and let go of the threads, running or not."""
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- threads ----------------------------------------------------------------------------

    def _work_in_thread(self, lane: Lane) -> None:
        close_old_connections()
        slice_ends = time.monotonic() + SLICE
        try:
            while (event := lane.take()) is not None:
                try:
                    self._call(lane, event)
                finally:
                    lane.done(event)
                if time.monotonic() > slice_ends:
                    break
            else:
                return
            # Back into the queue behind the workers of other lanes.
            try:
                self._threads.submit(contextvars.Context().run, self._work_in_thread, lane)
            except RuntimeError:  # shut down meanwhile
                lane.leave()
        finally:
            close_old_connections()
            self._changed()

    def _call(self, lane: Lane, event: Event) -> None:
        func = lane.receiver.func
        pauses = Backoff(RETRY_BASE, RETRY_CAP)
        while True:
            try:
                func(event)
            except Exception as exc:  # noqa: BLE001 - a receiver may raise anything
                retry = self._may_retry(lane, pauses)
                self._report(lane, event, exc, pauses.attempts + 1, retry)
                signals.receiver_failed.send_robust(
                    func, event=event, exception=exc, attempt=pauses.attempts + 1, will_retry=retry
                )
                # A connection the failure broke must not meet the next event.
                close_old_connections()
                if not retry or self._stopping.wait(pauses.next()):
                    return
            else:
                self._stats.add("handled")
                return

    # -- the loop ---------------------------------------------------------------------------

    async def _work_on_loop(self, lane: Lane) -> None:
        try:
            async with self._slots:
                if time.monotonic() >= self._hygiene_due:
                    self._hygiene_due = time.monotonic() + HYGIENE_INTERVAL
                    await sync_to_async(close_old_connections)()
                slice_ends = time.monotonic() + LOOP_SLICE
                while (event := lane.take()) is not None:
                    try:
                        await self._call_async(lane, event)
                    finally:
                        lane.done(event)
                    if time.monotonic() > slice_ends:
                        break
                else:
                    return
            self.start(lane)
        finally:
            self._changed()

    async def _call_async(self, lane: Lane, event: Event) -> None:
        func = lane.receiver.func
        pauses = Backoff(RETRY_BASE, RETRY_CAP)
        while True:
            try:
                async with asyncio.timeout(lane.receiver.timeout):
                    await func(event)
            except Exception as exc:  # noqa: BLE001 - a receiver may raise anything
                retry = self._may_retry(lane, pauses)
                self._report(lane, event, exc, pauses.attempts + 1, retry)
                await signals.receiver_failed.asend_robust(
                    func, event=event, exception=exc, attempt=pauses.attempts + 1, will_retry=retry
                )
                await sync_to_async(close_old_connections)()
                if not retry:
                    return
                await asyncio.sleep(pauses.next())
            else:
                self._stats.add("handled")
                return

    # -- both -------------------------------------------------------------------------------

    def _may_retry(self, lane: Lane, pauses: Backoff) -> bool:
        return pauses.attempts < lane.receiver.retries and not self._stopping.is_set()

    def _report(
        self, lane: Lane, event: Event, exc: Exception, attempt: int, will_retry: bool
    ) -> None:
        self._stats.add("retried" if will_retry else "failed")
        logger.error(
            "Receiver %s failed on event %s (%s of topic %r), attempt %d%s",
            describe(lane.receiver.func),
            event.id,
            event.action,
            event.topic,
            attempt,
            ", will retry" if will_retry else "",
            exc_info=exc,
            extra={"receiver": lane.receiver.uid, "event_id": event.id, "topic": event.topic},
        )
