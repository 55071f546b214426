"""A million events through one listener: its memory after ten thousand and at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from example_project.embedded import EmbeddedPostgres
from tests.faults.cluster import DATABASE, SETTINGS
from tests.faults.publisher import KEYS, until
from tests.processes import Process

EVENTS = 1_000_000
EARLY = 10_000
BATCH = 1_000
AHEAD = 20_000
"""Events that the publisher may be ahead by: the listener is to keep up, not to drop."""
LIMIT = 10 * 1000 * 1000


def run_memory(folder: Path, version: int, events: int = EVENTS) -> int:
    record = folder / "count.jsonl"
    with EmbeddedPostgres(version=version) as server:
        url = server.create_database(DATABASE)
        os.environ.update(
            DATABASE_URL=url, DJANGO_SETTINGS_MODULE=SETTINGS, PGNOTIFY_FAULTS_MEMORY="1"
        )
        import django
        from django.core.management import call_command
        from django.db import connection, transaction

        django.setup()
        from django_pgnotify import publish
        from tests.faults.project.receivers import PROGRESS, TOPIC

        call_command("migrate", verbosity=0)
        environ = {"PGNOTIFY_FAULTS_RECORD": str(record)}
        with Process([sys.executable, "-m", "django", "pglisten"], env=environ) as process:
            process.wait_for_line("^pglisten: ready")

            def handled() -> int:
                text = record.read_text() if record.exists() else ""
                return text.count('"event"') * PROGRESS

            begun, early = time.monotonic(), 0
            for start in range(0, events, BATCH):
                with transaction.atomic():
                    for n in range(start, start + BATCH):
                        publish(TOPIC, {"n": n, "seq": n}, key=KEYS[n % len(KEYS)])
                sent = start + BATCH
                if sent == EARLY:
                    _wait_for(handled, EARLY)
                    early = psutil.Process(process.pid).memory_info().rss
                elif sent % AHEAD == 0:
                    _wait_for(handled, sent - AHEAD // 2)
            _wait_for(handled, events)
            late = psutil.Process(process.pid).memory_info().rss
            took = time.monotonic() - begun
        connection.close()
    gaps = sum('"gap"' in line for line in record.read_text().splitlines())
    print(
        f"{events:,} events in {took:.0f} s, {gaps} gaps; RSS after {EARLY:,}: "
        f"{early / 1e6:.1f} MB, at the end: {late / 1e6:.1f} MB, {(late - early) / 1e6:+.1f} MB"
    )
    return int(gaps > 0 or late - early > LIMIT)


def _wait_for(handled: Callable[[], int], count: int) -> None:
    if not until(lambda: handled() >= count, 120.0, 0.05):
        raise TimeoutError(f"{handled()} events of {count} handled")
