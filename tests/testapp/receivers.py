"""Receivers of the tests' own listener processes; autodiscovered like any app's.

A process test starts ``manage.py pglisten`` and reads from its stdout what was
received: one line ``received NAME {json}`` per call. In the test process itself
these stay quiet unless :data:`ENABLED`, so that they do not add to what a test
counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import Any

from django_pgnotify import Event, Topic, receiver
from tests.testapp.models import Order

#: Set in the environment of a listener process by ``tests.processes.manage``.
ENABLED = bool(os.environ.get("PGNOTIFY_TEST_RECEIVERS"))

_write = threading.Lock()


def say(name: str, event: Event, **more: Any) -> None:
    """One line on stdout, whole whatever the thread."""
    fact = {
        "topic": event.topic,
        "action": event.action,
        "model": event.model,
        "pk": event.pk,
        "data": event.data,
        "key": event.key,
        **more,
    }
    line = f"received {name} {json.dumps(fact, default=str)}\n"
    with _write:
        sys.stdout.write(line)
        sys.stdout.flush()


if ENABLED:

    @receiver(Order, on_gap=True)
    def order_changed(event: Event) -> None:
        say("order", event)

    @receiver(Order, every_node=True)
    async def order_changed_async(event: Event) -> None:
        order = await event.ainstance() if event.action != "deleted" else None
        say("order-async", event, status=order.status if order else None)

    @receiver("jobs")
    def job(event: Event) -> None:
        say("job", event, pid=os.getpid())

    @receiver("jobs")
    def broken(event: Event) -> None:
        if isinstance(event.data, dict) and event.data.get("break"):
            raise RuntimeError("as asked")

    @receiver("slow")
    def slow(event: Event) -> None:
        """Says that it started, then waits for a file: the test decides when it ends."""
        say("slow-started", event)
        gate = event.data["gate"]
        # The test creates a FIFO; opening it blocks until the test opens it too.
        with open(gate) as fifo:
            fifo.read()
        say("slow-done", event)

    @receiver("slow-async")
    async def slow_async(event: Event) -> None:
        say("slow-async-started", event)
        await asyncio.to_thread(_drain, event.data["gate"])
        say("slow-async-done", event)


if os.environ.get("PGNOTIFY_TEST_DURABLE"):

    @receiver(Topic("ledger", "durable"), dispatch_uid="ledger", start="beginning")
    def ledger(event: Event) -> None:
        say("ledger", event, pid=os.getpid())
        if isinstance(event.data, dict) and "gate" in event.data:
            _drain(event.data["gate"])


def _drain(gate: str) -> None:
    with open(gate) as fifo:
        fifo.read()
