"""Events that a consumer gets outside the order of the log: retries, requeued and replayed ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..events import Event
from .cursor import Logged
from .entries import Entry, prepare
from .state import Letter, Verdict
from .transactional import in_transaction

if TYPE_CHECKING:
    from .worker import Worker

LETTERS_AT_ONCE = 200


def run_letters(worker: Worker, seconds: float) -> bool:
    """Try what is due, by id, one at least and for so long, and store what became of it.

    A letter whose key has just failed again waits with it.

    Returns:
        Whether more may be due.

    Raises:
        CursorLost: somebody else runs the consumer.
        django.db.Error: the database cannot be used.
    """
    letters = worker.state.letters(LETTERS_AT_ONCE)
    ends = time.monotonic() + seconds  # to find them may have taken longer
    while _run(worker, letters, ends):
        if worker.stopping or time.monotonic() > ends:
            return True
        letters = worker.state.letters(LETTERS_AT_ONCE)
    return False


def _run(worker: Worker, letters: Sequence[Letter], ends: float) -> bool:
    """Try some, the first whatever the time is; whether there may be more."""
    blocked: set[str] = set()
    done: list[int] = []
    events: list[Event] = []
    failed: list[Verdict] = []
    more = len(letters) == LETTERS_AT_ONCE
    for place, letter in enumerate(letters):
        if worker.stopping or (place and time.monotonic() > ends):
            more = True
            break
        if letter.key in blocked:
            continue
        entry = prepare(
            Logged(letter.event_id, letter.topic, letter.source, letter.published_at, letter.body),
            letter.body,
            worker.using,
        )
        failure = _call(worker, letter, entry)
        if failure is None and entry.event is not None:
            events.append(entry.event)
            if not worker.receiver.transactional:
                done.append(letter.id)
            continue
        if failure is None:
            parked = worker.unusable(entry)
        else:
            parked = worker.failed(entry, failure, letter.attempts + 1)
        failed.append(Verdict(letter.id, letter.attempts + 1, parked.retry_in, parked.error))
        if parked.retry_in is not None and letter.key is not None:
            blocked.add(letter.key)
    if done or failed:
        worker.state.settle(done, failed)
    worker.stats.add("handled", len(events))
    worker.observe(events)
    return more


def _call(worker: Worker, letter: Letter, entry: Entry) -> BaseException | None:
    """Call the receiver; returns what it failed with."""
    event = entry.event
    if event is None:
        return None
    if worker.receiver.transactional:

        def handle() -> None:
            if worker.calls.wants(event):
                worker.calls.call(event)
            worker.state.settle([letter.id])

        return in_transaction(worker, handle)
    try:
        if worker.calls.wants(event):
            worker.calls.handle(event)
    except BaseException as exc:  # noqa: BLE001 - a receiver's failure, whatever it is
        return exc
    return None
