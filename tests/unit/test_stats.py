"""Counters that any thread may raise."""

from __future__ import annotations

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
