"""A lane keeps order per key, its limits, and works from any thread."""

from __future__ import annotations

import threading
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from django_pgnotify import Event
from django_pgnotify.dispatching.lane import Batch, Lane
from django_pgnotify.registry import Receiver

NOW = datetime(2026, 1, 2, tzinfo=UTC)
PLENTY = 10**9


def event(number: int, key: str | None = None, action: str = "published") -> Event:
    return Event(str(number), "jobs", action, None, None, number, key, "a:1", NOW)  # type: ignore[arg-type]


def lane(concurrency: int = 1, max_waiting: int = PLENTY, max_bytes: int = PLENTY) -> Lane:
    receiver = Receiver("uid", print, ("jobs",), concurrency=concurrency)
    return Lane(receiver, max_waiting, max_bytes)


def number(batch: Batch | None) -> Any:
    """The number of the one event in hand."""
    if batch is None:
        return None
    [one] = batch.events
    return one.data


def numbers(batch: Batch | None) -> list[Any]:
    return [] if batch is None else [one.data for one in batch.events]


def numbers_of(events: list[Event]) -> list[Any]:
    return [one.data for one in events]


def done(one: Lane, batch: Batch) -> None:
    batch.handled = len(batch.events)
    assert one.finish(batch) is None


def drain(one: Lane) -> list[Any]:
    """Everything, by one worker at a time."""
    found = []
    for _ in range(one.hire() and 1):
        while (taken := one.take()) is not None:
            found += numbers(taken)
            done(one, taken)
    return found


# -- order -----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([None, "a", "b"]), max_size=30))
def test_one_worker_takes_events_in_the_order_they_came(keys: list[str | None]) -> None:
    one = lane()
    one.put([event(place, key) for place, key in enumerate(keys)])
    assert drain(one) == list(range(len(keys)))
    assert one.idle


def test_events_of_one_key_never_run_at_once() -> None:
    one = lane(concurrency=3)
    one.put([event(0, "a"), event(1, "a"), event(2, "b"), event(3)])
    assert one.hire() == 3
    first, second, third = one.take(), one.take(), one.take()
    assert [number(first), number(second), number(third)] == [0, 2, 3]
    assert one.waiting == 1
    assert first is not None
    done(one, first)
    assert number(one.take()) == 1


def test_what_was_parked_runs_before_what_came_later_of_the_same_key() -> None:
    one = lane(concurrency=2)
    one.put([event(place, "a") for place in range(3)])
    one.hire()
    first = one.take()
    assert one.take() is None  # parks 1 and 2, and dismisses the second worker
    one.put([event(3, "a")])
    assert first is not None
    done(one, first)
    found = []
    while (taken := one.take()) is not None:
        found += numbers(taken)
        done(one, taken)
    assert found == [1, 2, 3]


def test_a_busy_key_does_not_hold_up_the_others() -> None:
    one = lane(concurrency=2)
    one.put([event(0, "slow"), *[event(place, "slow") for place in range(1, 50)], event(50, "b")])
    one.hire()
    assert number(one.take()) == 0
    assert number(one.take()) == 50


def test_a_key_whose_receiver_failed_is_free_again() -> None:
    one = lane(concurrency=2)
    one.put([event(0, "a"), event(1, "a")])
    one.hire()
    first = one.take()
    assert first is not None
    done(one, first)  # however it ended
    assert number(one.take()) == 1


# -- batches ---------------------------------------------------------------------------------


def test_a_batch_is_what_came_together_up_to_the_limit() -> None:
    one = lane()
    one.put([event(place) for place in range(5)])
    one.hire()
    first = one.take(3)
    assert numbers(first) == [0, 1, 2]
    assert (one.waiting, one.running) == (4, 1)  # two in hand have not begun
    assert first is not None
    done(one, first)
    assert numbers(one.take(3)) == [3, 4]


def test_what_a_worker_did_not_come_to_is_first_in_the_queue_again() -> None:
    one = lane()
    one.put([event(place) for place in range(4)], size=400)
    one.hire()
    batch = one.take(3)
    assert batch is not None
    batch.handled = 1
    assert one.finish(batch) is None
    assert one.waiting == 3
    assert numbers(one.take(9)) == [1, 2]


