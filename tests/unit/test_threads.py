"""The threads of sync receivers: never too many, used again, and ended as they should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from django_pgnotify.dispatching.threads import Threads

DEADLINE = 45.0


class Works:
    """Works that tell when they begin, and wait until the test lets them go."""

    def __init__(self) -> None:
        self._begun: SimpleQueue[threading.Thread] = SimpleQueue()
        self._release = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.running = 0
        self.most = 0

    def __call__(self) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self._begun.put(threading.current_thread())
        self._release.acquire(timeout=DEADLINE)
        with self._lock:
            self.running -= 1

    def begun(self) -> threading.Thread:
        """The thread of the next work that has begun."""
        return self._begun.get(timeout=DEADLINE)

    @property
    def none_begun(self) -> bool:
        return self._begun.empty()

    def let_go(self, count: int = 1) -> None:
        self._release.release(count)


class Ended:
    """An ``at_end`` that notes which threads called it."""

    def __init__(self) -> None:
        self.by: list[threading.Thread] = []
        self._called: SimpleQueue[threading.Thread] = SimpleQueue()

    def __call__(self) -> None:
        self.by.append(threading.current_thread())
        self._called.put(threading.current_thread())

    def next(self) -> threading.Thread:
        return self._called.get(timeout=DEADLINE)


@pytest.fixture
def works() -> Iterator[Works]:
    one = Works()
    yield one
    one.let_go(1000)  # nobody is left waiting by a test that failed


def nothing() -> None:
    pass


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def in_time(work: Callable[[], None]) -> None:
    """Call ``work``; fail, rather than hang, if it does not return."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), f"{work} did not return"


def idle(threads: Threads) -> int:
    with threads._lock:
        return threads._idle


def wait_until_idle(threads: Threads, count: int) -> None:
    """A thread is idle a moment after its work has ended, which no work can tell."""
    deadline = time.monotonic() + DEADLINE
    while idle(threads) != count:
        assert time.monotonic() < deadline, f"{idle(threads)} threads are idle, not {count}"


def test_no_thread_is_started_before_there_is_work(works: Works) -> None:
    before = threading.active_count()
    threads = Threads(4, "lane", nothing)
    assert threading.active_count() == before
    threads.run(works)
    works.begun()
    assert threading.active_count() == before + 1
    works.let_go()
    in_time(lambda: threads.close(wait=True))


def test_works_run_at_once_in_threads_of_their_own_up_to_the_most(works: Works) -> None:
    threads = Threads(3, "lane", nothing)
    for _ in range(7):
        threads.run(works)
    at_work = {works.begun() for _ in range(3)}
    assert len(at_work) == 3
    assert works.none_begun  # the other four wait, however long the three take
    works.let_go(7)
    for _ in range(4):
        assert works.begun() in at_work
    in_time(lambda: threads.close(wait=True))
    assert works.most == 3


def test_what_waits_for_a_thread_is_run_in_the_order_it_came(works: Works) -> None:
    threads, ran = Threads(1, "lane", nothing), list[int]()
    threads.run(works)
    works.begun()
    for number in range(50):
        threads.run(lambda number=number: ran.append(number))  # type: ignore[misc]
    assert ran == []
    works.let_go()
    in_time(lambda: threads.close(wait=True))
    assert ran == list(range(50))


def test_an_idle_thread_is_used_again_before_another_is_started(works: Works) -> None:
    threads = Threads(8, "lane", nothing)
    used = set()
    for _ in range(30):
        threads.run(works)
        used.add(works.begun())
        works.let_go()
        wait_until_idle(threads, 1)
    assert len(used) == 1
    in_time(lambda: threads.close(wait=True))


def test_a_busy_thread_is_not_waited_for_while_another_may_be_started(works: Works) -> None:
    threads = Threads(2, "lane", nothing)
    threads.run(works)
    first = works.begun()
    threads.run(works)
    assert works.begun() is not first
    works.let_go(2)
    in_time(lambda: threads.close(wait=True))


def test_after_a_crowd_idle_threads_still_take_one_work_each(works: Works) -> None:
    """However many works waited, the count of who is idle must not promise a thread too many."""
    threads, crowd = Threads(3, "lane", nothing), Works()
    for _ in range(20):
        threads.run(crowd)
    crowd.let_go(20)
    for _ in range(20):
        crowd.begun()
    for _ in range(3):
        threads.run(works)
    assert len({works.begun() for _ in range(3)}) == 3
    works.let_go(3)
    in_time(lambda: threads.close(wait=True))
    assert crowd.most <= 3
    assert works.most == 3


