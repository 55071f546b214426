"""Workers: call one lane's receiver, slice by slice, until the lane is empty.

A worker asks for one of the slots that all receivers share, for one slice of time after the other.
Async receivers then run on the listener's loop, sync ones in a thread, with Django's connection
hygiene. A thread goes from event to event, and on to the next lane, without the loop; a pause
before a retry takes no slot.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections

from .. import signals
from ..backoff import Backoff
from ..events import Event
from ..registry import describe
from ..stats import Stats
from .lane import Batch, Lane
from .slots import Slots
from .threads import Threads

logger = logging.getLogger("django_pgnotify.dispatching")

THREAD_SLICE = 0.1
"""Seconds after which a worker in a thread lets another one have its slot."""

LOOP_SLICE = 0.01
"""The same for async receivers, which share the loop with the reader."""

QUICK = 0.001
"""Seconds: a worker that was through with its batch sooner takes twice as many events next time."""

BATCH_LIMIT = 512

LOOK_AT_CLOCK = 7
"""A worker looks at the clock whenever these bits of its count are 0."""

HYGIENE_INTERVAL = 1.0
"""Seconds between two looks at the connections that async receivers use."""

RETRY_BASE = 0.2
RETRY_CAP = 30.0


@dataclass(slots=True, eq=False)
class _Retry:
    """An event that stays in a worker's hand through attempts and pauses."""

    batch: Batch
    pauses: Backoff = field(default_factory=lambda: Backoff(RETRY_BASE, RETRY_CAP))


class _Failure(NamedTuple):
    """What ``receiver_failed`` is sent."""

    event: Event
    exception: BaseException
    attempt: int
    will_retry: bool


_Outcome = Literal["empty", "more"] | _Retry
"""Of a slice: the lane had nothing more, has more, or its event is to be tried again."""


