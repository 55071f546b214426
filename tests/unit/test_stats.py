"""Counters that any thread may raise."""

from __future__ import annotations

import os
import threading

from django_pgnotify.stats import Stats


def test_what_never_happened_counts_zero_and_stays_out_of_the_snapshot() -> None:
    stats = Stats()
    assert stats["broken"] == 0
    assert stats.snapshot() == {}


def test_counts_add_up() -> None:
    stats = Stats()
    stats.add("published")
    stats.add("published", 41)
    stats.add("frames", 2)
    assert stats["published"] == 42
    assert stats.snapshot() == {"published": 42, "frames": 2}


def test_a_snapshot_is_a_copy() -> None:
    stats = Stats()
    stats.add("frames")
    before = stats.snapshot()
    before["frames"] = 99
    stats.add("frames")
    assert stats["frames"] == 2


def test_no_count_is_lost_between_threads() -> None:
    stats = Stats()
    together = threading.Barrier(8)

    def count() -> None:
        together.wait()
        for _ in range(5000):
            stats.add("handled")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats["handled"] == 40_000


def test_a_lock_that_another_thread_held_at_a_fork_does_not_stop_the_child() -> None:
    stats = Stats()
    with stats._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if stats._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