def test_from_many_threads_at_once_everything_runs_and_never_too_many() -> None:
    threads = Threads(4, "lane", nothing)
    lock = threading.Lock()
    running = most = 0
    by: set[threading.Thread] = set()
    ran = threading.Semaphore(0)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            by.add(threading.current_thread())
        with lock:
            running -= 1
        ran.release()

    together = threading.Barrier(8)

    def crowd() -> None:
        together.wait(DEADLINE)
        for _ in range(300):
            threads.run(work)

    callers = [threading.Thread(target=crowd, daemon=True) for _ in range(8)]
    for caller in callers:
        caller.start()
    for _ in range(8 * 300):
        assert ran.acquire(timeout=DEADLINE)
    join(callers)
    in_time(lambda: threads.close(wait=True))
    assert most <= 4
    assert len(by) <= 4
    assert not ran.acquire(blocking=False)


def test_they_are_daemons_with_a_name_so_that_a_hanging_receiver_is_found(works: Works) -> None:
    threads = Threads(2, "lane", nothing)
    threads.run(works)
    threads.run(works)
    both = [works.begun(), works.begun()]
    assert sorted(thread.name for thread in both) == ["lane-1", "lane-2"]
    assert all(thread.daemon for thread in both)
    works.let_go(2)
    in_time(lambda: threads.close(wait=True))


def test_each_thread_calls_at_end_itself_once_it_has_nothing_to_do(works: Works) -> None:
    ended = Ended()
    threads = Threads(3, "lane", ended)
    for _ in range(3):
        threads.run(works)
    all_three = {works.begun() for _ in range(3)}
    assert ended.by == []
    works.let_go(3)
    in_time(lambda: threads.close(wait=True))
    assert set(ended.by) == all_three
    assert len(ended.by) == 3


def test_close_lets_what_waits_run_first_and_joins(works: Works) -> None:
    ran: list[int] = []
    threads = Threads(1, "lane", nothing)
    threads.run(works)
    thread = works.begun()
    for number in range(5):
        threads.run(lambda number=number: ran.append(number))  # type: ignore[misc]
    closing = threading.Thread(target=lambda: threads.close(wait=True), daemon=True)
    closing.start()
    assert closing.is_alive()
    works.let_go()
    join([closing])
    assert ran == [0, 1, 2, 3, 4]
    assert not thread.is_alive()


def test_close_without_waiting_returns_while_a_work_hangs_and_the_idle_ones_end(
    works: Works,
) -> None:
    ended = Ended()
    threads = Threads(2, "lane", ended)
    threads.run(works)
    threads.run(works)
    both = {works.begun(), works.begun()}
    works.let_go()
    in_time(lambda: threads.close(wait=False))
    gone = ended.next()
    join([gone])
    [hanging] = both - {gone}
    assert hanging.is_alive()
    assert ended.by == [gone]
    works.let_go()
    assert ended.next() is hanging


def test_close_of_threads_that_never_had_work_is_nothing() -> None:
    ended = Ended()
    threads = Threads(2, "lane", ended)
    in_time(lambda: threads.close(wait=True))
    assert ended.by == []


def test_closing_twice_is_harmless(works: Works) -> None:
    ended = Ended()
    threads = Threads(2, "lane", ended)
    threads.run(works)
    works.begun()
    works.let_go()
    in_time(lambda: threads.close(wait=False))
    in_time(lambda: threads.close(wait=True))
    assert len(ended.by) == 1


def refuse_to_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_be_started_does_not_count_as_one(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(1, "lane", nothing)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_to_start)
        with pytest.raises(RuntimeError, match="start new thread"):
            threads.run(works)
    ran: list[int] = []
    threads.run(lambda: ran.append(1))
    threads.close(wait=True)
    assert ran == [1]


def test_where_no_further_thread_can_be_started_work_waits_for_those_that_there_are(
    works: Works, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And once one can be, no work waits behind a busy thread."""
    threads = Threads(2, "lane", nothing)
    threads.run(works)
    first = works.begun()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_to_start)
        threads.run(works)
    assert works.none_begun
    assert "1 thread(s) have to do" in caplog.text
    works.let_go(2)
    assert works.begun() is first
    wait_until_idle(threads, 1)
    threads.run(works)
    threads.run(works)
    assert works.begun() is not works.begun()
    works.let_go(2)
    in_time(lambda: threads.close(wait=True))
