"""A transactional consumer: its own database work and its cursor are committed together.

Several events share a transaction. When one of them fails, everything since the last commit is
rolled back, and done again one event at a time up to the one that failed: so a failure undoes
nothing else, and costs nothing while there is none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction

from .entries import Entry
from .losses import close_lost, is_loss
from .state import CursorLost, Parked

if TYPE_CHECKING:
    from .cursor import Page
    from .worker import Worker

logger = logging.getLogger("django_pgnotify.durable")

BATCH = 100
BATCH_SECONDS = 0.1
"""Events, and seconds, that share a transaction at most: what they lock stays locked for it."""

CONFLICT_ATTEMPTS = 5
"""How often a deadlock, serialization failure or lost connection is simply tried again."""


class _Attempt:
    """One transaction. A commit hook of somebody else's may raise after it has committed."""

    def __init__(self, using: str) -> None:
        self.using = using
        self.committed = False
        self.begun = 0
        self._raw: Any = None

    def note_commit(self) -> None:
        self.committed = True

    def note_done(self) -> None:
        """Only the COMMIT is left."""
        self._raw = connections[self.using].connection

    def check_doubt(self, exc: BaseException) -> None:
        """Django drops a connection that does not answer a COMMIT, nor the ROLLBACK behind it.

        Raises:
            CursorLost: so it was. Whoever claims the consumer anew waits for the row that the
                transaction has locked, and then reads what became of it.
        """
        raw = self._raw
        if raw is not None and (connections[self.using].connection is not raw or raw.closed):
            problem = "the connection was lost during a COMMIT, which may have taken place"
            raise CursorLost(problem) from exc


def run_in_transactions(
    worker: Worker, page: Page, waiting: Sequence[Entry], blocked: set[str]
) -> tuple[int, list[Parked]]:
    """Handle the first of those that wait and store the cursor behind them.

    Returns:
        How many have been dealt with, and which of them are parked.

    Raises:
        CursorLost: somebody else runs the consumer, and nothing was done; or nobody can know
            whether it was.
        django.db.Error: the database cannot be used; nothing was done.
    """
    if waiting[0].event is None:
        parked = [worker.unusable(waiting[0])]
        worker.state.move(page.after(waiting[0].logged), 0, parked)
        return 1, parked
    if worker.one_by_one > 0:
        worker.one_by_one -= 1
        return 1, _alone(worker, page, waiting[0], blocked)
    batch: list[Entry] = []
    for entry in waiting[:BATCH]:
        if entry.event is None:
            break
        batch.append(entry)
    attempt = _Attempt(worker.using)
    try:
        return _together(worker, page, batch, blocked, attempt)
    except CursorLost:
        raise
    except BaseException as exc:  # noqa: BLE001 - told apart when the event is alone
        if attempt.committed:
            _log_hook(worker, exc)
            return attempt.begun, []
        attempt.check_doubt(exc)
        worker.one_by_one = attempt.begun
        return 0, []


def _together(
    worker: Worker, page: Page, batch: Sequence[Entry], blocked: set[str], attempt: _Attempt
) -> tuple[int, list[Parked]]:
    ends = time.monotonic() + BATCH_SECONDS
    parked: list[Parked] = []
    with transaction.atomic(worker.using):
        transaction.on_commit(attempt.note_commit, worker.using)
        for entry in batch:
            attempt.begun += 1
            if entry.key in blocked:
                parked.append(worker.behind(entry))
            elif entry.event is not None and worker.calls.wants(entry.event):
                worker.calls.call(entry.event)
            if worker.stopping or time.monotonic() > ends:
                break
        cursor = page.after(batch[attempt.begun - 1].logged)
        worker.state.move(cursor, attempt.begun - len(parked), parked)
        attempt.note_done()
    return attempt.begun, parked


def _alone(worker: Worker, page: Page, entry: Entry, blocked: set[str]) -> list[Parked]:
    cursor = page.after(entry.logged)
    if entry.key in blocked:
        parked = worker.behind(entry)
        worker.state.move(cursor, 0, [parked])
        return [parked]

    def handle() -> None:
        if entry.event is not None and worker.calls.wants(entry.event):
            worker.calls.call(entry.event)
        worker.state.move(cursor, 1)

    failure = in_transaction(worker, handle)
    if failure is None:
        return []
    parked = worker.failed(entry, failure)
    worker.state.move(cursor, 0, [parked])
    if parked.retry_in is not None and parked.key is not None:
        blocked.add(parked.key)
    return [parked]


def in_transaction(worker: Worker, handle: Callable[[], None]) -> BaseException | None:
    """Run ``handle`` in a transaction; returns what it failed with, its work undone.

    Raises:
        CursorLost: somebody else runs the consumer, and nothing was done; or nobody can know
            whether it was.
    """
    for number in range(1, CONFLICT_ATTEMPTS + 1):
        attempt = _Attempt(worker.using)
        try:
            with transaction.atomic(worker.using):
                transaction.on_commit(attempt.note_commit, worker.using)
                handle()
                attempt.note_done()
        except CursorLost:
            raise
        except BaseException as exc:  # noqa: BLE001 - a receiver's failure, whatever it is
            if attempt.committed:
                _log_hook(worker, exc)
                return None
            attempt.check_doubt(exc)
            close_lost()
            if number < CONFLICT_ATTEMPTS and (_is_conflict(exc) or is_loss(exc)):
                continue
            return exc
        else:
            return None
    return None


def _is_conflict(exc: BaseException) -> bool:
    """Whether it is a deadlock or a serialization failure (SQLSTATE class 40)."""
    return str(getattr(exc.__cause__, "sqlstate", None) or "").startswith("40")


def _log_hook(worker: Worker, exc: BaseException) -> None:
    logger.error(
        "A commit hook of consumer %s failed; its events have been handled",
        worker.receiver.uid,
        exc_info=exc,
    )
