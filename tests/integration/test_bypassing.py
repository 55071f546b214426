"""That caches are bypassed is said when it begins and when it ends, and not at each look-up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches

from django_pgnotify.caching import bypassing
from django_pgnotify.caching.bypassing import is_bypassed
from django_pgnotify.caching.cached import get_or_set
from django_pgnotify.epochs.clock import NANOSECONDS, node_clock
from django_pgnotify.epochs.mapped import HEARTBEAT
from django_pgnotify.epochs.node import node_table
from django_pgnotify.epochs.table import EpochTable
from tests.integration.caching import near_caches

LIMIT = 30 * NANOSECONDS


@pytest.fixture(autouse=True)
def _caches(settings: Any, tmp_path: Path) -> Iterator[None]:
    settings.PGNOTIFY_MAX_STALENESS = 30
    bypassing._forked()  # nothing of other tests is known
    with near_caches(settings, tmp_path):
        yield


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    logger, handler = logging.getLogger("django_pgnotify.caching"), Handler()
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield handler.records
    logger.removeHandler(handler)


def levels(records: list[logging.LogRecord]) -> list[str]:
    return [record.levelname for record in records]


def beat(age: float = 0) -> None:
    node_table().words[HEARTBEAT] = node_clock() - int(age * NANOSECONDS)


@pytest.mark.parametrize("alias", ["near", "files"])
def test_a_bypass_is_said_once_when_it_begins_and_once_when_it_ends(
    alias: str, said: list[logging.LogRecord]
) -> None:
    def ask() -> None:
        assert get_or_set("a", lambda: 1, cache=alias) == 1

    beat()
    ask()
    assert said == []
    beat(age=41)
    for _ in range(3):
        ask()
    [begin] = said
    assert begin.levelname == "WARNING"
    message = begin.getMessage()
    assert "heartbeat 41." in message
    assert "MAX_STALENESS is 30 s" in message
    assert "is pglisten running" in message
    assert repr(node_table().path) in message
    beat()
    node_table().bump_all()  # as whoever begins to listen does
    for _ in range(3):
        ask()
    assert levels(said) == ["WARNING", "INFO"]
    beat(age=50)
    ask()
    assert levels(said) == ["WARNING", "INFO", "WARNING"]


def look_at_all() -> None:
    for alias in ("near", "layered", "files"):
        get_or_set("a", lambda: 1, cache=alias)


def test_a_process_that_nobody_has_listened_for_yet_says_one_line(
    said: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_all()
    assert said == [], "a pglisten needs a moment to see the table"
    later(monkeypatch, 6)
    look_at_all()
    look_at_all()
    [begin] = said
    assert "no heartbeat yet" in begin.getMessage()


def test_a_table_in_a_file_has_a_moment_for_its_first_heartbeat(
    said: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_all()
    beat()
    look_at_all()
    later(monkeypatch, 6)
    look_at_all()
    assert said == []


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have that much time pass for what judges heartbeats."""
    now = node_clock() + int(seconds * NANOSECONDS)
    monkeypatch.setattr(bypassing, "node_clock", lambda: now)


def test_of_many_threads_one_says_it(said: list[logging.LogRecord]) -> None:
    beat(age=60)
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait()
        for _ in range(50):
            caches["near"].get("a")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert levels(said) == ["WARNING"]


def test_a_table_that_cannot_be_used_is_one_error_and_its_end_is_said(
    settings: Any,
    tmp_path: Path,
    said: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"no table")
    settings.PGNOTIFY_EPOCH_TABLE = str(path)
    for _ in range(2):
        get_or_set("a", lambda: 1, cache="files")
    assert levels(said) == ["ERROR"]
    path.unlink()
    node_table()._retry_at = 0
    later(monkeypatch, 6)
    for _ in range(2):
        get_or_set("a", lambda: 1, cache="files")
    assert levels(said) == ["ERROR", "WARNING"], "there is nobody who listens, either"
    beat()
    get_or_set("a", lambda: 1, cache="files")
    assert levels(said) == ["ERROR", "WARNING", "INFO"]


def test_a_table_in_memory_has_time_for_its_first_heartbeat(
    said: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = EpochTable.in_process(64)
    assert is_bypassed(table, LIMIT)
    table.beat(node_clock())
    assert not is_bypassed(table, LIMIT)
    assert said == []
    late = EpochTable.in_process(64)
    assert is_bypassed(late, LIMIT)
    later(monkeypatch, 31)
    assert is_bypassed(late, LIMIT)
    [begin] = said
    assert "does its listener reach the database" in begin.getMessage()


def test_whoever_handles_the_record_may_ask_a_cache() -> None:
    asked: list[Any] = []

    class Asking(Handler):
        def emit(self, record: logging.LogRecord) -> None:
            asked.append(caches["near"].get("b", "nothing"))

    beat(age=60)
    logger, handler = logging.getLogger("django_pgnotify.caching"), Asking()
    logger.addHandler(handler)
    try:
        caches["near"].get("a")
    finally:
        logger.removeHandler(handler)
    assert asked == ["nothing"]
