"""Runs one durable consumer: sweep, call, store how far it has come; again.

A thread of its own, with Django's connection to the database that has the log. Who may run it is
settled by ``sharing``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from django.db import DatabaseError, InterfaceError, OperationalError, connections

from .. import signals
from ..backoff import Backoff
from ..conf import conf
from ..events import Event
from ..registry import Receiver, Subscription
from ..stats import Stats
from .calls import Calls, Limits
from .cursor import Cursor, LogReader, Page, TransactionIdsWentBack
from .entries import Entry, prepare_some
from .gaps import Gaps, check_epoch
from .letters import run_letters
from .log import reason, storable
from .losses import is_loss
from .state import ConsumerState, Control, CursorLost, Parked, Replaced, create
from .transactional import run_in_transactions

logger = logging.getLogger("django_pgnotify.durable")

SLICE = 0.25
"""Seconds after which what has been handled is stored, at the latest after the event at hand.

So long has the log its turn before letters that are due have theirs, or as long as those had.
"""

RETRY_BASE = 0.5
RETRY_CAP = 300.0
"""Seconds: the pause before retry n is a random part of min(cap, base * 2**n)."""

TROUBLE_CAP = 5.0
"""Seconds that a pause after trouble with the database is at most."""

Observe = Callable[[Sequence[Event]], None]


class Worker:
    """Runs one consumer in a thread; start it when its advisory lock is held.

    Args:
        receiver: the consumer, named by its ``uid``.
        subscriptions: the streams it reads.
        using: alias of the database that has the log.
        loop: where an async receiver runs.
        stats: ``handled``, ``failed`` and ``retried`` are counted here.
        observe: told of what has been handled, on this thread.
    """

    def __init__(
        self,
        receiver: Receiver,
        subscriptions: Sequence[Subscription],
        *,
        using: str,
        loop: asyncio.AbstractEventLoop,
        stats: Stats,
        observe: Observe | None = None,
    ) -> None:
        self.receiver = receiver
        self.topics = tuple(dict.fromkeys(one.topic for one in subscriptions))
        self.using = using
        self.stats = stats
        self.state = ConsumerState(receiver.uid, using)
        self.calls = Calls(receiver, subscriptions, loop)
        self.reader = LogReader(using, self.topics)
        self._gaps = Gaps(self, retry_pause)
        self.one_by_one = 0
        """Events that are to have a transaction each, because one of them has failed."""
        self._observe = observe
        self._awake = threading.Event()
        self._asked = False
        self._turn, self._turn_ends = SLICE, 0.0
        self._more = False
        self._stop = threading.Event()
        self._said = ""
        self._letters_due: float | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"pgnotify-consumer-{receiver.uid}", daemon=True
        )

    # -- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self, *, asked: bool = False) -> None:
        """There may be something new; ``asked``: by an operator, and not in the log."""
        if asked:
            self._asked = True
        self._awake.set()

    def stop(self) -> None:
        """Finish the event at hand, store the cursor, and end."""
        self._stop.set()
        self._awake.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def _halted(self) -> bool:
        """Whether it is to begin nothing more now."""
        return self.stopping or self.state.paused

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        pauses = Backoff(0.1, TROUBLE_CAP)
        try:
            while not self.stopping:
                try:
                    self._consume(pauses)
                except Replaced as exc:
                    # That one holds the lock, and this process has lost it without noticing. To
                    # claim it once more would have both take it from each other until it does.
                    logger.warning("Consumer %s ends here: %s", self.receiver.uid, exc)
                    break
                except CursorLost as exc:
                    logger.info("Consumer %s begins anew: %s", self.receiver.uid, exc)
                except (DatabaseError, InterfaceError) as exc:
                    self._say(f"the database cannot be used: {reason(exc, self.using)}")
                except Exception:
                    logger.exception("Consumer %s stumbled, and goes on", self.receiver.uid)
                if not self.stopping:
                    self._close_connection()
                    # Not to be woken by news, which would come as often as somebody publishes.
                    self._stop.wait(pauses.next())
            self._let_go()
        finally:
            self.calls.close()
            connections.close_all()

    def _consume(self, pauses: Backoff) -> None:
        create(self.receiver.uid, self.topics, self.receiver.start, self.using)
        claim = self.state.claim(conf.source, self.topics)
        check_epoch(self.state, claim)
        self.reader.reset()
        cursor = claim.cursor
        while not self.stopping:
            # Cleared before the look that it guards.
            self._awake.clear()
            self._asked = False
            pause = conf.SWEEP_INTERVAL
            control = self.state.control()
            if control.paused or control.resync:
                self._say(control.resync or "")
            else:
                self._gaps.tell(control)
                blocked = self._run_letters(control)
                try:
                    cursor = self._sweep(cursor, blocked)
                    self._say("")
                except TransactionIdsWentBack as exc:
                    self.state.stop_for_resync(f"transaction ids went back: {exc}")
                if self._more:
                    pause = 0.0
                elif (due := self._due) is not None:
                    pause = min(pause, max(due - time.monotonic(), 0.0))
            pauses.reset()
            if not self.stopping:
                self._awake.wait(pause)

    @property
    def _due(self) -> float | None:
        """When a letter or a gap is to be tried again (monotonic seconds)."""
        return min(
            (due for due in (self._letters_due, self._gaps.due) if due is not None), default=None
        )

    @property
    def _turn_is_over(self) -> bool:
        """Whether the log has had its time, and something beside it waits."""
        now = time.monotonic()
        if now < self._turn_ends:
            return False
        return self._asked or ((due := self._due) is not None and due <= now)

    # -- the log ----------------------------------------------------------------------------

    def _sweep(self, cursor: Cursor, blocked: set[str]) -> Cursor:
        """Handle what is new, page by page, until a sweep is complete or its turn is over.

        In the middle of a page too: of slow events, one lasts for long.
        """
        self._turn_ends, self._more = time.monotonic() + self._turn, True
        while not self._halted:
            under_way = cursor.target
            page = self.reader.next_page(cursor)
            if page.events:
                cursor = self._handle(page, blocked)
            else:
                # Nothing new is not worth a write: the stored cursor says the same.
                if under_way:
                    self.state.move(page.end, 0)
                cursor = page.end
            if not cursor.target and not under_way:
                # Of a sweep that began long ago, what came since is to be read now.
                self._more = False
                break
            if self._turn_is_over:
                break
        return cursor

    def _handle(self, page: Page, blocked: set[str]) -> Cursor:
        """Handle a page, slice by slice; returns the cursor that has been stored."""
        ahead, waiting = deque(page.events), list[Entry]()
        cursor = page.begin
        while (ahead or waiting) and not self._halted:
            if not waiting:
                waiting = prepare_some(ahead, self.reader.body, self.using)
            if self.receiver.transactional:
                done, parked = run_in_transactions(self, page, waiting, blocked)
            else:
                done, parked = self._run_slice(waiting, blocked)
                self._store(page.after(waiting[done - 1].logged), done - len(parked), parked)
            if done:
                cursor = page.after(waiting[done - 1].logged)
                self._note_done(waiting[:done], parked)
                del waiting[:done]
            if self._turn_is_over:
                break
        return cursor

    def _run_slice(self, waiting: Sequence[Entry], blocked: set[str]) -> tuple[int, list[Parked]]:
        """Handle the first of those that wait; returns how many, and which of them are parked."""
        ready: list[Event] = []
        for one in waiting:
            if one.event is None:
                break
            ready.append(one.event)
        if not ready:
            return 1, [self.unusable(waiting[0])]
        limits = Limits(time.monotonic() + SLICE, lambda: self.stopping)
        outcomes = self.calls.run(ready, blocked, limits)
        parked = []
        for place, (one, outcome) in enumerate(zip(waiting, outcomes, strict=False)):
            if outcome == "behind":
                parked.append(self.behind(one))
            elif isinstance(outcome, BaseException):
                try:
                    parked.append(self.failed(one, outcome))
                except (DatabaseError, InterfaceError):
                    if not place:
                        raise
                    return place, parked
        return len(outcomes), parked

    def _store(self, cursor: Cursor, handled: int, parked: Sequence[Parked]) -> None:
        """Store a cursor; over a new connection where the old one has been lost meanwhile.

        What is stored is stored again then, if it had been; handling it again would be worse.
        """
        try:
            self.state.move(cursor, handled, parked)
        except (OperationalError, InterfaceError):
            self._close_connection()
            self.state.move(cursor, handled, parked)

    def _note_done(self, done: Sequence[Entry], parked: Sequence[Parked]) -> None:
        now = time.monotonic()
        for one in parked:
            if one.retry_in is None:
                continue
            # One that waits behind another is due when that is.
            due = now + one.retry_in if one.attempts else self._letters_due or 0.0
            self._letters_due = due if self._letters_due is None else min(self._letters_due, due)
        self.stats.add("handled", len(done) - len(parked))
        aside = {one.event.id for one in parked}
        self.observe([one.event for one in done if one.event and one.logged.id not in aside])

    def observe(self, events: Sequence[Event]) -> None:
        """These have been handled."""
        if self._observe is not None and events:
            self._observe(events)

    # -- failures -----------------------------------------------------------------------------

    def failed(self, one: Entry, exc: BaseException, attempts: int = 1) -> Parked:
        """What becomes of an event that failed.

        Raises:
            django.db.Error: it failed because the database is away, which is not its fault.
        """
        self.check_database(exc)
        will_retry = attempts <= self.receiver.retries
        self.stats.add("retried" if will_retry else "failed")
        event = one.event
        logger.error(
            "Consumer %s failed on event %s (%d of the log, topic %r), attempt %d%s",
            self.receiver.uid,
            event.id if event is not None else "?",
            one.logged.id,
            one.logged.topic,
            attempts,
            ", will retry" if will_retry else ", kept as a dead letter",
            exc_info=exc,
            extra={"receiver": self.receiver.uid, "topic": one.logged.topic},
        )
        signals.receiver_failed.send_robust(
            self.receiver.func,
            event=event,
            exception=exc,
            attempt=attempts,
            will_retry=will_retry,
        )
        error = storable("".join(traceback.format_exception(exc))) or ""
        retry_in = retry_pause(attempts) if will_retry else None
        return Parked(one.logged, one.key, one.body, attempts, retry_in, error)

    def check_database(self, exc: BaseException) -> None:
        """Raise a ``django.db.Error`` if a failure came with the database being away."""
        if isinstance(exc, (DatabaseError, InterfaceError)) or is_loss(exc):
            with connections[self.using].cursor() as cursor:
                cursor.execute("SELECT 1")

    def unusable(self, one: Entry) -> Parked:
        """What becomes of an event that no receiver can be given."""
        self.stats.add("broken")
        logger.error(
            "Consumer %s cannot be given event %d of the log: %s",
            self.receiver.uid,
            one.logged.id,
            one.problem,
        )
        return Parked(one.logged, None, one.body, 1, None, one.problem)

    def behind(self, one: Entry) -> Parked:
        """What becomes of an event whose key waits for an earlier one to be tried again."""
        return Parked(one.logged, one.key, one.body, 0, 0.0, "")

    # -- letters --------------------------------------------------------------------------------

    def _run_letters(self, control: Control) -> set[str]:
        """Try again what is due, by key in order; returns the keys that still wait."""
        self._letters_due, self._turn = None, SLICE
        if not control.has_letters:
            return set()
        begun = time.monotonic()
        more = run_letters(self, SLICE)
        next_in = self.state.next_letter_in()
        control = self.state.control()
        if next_in is not None:
            self._letters_due = time.monotonic() + next_in
        if more or self.state.letters(1):
            self._letters_due = 0.0
        self._turn = max(SLICE, time.monotonic() - begun)
        return set(control.waiting_keys)

    # -- the rest -------------------------------------------------------------------------------

    def _say(self, problem: str) -> None:
        """Log what keeps it from working, once."""
        if problem and problem != self._said:
            logger.error("Consumer %s waits: %s", self.receiver.uid, problem)
        self._said = problem

    def _let_go(self) -> None:
        try:
            self.state.let_go()
        except (DatabaseError, InterfaceError) as exc:
            logger.info("Consumer %s could not say that it ends: %s", self.receiver.uid, exc)

    def _close_connection(self) -> None:
        try:
            connections[self.using].close()
        except (DatabaseError, InterfaceError):
            logger.debug("Consumer %s: its connection was closed already", self.receiver.uid)


def retry_pause(attempts: int) -> float:
    """Seconds before the next attempt, after ``attempts`` of them."""
    pauses = Backoff(RETRY_BASE, RETRY_CAP)
    pauses.attempts = attempts - 1
    return pauses.next()
