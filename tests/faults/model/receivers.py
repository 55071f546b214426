"""The consumers under check; autodiscovered like any app's.

What they were given is appended to a file of their process: ``at consumer key seq``, the time in
nanoseconds of the machine's monotonic clock. The transactional one writes to a table instead.
"""

from __future__ import annotations

import os
import random
import signal
import time

from django.db import connection

from django_pgnotify import Event, Topic, receiver

TOPIC = Topic("model", delivery="durable")
EXACT = "exact"
OTHERS = ("plain", "several", "flaky", "awaited")
FLAKY = 0.02

PATH = os.environ.get("PGNOTIFY_MODEL_RECORD")

if PATH:
    _file = os.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _random = random.Random(os.environ["PGNOTIFY_MODEL_SEED"])
    _crash_rate = float(os.environ["PGNOTIFY_MODEL_CRASH_RATE"])

    def record(name: str, event: Event) -> None:
        line = f"{time.monotonic_ns()} {name} {event.key} {event.data['seq']}\n"
        os.write(_file, line.encode())
        crash()

    def crash() -> None:
        """Now and then, between the work and the cursor, this process ends."""
        if _random.random() < _crash_rate:
            os.kill(os.getpid(), signal.SIGKILL)

    @receiver(TOPIC, dispatch_uid="exact", start="beginning", transactional=True)
    def exact(event: Event) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO exact (key, seq) VALUES (%s, %s)", (event.key, event.data["seq"])
            )
        crash()

    @receiver(TOPIC, dispatch_uid="plain", start="beginning")
    def plain(event: Event) -> None:
        record("plain", event)

    @receiver(TOPIC, dispatch_uid="several", start="beginning", concurrency=4)
    def several(event: Event) -> None:
        record("several", event)

    @receiver(TOPIC, dispatch_uid="flaky", start="beginning", retries=20)
    def flaky(event: Event) -> None:
        if _random.random() < FLAKY:
            raise RuntimeError("on purpose")
        record("flaky", event)

    @receiver(TOPIC, dispatch_uid="awaited", start="beginning")
    async def awaited(event: Event) -> None:
        record("awaited", event)