def test_an_event_to_be_tried_again_stays_in_hand_and_the_others_can_go_on() -> None:
    one = lane(concurrency=2)
    one.put([event(0, "a"), event(1, "a"), event(2, "b")])
    one.hire()
    batch = one.take(3)
    assert batch is not None
    kept = one.finish(batch, keep=True)
    assert numbers(kept) == [0]
    assert numbers(one.take(3)) == [2]  # 1 has the key of the one in hand
    one.put([event(3, "a")])
    assert kept is not None
    done(one, kept)
    assert numbers(one.take(9)) == [1, 3]


def test_what_is_given_back_stands_before_what_was_parked_of_its_key() -> None:
    one = lane(concurrency=2)
    one.put([event(0, "a"), event(1, "a")])
    one.hire()
    batch = one.take(2)
    one.put([event(2, "a")])
    one.hire()
    assert one.take() is None  # parks 2
    assert batch is not None
    batch.handled = 1
    one.finish(batch)
    one.hire()
    assert numbers(one.take(9)) == [1, 2]


def test_a_cleared_lane_takes_what_has_not_begun_out_of_the_workers_hand() -> None:
    one = lane()
    one.put([event(place) for place in range(6)])
    one.hire()
    batch = one.take(4)
    assert batch is not None
    batch.handled = 1
    assert one.clear() == 4
    assert numbers(batch) == [0, 1]
    done(one, batch)
    assert one.take() is None
    assert one.idle


# -- workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 2, 5])
@pytest.mark.parametrize("events", [0, 1, 3, 100])
def test_no_more_workers_than_asked_for_and_no_more_than_there_is_work(
    concurrency: int, events: int
) -> None:
    one = lane(concurrency)
    one.put([event(place) for place in range(events)])
    assert one.hire() == min(concurrency, events)
    assert min(concurrency, events) + one.hire() <= concurrency


def test_a_dismissed_worker_can_be_replaced() -> None:
    one = lane()
    one.put([event(0)])
    assert one.hire() == 1
    first = one.take()
    assert first is not None
    done(one, first)
    assert one.take() is None
    one.put([event(1)])
    assert one.hire() == 1


def test_a_worker_that_left_can_be_replaced() -> None:
    one = lane()
    one.put([event(0)])
    assert one.hire() == 1
    one.leave()
    assert one.hire() == 1
    assert number(one.take()) == 0


def test_a_lane_is_idle_only_when_nobody_waits_runs_or_works() -> None:
    one = lane()
    assert one.idle
    one.put([event(0)])
    assert not one.idle
    one.hire()
    first = one.take()
    assert (one.waiting, one.running) == (0, 1)
    assert not one.idle
    assert first is not None
    done(one, first)
    assert not one.idle
    assert one.take() is None
    assert one.idle


# -- limits ----------------------------------------------------------------------------------


def test_what_there_is_no_room_for_is_refused_from_the_end() -> None:
    one = lane(max_waiting=3)
    assert len(one.put([event(0), event(1)])) == 0
    assert len(one.put([event(2), event(3), event(4)])) == 2
    assert drain(one) == [0, 1, 2]


def test_bytes_are_a_limit_of_their_own() -> None:
    one = lane(max_bytes=1000)
    assert len(one.put([event(0), event(1)], size=800)) == 0
    assert len(one.put([event(2), event(3)], size=400)) == 1
    assert drain(one) == [0, 1, 2]
    assert len(one.put([event(4)], size=1000)) == 0


def test_room_comes_back_with_each_event_that_is_taken() -> None:
    one = lane(max_waiting=2)
    one.put([event(0), event(1)])
    one.hire()
    assert number(one.take()) == 0
    assert len(one.put([event(2), event(3)])) == 1


def test_parked_events_count_as_waiting() -> None:
    one = lane(concurrency=2, max_waiting=3)
    one.put([event(place, "a") for place in range(3)])
    one.hire()
    one.take()
    assert one.take() is None
    assert one.waiting == 2
    assert len(one.put([event(3), event(4)])) == 1


def test_updates_that_a_later_one_made_old_news_give_way_first() -> None:
    one = lane(max_waiting=4)
    one.put([event(place, "row", "updated") for place in range(4)])
    assert len(one.put([event(4, "row", "updated"), event(5, "other", "updated")])) == 0
    assert drain(one) == [4, 5]
    assert one.coalesced == 4


