"""Finds out what a consumer may have missed, and tells it, until its receiver has taken that in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .. import signals
from ..decoding import gap_event
from .epoch import Epoch, current_epoch
from .state import Claim, ConsumerState, Control

if TYPE_CHECKING:
    from .worker import Worker

logger = logging.getLogger("django_pgnotify.durable")


class Gaps:
    """The gaps of one consumer, on the worker's thread.

    Args:
        worker: whose receiver is told.
        pause: seconds before the next attempt, after so many of them.
    """

    def __init__(self, worker: Worker, pause: Callable[[int], float]) -> None:
        self.due: float | None = None
        """When to tell again (monotonic seconds), after a receiver has failed on a gap."""
        self._worker = worker
        self._pause = pause
        self._gap: tuple[object, ...] = ()
        self._attempts = 0
        self._told: set[str] = set()

    def tell(self, control: Control) -> None:
        """Tell of the gap that is stored, if there is one and it is time to.

        A receiver that raises is told again, as often as it has retries; meanwhile events go on.

        Raises:
            django.db.Error: the database cannot be used, which is no attempt.
        """
        gap = (control.gap_cause, control.gap_since, control.gap_until)
        if not control.gap_cause:
            self.due = None
            return
        if gap != self._gap:
            self._begin(control)
            self._gap = gap
        elif self.due is not None and time.monotonic() < self.due:
            return
        attempt = self._attempts + 1
        will_retry = attempt <= self._worker.receiver.retries
        if self._tell_topics(control, attempt, will_retry=will_retry) or not will_retry:
            self._worker.state.gap_told(control)
            self._gap, self.due = (), None
        else:
            self._attempts = attempt
            self.due = time.monotonic() + self._pause(attempt)

    def _begin(self, control: Control) -> None:
        logger.error(
            "Consumer %s may have missed events from %s to %s: %s",
            self._worker.receiver.uid,
            control.gap_since,
            control.gap_until,
            control.gap_cause,
        )
        self._worker.stats.add("gaps")
        self._attempts, self.due = 0, None
        self._told.clear()

    def _tell_topics(self, control: Control, attempt: int, *, will_retry: bool) -> bool:
        """Call the receiver for each topic that it has not taken in; whether it has all now."""
        worker = self._worker
        if not worker.receiver.on_gap:
            return True
        until = control.gap_until or datetime.now(UTC)
        for topic in worker.topics:
            if topic in self._told:
                continue
            gap = gap_event(
                topic,
                since=control.gap_since,
                until=until,
                cause=control.gap_cause,
                using=worker.using,
            )
            try:
                worker.calls.handle(gap)
            except BaseException as exc:  # sys.exit() in a receiver is its failure
                worker.check_database(exc)
                logger.error(
                    "Consumer %s failed on a gap, attempt %d%s",
                    worker.receiver.uid,
                    attempt,
                    ", will retry" if will_retry else "",
                    exc_info=exc,
                )
                signals.receiver_failed.send_robust(
                    worker.receiver.func,
                    event=gap,
                    exception=exc,
                    attempt=attempt,
                    will_retry=will_retry,
                )
            else:
                self._told.add(topic)
        return len(self._told) == len(worker.topics)


def check_epoch(state: ConsumerState, claim: Claim) -> None:
    """Note a gap, or stop for a resync, if the server or the database is not the one it was."""
    now, then = current_epoch(state.using), Epoch.parse(claim.epoch)
    cause = then.foreign_to(now)
    if cause is not None:
        state.stop_for_resync(cause)
    elif then.timeline_changed(now):
        state.note_gap(
            f"the server's timeline is {now.timeline} and was {then.timeline}: it was "
            f"promoted, or restored to a point in time",
            str(now),
        )
