"""A lane: the events that wait for one receiver, and the rule which of them may run next.

Pure scheduling; who calls the receiver lives in ``runner``. Events with the same key run one
after the other, in order; with ``concurrency`` 1 all events do. A gap marker runs alone: after
everything before it, before anything behind it. Any thread may take and finish.

Events come, wait and go in batches, so that what the lane costs is paid once for many of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from ..events import Event
from ..registry import Receiver


class _Waiting:
    """Events that came together, and the bytes of payload that each of them counts for."""

    __slots__ = ("events", "share")

    def __init__(self, events: Iterable[Event], share: int) -> None:
        self.events = deque(events)
        self.share = share


class Batch:
    """Events in a worker's hand, to be handled in order.

    Attributes:
        events: the lane may cut off the end of it, while the worker goes through it.
        handled: how many have been; the worker counts.
        failed: the one that the receiver raised at; by then it may have been cut off.
    """

    __slots__ = ("events", "failed", "handled", "share")

    def __init__(self, events: list[Event], share: int) -> None:
        self.events = events
        self.share = share
        self.handled = 0
        self.failed = events[0]


class Lane:
    """The queue of one receiver.

    Args:
        receiver: whose lane it is.
        max_waiting: how many events may wait.
        max_bytes: how many bytes of payload they may have come in together.
    """

    def __init__(self, receiver: Receiver, max_waiting: int, max_bytes: int) -> None:
        self.receiver = receiver
        self.receiver_is_async = receiver.is_async
        self.max_waiting = max_waiting
        self.max_bytes = max_bytes
        self.coalesced = 0
        """Updates that a later change of the same row has replaced while they waited."""
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._parked: dict[str, deque[_Waiting]] = {}
        self._busy: set[str] = set()
        self._waiting = 0
        self._bytes = 0
        self._workers = 0
        self._in_hand: set[Batch] = set()
        self._in_gap = False

    def put(self, events: Sequence[Event], size: int = 0) -> list[Event]:
        """Queue events in order; returns those at the queue's end that there was no room for.

        Where there is too little room, updates of a row that is updated or deleted again later
        in the queue give way first.

        Args:
            size: bytes of payload the events came in.
        """
        dropped: list[Event] = []
        if not events:
            return dropped
        share = size // len(events)
        with self._lock:
            self._queue.append(_Waiting(events, share))
            self._waiting += len(events)
            self._bytes += share * len(events)
            if self._fits():
                return dropped
            self._coalesce()
            while len(dropped) < len(events) and self._queue and not self._fits():
                last = self._queue[-1]
                if last.events[-1].action == "gap":
                    break  # it is there so that nothing is lost in silence
                dropped.append(last.events.pop())
                self._forget(1, last.share)
                if not last.events:
                    self._queue.pop()
            return dropped

    def put_gap(self, event: Event) -> None:
        """Queue a gap marker; there is always room for one."""
        with self._lock:
            self._queue.append(_Waiting([event], 0))
            self._waiting += 1

    def hire(self) -> int:
        """How many more workers the queue is worth now; each must call :meth:`take`."""
        with self._lock:
            if not self._queue or self._held_up():
                return 0
            wanted = min(self.receiver.concurrency - self._workers, self._waiting - self._asleep())
            if self._next_is_gap():
                wanted = min(wanted, 1)
            self._workers += max(0, wanted)
            return max(0, wanted)

    def take(self, limit: int = 1) -> Batch | None:
        """Up to ``limit`` events that may run, for a hired worker; None dismisses the worker."""
        with self._lock:
            events: list[Event] = []
            size = 0
            if not self._queue or self._held_up():
                pass
            elif self._next_is_gap():
                events = [self._queue.popleft().events[0]]
                self._in_gap = True
            elif self.receiver.concurrency == 1:
                first = self._queue[0]
                if len(first.events) <= limit:
                    events = list(self._queue.popleft().events)
                else:
                    events = [first.events.popleft() for _ in range(limit)]
                size = first.share * len(events)
            else:
                events, size = self._take_free_keys(limit)
            if not events:
                self._workers -= 1
                return None
            self._waiting -= len(events)
            self._bytes -= size
            batch = Batch(events, size // len(events))
            self._in_hand.add(batch)
            return batch

    def finish(self, batch: Batch, keep: bool = False) -> Batch | None:
        """Free the keys of what has been handled of ``batch``, and queue the rest of it again.

        Args:
            keep: the first event of the rest stays in the worker's hand, to be tried again.

        Returns:
            What stays in hand, None if nothing does.
        """
        with self._lock:
            self._in_hand.discard(batch)
            self._in_gap = False
            rest = batch.events[batch.handled :]
            kept = None
            if keep and rest:
                kept = Batch([rest.pop(0)], batch.share)
                self._in_hand.add(kept)
                self._in_gap = kept.events[0].action == "gap"
            if self.receiver.concurrency > 1:
                rest = self._free_keys(batch, rest, kept)
            if rest:
                self._queue_again(rest, batch.share)
            return kept

    def leave(self) -> None:
        """A hired worker goes without having been dismissed by :meth:`take`."""
        with self._lock:
            self._workers -= 1

    def clear(self) -> int:
        """Forget what waits, in hands too; returns how many events that were."""
        with self._lock:
            dropped, self._waiting, self._bytes = self.waiting, 0, 0
            self._queue.clear()
            self._parked.clear()
            for batch in self._in_hand:
                del batch.events[batch.handled + 1 :]
            return dropped

    @property
    def waiting(self) -> int:
        """Events that wait to be run."""
        in_hand = (len(batch.events) - batch.handled - 1 for batch in tuple(self._in_hand))
        return self._waiting + sum(max(0, count) for count in in_hand)

    @property
    def running(self) -> int:
        """Workers that have events in hand."""
        return len(self._in_hand)

    @property
    def idle(self) -> bool:
        with self._lock:
            return self._waiting == 0 and not self._in_hand and self._workers == 0

    def _next_is_gap(self) -> bool:
        return self._queue[0].events[0].action == "gap"

    def _held_up(self) -> bool:
        """Whether nothing may start: a gap runs, or is next and something before it still runs."""
        return self._in_gap or (self._next_is_gap() and bool(self._in_hand))

    def _fits(self) -> bool:
        return self._waiting <= self.max_waiting and self._bytes <= self.max_bytes

    def _forget(self, count: int, share: int) -> None:
        self._waiting -= count
        self._bytes -= share * count

    def _queue_again(self, events: list[Event], share: int) -> None:
        self._queue.appendleft(_Waiting(events, share))
        self._forget(-len(events), share)

    # -- keys, where several workers share the lane -------------------------------------------

    def _asleep(self) -> int:
        return sum(len(waiting.events) for parked in self._parked.values() for waiting in parked)

    def _take_free_keys(self, limit: int) -> tuple[list[Event], int]:
        """The first events whose key nobody has in hand; those before them with one are parked."""
        taken: list[Event] = []
        keys: set[str] = set()
        size = 0
        while self._queue and len(taken) < limit and not self._next_is_gap():
            first = self._queue[0]
            event = first.events.popleft()
            if not first.events:
                self._queue.popleft()
            if event.key is not None and event.key not in keys:
                if event.key in self._busy:
                    parked = self._parked.setdefault(event.key, deque())
                    parked.append(_Waiting([event], first.share))
                    continue
                keys.add(event.key)
            taken.append(event)
            size += first.share
        self._busy |= keys
        return taken, size

    def _free_keys(self, batch: Batch, rest: list[Event], kept: Batch | None) -> list[Event]:
        """Let others have the keys of ``batch``; returns what of ``rest`` may be queued again.

        What is parked under a key came after the rest, so it must stand behind it.
        """
        still = None if kept is None else kept.events[0].key
        for key in {event.key for event in batch.events} - {still, None}:
            self._busy.discard(key)
            self._queue.extendleft(reversed(self._parked.pop(key, ())))  # type: ignore[arg-type]
        if still is None:
            return rest
        behind = [event for event in rest if event.key == still]
        if behind:
            self._parked.setdefault(still, deque()).appendleft(_Waiting(behind, batch.share))
            self._forget(-len(behind), batch.share)
        return [event for event in rest if event.key != still]

    def _coalesce(self) -> None:
        """Drop updates that the same row's later update or deletion has made old news."""
        superseded: set[str] = set()
        for waiting in reversed(self._queue):
            kept: deque[Event] = deque()
            for event in reversed(waiting.events):
                if event.action == "gap":
                    superseded.clear()  # nothing may move across the marker
                if event.action == "updated" and event.key in superseded:
                    self._forget(1, waiting.share)
                    self.coalesced += 1
                    continue
                if event.action in ("updated", "deleted") and event.key is not None:
                    superseded.add(event.key)
                kept.appendleft(event)
            waiting.events = kept
        self._queue = deque(waiting for waiting in self._queue if waiting.events)
