"""What a process counts is written down soon, though it is idle from then on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.core.signals import request_finished
from django.db import close_old_connections

from django_pgnotify.caching import reporting
from django_pgnotify.epochs.clock import node_clock
from django_pgnotify.epochs.counts import node_counts
from tests.integration.caching import near_caches


@pytest.fixture
def path(settings: Any, tmp_path: Path) -> Iterator[str]:
    settings.PGNOTIFY_MAX_STALENESS = None
    with near_caches(settings, tmp_path):
        reporting._due = reporting._rests_until = 0
        yield settings.PGNOTIFY_EPOCH_TABLE


def use(times: int) -> None:
    caches["near"].set("a", 1)
    for _ in range(times):
        assert caches["near"].get("a") == 1


def hits(path: str) -> int:
    return int(node_counts(path).get("near", {}).get("hits", 0))


def end_request() -> None:
    # As Django's test client does: nothing here is about connections that other tests have left.
    request_finished.disconnect(close_old_connections)
    try:
        request_finished.send(sender=None)
    finally:
        request_finished.connect(close_old_connections)


def test_a_burst_is_written_down_when_its_request_ends(path: str) -> None:
    use(10)
    assert hits(path) == 0, "not at each use"
    end_request()
    assert hits(path) == 10


def test_many_requests_do_not_write_more_than_a_fraction_of_the_time(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = node_clock()
    moments = iter([started, started + 10, started + 2009, started + 2010, started + 2020])
    use(1)
    monkeypatch.setattr(reporting, "node_clock", lambda: next(moments))
    end_request()
    use(1)
    end_request()
    assert hits(path) == 1, "200 times the 10 ns of the first are not over"
    end_request()
    assert hits(path) == 2


def test_what_was_taken_away_is_not_made_anew_by_a_process_that_is_idle(path: str) -> None:
    end_request()
    use(1)
    shutil.rmtree(f"{path}.counts")
    end_request()
    reporting._at_exit()
    assert not Path(f"{path}.counts").exists()