class Runner:
    """Runs workers for lanes. Make it on the loop; :meth:`staff` may be called by any thread.

    Args:
        concurrency: receivers that may run at once, of all lanes together.
        stats: ``handled``, ``failed`` and ``retried`` are counted here.
        ended: told of the lane, by any thread, whenever a worker has been dismissed.
    """

    def __init__(self, concurrency: int, stats: Stats, ended: Callable[[Lane], None]) -> None:
        self._stats = stats
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._slots = Slots(concurrency)
        self._threads = Threads(concurrency, "pgnotify-receiver", connections.close_all)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pausing: dict[_Retry, tuple[Lane, asyncio.TimerHandle]] = {}
        self._stopping = False
        self._closed = False
        self._hygiene_due = 0.0

    def staff(self, lane: Lane) -> None:
        """Put as many workers on ``lane`` as it is worth now."""
        for _ in range(lane.hire()):
            self._ask(lane, None)

    def stop_retrying(self) -> None:
        """Failures are final from here on, so that a shutdown need not wait for pauses."""
        self._stopping = True
        for retry, (lane, alarm) in list(self._pausing.items()):
            alarm.cancel()
            self._give_up(lane, retry)

    async def close(self, *, drained: bool) -> None:
        """Let go of the threads; where something still runs, without waiting for it."""
        self._closed = True
        self.stop_retrying()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._threads.close, wait=drained)

    # -- slices -----------------------------------------------------------------------------

    def _ask(self, lane: Lane, retry: _Retry | None) -> None:
        begin = self._begin_task if lane.receiver_is_async else self._begin_in_thread
        self._slots.ask(partial(begin, lane, retry))

    def on_loop(self, func: Callable[..., object], *args: Any) -> None:
        """Have the loop call ``func`` soon, from any thread; nothing once the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(func, *args)

    def _end_slice(self, lane: Lane, outcome: _Outcome) -> None:
        if outcome == "more":
            self._ask(lane, None)  # behind those who wait for a slot already
        elif isinstance(outcome, _Retry):
            self.on_loop(self._pause, lane, outcome)
        self._slots.release()
        if not self._closed:
            self.staff(lane)  # a gap that was handled makes room for several again
        if outcome == "empty":
            self._ended(lane)

    def _pause(self, lane: Lane, retry: _Retry) -> None:
        alarm = self._loop.call_later(retry.pauses.next(), self._try_again, lane, retry)
        self._pausing[retry] = lane, alarm
        if self._stopping:
            alarm.cancel()
            self._give_up(lane, retry)

    def _try_again(self, lane: Lane, retry: _Retry) -> None:
        del self._pausing[retry]
        self._ask(lane, retry)

    def _give_up(self, lane: Lane, retry: _Retry) -> None:
        """A shutdown came before the next attempt."""
        del self._pausing[retry]
        self._stats.add("failed")
        logger.error(
            "Receiver %s will not try event %s again: the listener is stopping",
            describe(lane.receiver.func),
            retry.batch.events[0].id,
        )
        retry.batch.handled = 1
        lane.finish(retry.batch)
        self._ask(lane, None)

    # -- threads ----------------------------------------------------------------------------

    def _begin_in_thread(self, lane: Lane, retry: _Retry | None) -> None:
        self._threads.run(partial(self._slice_in_thread, lane, retry))

    def _slice_in_thread(self, lane: Lane, retry: _Retry | None) -> None:
        # A fresh context: nothing of one slice is seen by the next.
        self._end_slice(lane, contextvars.Context().run(self._handle, lane, retry))

    def _handle(self, lane: Lane, retry: _Retry | None) -> _Outcome:
        if connections.all(initialized_only=True):
            close_old_connections()
        func, until = lane.receiver.func, time.monotonic() + THREAD_SLICE
        work, answer = self._work(lane, retry, until), None
        try:
            while True:
                step = work.send(answer)
                if isinstance(step, Batch):
                    answer = self._call(func, step, until)
                else:
                    answer = None
                    signals.receiver_failed.send_robust(
                        func,
                        event=step.event,
                        exception=step.exception,
                        attempt=step.attempt,
                        will_retry=step.will_retry,
                    )
                    # A connection the failure broke must not meet the next event.
                    close_old_connections()
        except StopIteration as end:
            outcome: _Outcome = end.value
            return outcome
        finally:
            if connections.all(initialized_only=True):
                close_old_connections()

    def _call(
        self, func: Callable[[Event], object], batch: Batch, until: float
    ) -> BaseException | None:
        """Call the receiver with one event after the other; returns what the last one raised."""
        try:
            for event in batch.events:
                func(event)
                batch.handled += 1
                # Each time would cost as much as the call of a quick receiver.
                if not batch.handled & LOOK_AT_CLOCK and time.monotonic() > until:
                    break
        except BaseException as exc:  # noqa: BLE001 - sys.exit() in a receiver is its failure
            batch.failed = event
            return exc
        return None

    # -- the loop ---------------------------------------------------------------------------

    def _begin_task(self, lane: Lane, retry: _Retry | None) -> None:
        if threading.get_ident() == self._loop_thread:
            self._create_task(lane, retry)
        else:
            self.on_loop(self._create_task, lane, retry)

    def _create_task(self, lane: Lane, retry: _Retry | None) -> None:
        task = asyncio.create_task(
            self._slice_on_loop(lane, retry), name=f"pgnotify-{lane.receiver.uid}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _slice_on_loop(self, lane: Lane, retry: _Retry | None) -> None:
        try:
            if time.monotonic() >= self._hygiene_due:
                await self._clean_connections()
            outcome = await self._handle_async(lane, retry)
        except BaseException:
            lane.leave()  # cancelled: nobody else will dismiss this worker
            self._slots.release()
            raise
        self._end_slice(lane, outcome)

    async def _handle_async(self, lane: Lane, retry: _Retry | None) -> _Outcome:
        func, until = lane.receiver.func, time.monotonic() + LOOP_SLICE
        work, answer = self._work(lane, retry, until), None
        try:
            while True:
                step = work.send(answer)
                if isinstance(step, Batch):
                    answer = await self._call_async(lane, step, until)
                else:
                    answer = None
                    await signals.receiver_failed.asend_robust(
                        func,
                        event=step.event,
                        exception=step.exception,
                        attempt=step.attempt,
                        will_retry=step.will_retry,
                    )
                    await self._clean_connections()
        except StopIteration as end:
            outcome: _Outcome = end.value
            return outcome

    async def _call_async(self, lane: Lane, batch: Batch, until: float) -> BaseException | None:
        func, timeout, limit = lane.receiver.func, lane.receiver.timeout, None
        try:
            for event in batch.events:
                if timeout is None:
                    await func(event)
                else:
                    async with asyncio.timeout(timeout) as limit:
                        await func(event)
                batch.handled += 1
                if not batch.handled & LOOK_AT_CLOCK and time.monotonic() > until:
                    break
        except (Exception, SystemExit, asyncio.CancelledError) as exc:
            if self._closed and isinstance(exc, asyncio.CancelledError):
                batch.handled += 1
                lane.finish(batch)
                raise
            if limit is not None and limit.expired() and type(exc) is TimeoutError:
                exc.args = (lane.receiver.timed_out,)
            batch.failed = event
            return exc
        return None

    async def _clean_connections(self) -> None:
        self._hygiene_due = time.monotonic() + HYGIENE_INTERVAL
        await sync_to_async(close_old_connections)()

    # -- both -------------------------------------------------------------------------------

    def _work(
        self, lane: Lane, retry: _Retry | None, until: float
    ) -> Generator[Batch | _Failure, BaseException | None, _Outcome]:
        """What a slice does: yields batches to call the receiver with, and failures to tell of.

        It is sent what the receiver raised, after a batch.
        """
        batch, limit = lane.take() if retry is None else retry.batch, 1
        while batch is not None:
            begun = time.monotonic()
            exc = yield batch
            if batch.handled:
                self._stats.add("handled", batch.handled)
            if exc is not None:
                failure = self._failed(lane, batch.failed, retry, exc)
                yield failure
                if failure.will_retry:
                    kept = lane.finish(batch, keep=True)
                    assert kept is not None  # the event that failed
                    return _Retry(kept) if retry is None else _Retry(kept, retry.pauses)
                batch.handled += 1
            retry = None
            lane.finish(batch)
            now = time.monotonic()
            if now > until:
                return "more"
            limit = min(limit * 2, BATCH_LIMIT) if now - begun < QUICK else 1
            batch = lane.take(limit)
        return "empty"

    def _failed(
        self, lane: Lane, event: Event, retry: _Retry | None, exc: BaseException
    ) -> _Failure:
        """Count and log a failure."""
        attempt = 1 if retry is None else retry.pauses.attempts + 1
        again = attempt <= lane.receiver.retries and not self._stopping
        self._stats.add("retried" if again else "failed")
        what_now = ", will retry" if again else ", given up" if lane.receiver.retries else ""
        overran = lane.receiver.timeout is not None and exc.args == (lane.receiver.timed_out,)
        logger.error(
            "Receiver %s failed on event %s (%s of topic %r), attempt %d%s%s",
            describe(lane.receiver.func),
            event.id,
            event.action,
            event.topic,
            attempt,
            f", {lane.receiver.timed_out}" if overran else "",
            what_now,
            exc_info=exc,
            extra={"receiver": lane.receiver.uid, "event_id": event.id, "topic": event.topic},
        )
        return _Failure(event, exc, attempt, again)