def test_what_is_no_update_never_gives_way_to_a_later_event() -> None:
    one = lane(max_waiting=3)
    kept = [event(0, "row", "created"), event(1, "row", "m2m_changed"), event(2, "row")]
    one.put(kept)
    assert len(one.put([event(3, "row", "updated")])) == 1
    assert drain(one) == [0, 1, 2]


def test_a_deletion_makes_updates_before_it_old_news_and_not_those_behind_it() -> None:
    one = lane(max_waiting=2)
    assert len(one.put([event(0, "row", "updated"), event(1, "row", "deleted")])) == 0
    assert len(one.put([event(2, "row", "updated")])) == 0
    assert drain(one) == [1, 2]


def test_what_is_dropped_is_told_though_it_came_before_updates_that_gave_way() -> None:
    """A gap has to begin with the first of them."""
    one = lane(max_waiting=4)
    one.put([event(place) for place in range(4)])
    late = [event(4), *(event(place, "row", "updated") for place in (5, 6, 7))]
    assert numbers_of(one.put(late)) == [7, 4]
    assert drain(one) == [0, 1, 2, 3]


def test_updates_without_a_key_are_not_taken_for_the_same_row() -> None:
    one = lane(max_waiting=2)
    assert len(one.put([event(place, None, "updated") for place in range(3)])) == 1
    assert drain(one) == [0, 1]


def test_nothing_gives_way_while_there_is_room() -> None:
    one = lane(max_waiting=4)
    one.put([event(place, "row", "updated") for place in range(4)])
    assert drain(one) == [0, 1, 2, 3]
    assert one.coalesced == 0


# -- gaps ------------------------------------------------------------------------------------


def test_there_is_always_room_for_a_gap() -> None:
    one = lane(max_waiting=1)
    one.put([event(0)])
    one.put_gap(event(1, action="gap"))
    assert drain(one) == [0, 1]


def test_a_gap_runs_alone_after_what_came_before_and_before_what_comes_behind() -> None:
    one = lane(concurrency=3)
    one.put([event(0, "a"), event(1, "b")])
    one.put_gap(event(2, action="gap"))
    one.put([event(3, "c")])
    assert one.hire() == 3
    first, second = one.take(), one.take()
    assert [number(first), number(second)] == [0, 1]
    assert one.take() is None
    assert first is not None
    assert second is not None
    done(one, first)
    assert one.take() is None
    done(one, second)
    assert one.hire() == 1
    gap = one.take()
    assert number(gap) == 2
    assert one.hire() == 0
    assert gap is not None
    done(one, gap)
    assert one.hire() + 1 >= 1
    assert number(one.take()) == 3


def test_a_gap_that_waits_is_not_dropped_for_want_of_room() -> None:
    """It would be the silence that it is there to prevent."""
    one = lane(max_waiting=2)
    one.put([event(0), event(1)])
    one.put_gap(event(2, action="gap"))
    assert len(one.put([event(3), event(4)])) == 2
    assert drain(one) == [0, 1, 2]


def test_no_update_gives_way_across_a_gap() -> None:
    one = lane(max_waiting=1)
    one.put([event(0, "row", "updated")])
    one.put_gap(event(1, action="gap"))
    one.put([event(2, "row", "updated")])
    assert drain(one)[:2] == [0, 1]


def test_a_cleared_lane_says_how_many_it_forgot() -> None:
    one = lane(concurrency=2)
    one.put([event(place, "a") for place in range(4)], size=400)
    one.hire()
    first = one.take()
    assert one.take() is None
    assert one.clear() == 3
    assert one.waiting == 0
    assert len(one.put([event(place) for place in range(4)])) == 0
    assert one.clear() == 4
    assert first is not None
    done(one, first)
    assert one.take() is None
    assert one.idle


# -- by rules --------------------------------------------------------------------------------


