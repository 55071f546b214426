"""Workers: call one lane's receiver, slice by slice, until the lane is empty.

A worker is a task on the listener's loop. For each slice of time it takes one of the slots that
all receivers share; async receivers then run on the loop, sync ones in a thread, with Django's
connection hygiene. A pause before a retry takes no slot.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from .. import signals
from ..backoff import Backoff
from ..events import Event
from ..registry import describe
from ..stats import Stats
from .lane import Lane

logger = logging.getLogger("django_pgnotify.dispatching")

T = TypeVar("T")

THREAD_SLICE = 0.1
"""Seconds after which a worker in a thread lets another one have its slot."""

LOOP_SLICE = 0.01
"""The same for async receivers, which share the loop with the reader."""

HYGIENE_INTERVAL = 1.0
"""Seconds between two looks at the connections that async receivers use."""

RETRY_BASE = 0.2
RETRY_CAP = 30.0


@dataclass(slots=True)
class _Attempts:
    """An event on its way through attempts and pauses."""

    event: Event
    pauses: Backoff

    @property
    def number(self) -> int:
        return self.pauses.attempts + 1


_Outcome = Literal["empty", "more"] | _Attempts
"""Of a slice: the lane had nothing more, has more, or its event is to be tried again."""


class Runner:
    """Runs workers for lanes.

    Args:
        concurrency: receivers that may run at once, of all lanes together.
        stats: ``handled``, ``failed`` and ``retried`` are counted here.
        ended: told of the lane whenever a worker has been dismissed.
    """

    def __init__(self, concurrency: int, stats: Stats, ended: Callable[[Lane], None]) -> None:
        self._stats = stats
        self._ended = ended
        self._slots = asyncio.Semaphore(concurrency)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="pgnotify-receiver")
        self._connections: set[BaseDatabaseWrapper] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._closed = False
        self._hygiene_due = 0.0

    def staff(self, lane: Lane) -> None:
        """Put as many workers on ``lane`` as it is worth now."""
        for _ in range(lane.hire()):
            task = asyncio.create_task(self._work(lane), name=f"pgnotify-{lane.receiver.uid}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._ended(lane))

    def stop_retrying(self) -> None:
        """Failures are final from here on, so that a shutdown need not wait for pauses."""
        self._stopping.set()

    async def close(self, *, drained: bool) -> None:
        """Let go of the threads; where something still runs, without waiting for it."""
        self._closed = True
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        if drained:
            await asyncio.to_thread(self._close_connections)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _work(self, lane: Lane) -> None:
        run_slice = self._slice_on_loop if lane.receiver.is_async else self._slice_in_thread
        attempts: _Attempts | None = None
        outcome: _Outcome = "more"
        try:
            while outcome != "empty":
                async with self._slots:
                    outcome = await run_slice(lane, attempts)
                attempts = None
                if isinstance(outcome, _Attempts):
                    if await self._pause(outcome.pauses.next()):
                        attempts = outcome
                    else:
                        self._give_up(lane, outcome)
                if not self._closed:
                    self.staff(lane)  # a gap that was handled makes room for several again
        finally:
            if outcome != "empty":
                lane.leave()  # cancelled: nobody else will dismiss this worker

    async def _pause(self, seconds: float) -> bool:
        """Wait; False if a shutdown has cut it short."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return not self._stopping.is_set()

    # -- threads ----------------------------------------------------------------------------

    async def _slice_in_thread(self, lane: Lane, attempts: _Attempts | None) -> _Outcome:
        return await self._in_thread(self._handle_in_thread, lane, attempts)

    async def _in_thread(self, func: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, func, *args)

    def _handle_in_thread(self, lane: Lane, attempts: _Attempts | None) -> _Outcome:
        # A fresh context: nothing of one slice is seen by the next.
        return contextvars.Context().run(self._handle, lane, attempts)

    def _handle(self, lane: Lane, attempts: _Attempts | None) -> _Outcome:
        close_old_connections()
        slice_ends = time.monotonic() + THREAD_SLICE
        try:
            event = lane.take() if attempts is None else attempts.event
            while event is not None:
                attempts = self._attempt(lane, attempts or _first(event))
                if attempts is not None:
                    return attempts
                lane.done(event)
                if time.monotonic() > slice_ends:
                    return "more"
                event = lane.take()
            return "empty"
        finally:
            close_old_connections()
            self._connections.update(connections.all(initialized_only=True))

    def _attempt(self, lane: Lane, attempts: _Attempts) -> _Attempts | None:
        """Call the receiver; returns what is to be tried again."""
        func, event = lane.receiver.func, attempts.event
        try:
            func(event)
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a receiver is its failure
            retry = self._failed(lane, attempts, exc)
            signals.receiver_failed.send_robust(
                func, event=event, exception=exc, attempt=attempts.number, will_retry=retry
            )
            # A connection the failure broke must not meet the next event.
            close_old_connections()
            return attempts if retry else None
        self._stats.add("handled")
        return None

    def _close_connections(self) -> None:
        """Close what the threads have kept open (CONN_MAX_AGE); none of them runs any more."""
        for connection in self._connections:
            connection.inc_thread_sharing()
            connection.close()

    # -- the loop ---------------------------------------------------------------------------

    async def _slice_on_loop(self, lane: Lane, attempts: _Attempts | None) -> _Outcome:
        if time.monotonic() >= self._hygiene_due:
            await self._clean_connections()
        slice_ends = time.monotonic() + LOOP_SLICE
        event = lane.take() if attempts is None else attempts.event
        while event is not None:
            try:
                attempts = await self._attempt_async(lane, attempts or _first(event))
            except asyncio.CancelledError:
                lane.done(event)
                raise
            if attempts is not None:
                return attempts
            lane.done(event)
            if time.monotonic() > slice_ends:
                return "more"
            event = lane.take()
        return "empty"

    async def _attempt_async(self, lane: Lane, attempts: _Attempts) -> _Attempts | None:
        func, event = lane.receiver.func, attempts.event
        try:
            async with asyncio.timeout(lane.receiver.timeout):
                await func(event)
        except (Exception, SystemExit, asyncio.CancelledError) as exc:
            if self._closed and isinstance(exc, asyncio.CancelledError):
                raise
            retry = self._failed(lane, attempts, exc)
            await signals.receiver_failed.asend_robust(
                func, event=event, exception=exc, attempt=attempts.number, will_retry=retry
            )
            await self._clean_connections()
            return attempts if retry else None
        self._stats.add("handled")
        return None

    async def _clean_connections(self) -> None:
        self._hygiene_due = time.monotonic() + HYGIENE_INTERVAL
        await sync_to_async(close_old_connections)()

    # -- both -------------------------------------------------------------------------------

    def _failed(self, lane: Lane, attempts: _Attempts, exc: BaseException) -> bool:
        """Count and log a failure; tells whether there will be another attempt."""
        retry = attempts.number <= lane.receiver.retries and not self._stopping.is_set()
        self._stats.add("retried" if retry else "failed")
        event = attempts.event
        logger.error(
            "Receiver %s failed on event %s (%s of topic %r), attempt %d%s",
            describe(lane.receiver.func),
            event.id,
            event.action,
            event.topic,
            attempts.number,
            ", will retry" if retry else "",
            exc_info=exc,
            extra={"receiver": lane.receiver.uid, "event_id": event.id, "topic": event.topic},
        )
        return retry

    def _give_up(self, lane: Lane, attempts: _Attempts) -> None:
        """A shutdown came before the next attempt."""
        self._stats.add("failed")
        logger.error(
            "Receiver %s will not try event %s again: the listener is stopping",
            describe(lane.receiver.func),
            attempts.event.id,
        )
        lane.done(attempts.event)


def _first(event: Event) -> _Attempts:
    return _Attempts(event, Backoff(RETRY_BASE, RETRY_CAP))