class LaneMachine(RuleBasedStateMachine):
    @initialize(concurrency=st.integers(1, 4))
    def begin(self, concurrency: int) -> None:
        self.lane = lane(concurrency)
        self.concurrency = concurrency
        self.count = 0
        self.workers = 0
        self.running: list[Batch] = []
        self.queued: list[Event] = []

    @rule(keys=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=4))
    def put(self, keys: list[str | None]) -> None:
        events = []
        for key in keys:
            events.append(event(self.count, key))
            self.count += 1
        assert self.lane.put(events, size=10 * len(events)) == []
        self.queued += events

    @rule()
    def put_gap(self) -> None:
        gap = event(self.count, action="gap")
        self.count += 1
        self.lane.put_gap(gap)
        self.queued.append(gap)

    @rule()
    def hire(self) -> None:
        hired = self.lane.hire()
        assert hired >= 0
        self.workers += hired
        assert self.workers <= self.concurrency

    @precondition(lambda self: self.workers > len(self.running))
    @rule(limit=st.integers(1, 5))
    def take(self, limit: int) -> None:
        taken = self.lane.take(limit)
        if taken is None:
            self.workers -= 1
            return
        assert 1 <= len(taken.events) <= limit
        in_hand = self.in_hand()
        for one in taken.events:
            before = self.queued[: self.queued.index(one)]
            if one.action == "gap":
                assert not before
                assert not in_hand
                assert len(taken.events) == 1
            else:
                assert all(other.action != "gap" for other in (*before, *in_hand))
                if one.key is not None:
                    assert all(other.key != one.key for other in (*before, *in_hand))
            self.queued.remove(one)
        self.running.append(taken)

    def in_hand(self) -> list[Event]:
        return [one for batch in self.running for one in batch.events]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data: st.DataObject, keep: bool) -> None:
        batch = data.draw(st.sampled_from(self.running))
        batch.handled = data.draw(st.integers(0, len(batch.events)))
        rest = batch.events[batch.handled :]
        kept = self.lane.finish(batch, keep=keep)
        self.running.remove(batch)
        if kept is not None:
            assert kept.events == rest[:1]
            self.running.append(kept)
            del rest[:1]
        else:
            assert not (keep and rest)
        # Where they came from: in front of everything of their keys that waits.
        self.queued = sorted(self.queued + rest, key=lambda one: int(one.id))

    @precondition(lambda self: self.workers > len(self.running))
    @rule()
    def leave(self) -> None:
        self.lane.leave()
        self.workers -= 1

    @invariant()
    def nothing_is_lost_or_stuck(self) -> None:
        beginning = sum(len(batch.events) - 1 for batch in self.running)
        assert self.lane.waiting == len(self.queued) + beginning
        assert self.lane.running == len(self.running)
        if self.queued and not self.workers:
            hired = self.lane.hire()
            assert hired, "events wait, nobody works, and nobody is hired"
            self.workers += hired
        assert self.lane.idle is not bool(self.queued or self.running or self.workers)

    def teardown(self) -> None:
        while self.queued or self.running:
            while self.running:
                done(self.lane, self.running.pop())
            self.workers += self.lane.hire()
            while self.workers and (taken := self.lane.take()) is not None:
                for one in taken.events:
                    self.queued.remove(one)
                self.running.append(taken)
            self.workers = max(0, self.workers - 1)


TestRules = LaneMachine.TestCase
TestRules.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


# -- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_threads_handle_every_event_once_in_order_per_key_and_one_at_a_time(
    concurrency: int,
) -> None:
    events, keys = 4000, 7
    one = lane(concurrency)
    guard = threading.Lock()
    handled: dict[str, list[int]] = defaultdict(list)
    active: dict[str, int] = defaultdict(int)
    wrong: list[str] = []
    finished = threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        limit = 1
        while (batch := one.take(limit)) is not None:
            for taken in batch.events[: 1 + limit // 2]:  # the rest is given back
                key = taken.key or ""
                with guard:
                    active[key] += 1
                    if active[key] > 1:
                        wrong.append(f"{key} twice at once")
                    handled[key].append(taken.data)
                with guard:
                    active[key] -= 1
                batch.handled += 1
            one.finish(batch)
            limit = limit % 9 + 1
        staff()
        if one.idle:
            finished.set()

    def staff() -> None:
        for _ in range(one.hire()):
            thread = threading.Thread(target=work)
            with guard:
                threads.append(thread)
            thread.start()

    for start in range(0, events, 50):
        one.put([event(place, f"key-{place % keys}") for place in range(start, start + 50)])
        staff()
    while not one.idle:
        assert finished.wait(30)
        finished.clear()
        staff()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert sorted(data for some in handled.values() for data in some) == list(range(events))
    for some in handled.values():
        assert some == sorted(some)
