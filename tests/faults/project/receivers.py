"""The receivers that the fault runs watch; autodiscovered like any app's."""

from __future__ import annotations

import os
import random
import threading
from datetime import datetime
from typing import Any

from django_pgnotify import Event, receiver
from django_pgnotify.signals import listener_established
from tests.faults.project.recording import PATH, record

TOPIC = "numbers"
PROGRESS = 1000
"""Events between two lines of progress, where a million of them are only counted."""


def record_event(name: str, event: Event) -> None:
    if event.action == "gap":
        since = event.data["since"]
        record(
            "gap",
            name,
            None if since is None else datetime.fromisoformat(since).timestamp(),
            datetime.fromisoformat(event.data["until"]).timestamp(),
            event.data["cause"],
        )
    else:
        record("event", name, event.data["n"], event.key, event.data["seq"])


def record_established(**kwargs: Any) -> None:
    record("established")


if PATH and os.environ.get("PGNOTIFY_FAULTS_MEMORY"):
    _counted = 0
    _lock = threading.Lock()

    @receiver(TOPIC, on_gap=True)
    def count(event: Event) -> None:
        global _counted
        with _lock:
            _counted += 1
            if event.action == "gap" or _counted % PROGRESS == 0:
                record_event("count", event)

elif PATH:

    @receiver(TOPIC, on_gap=True)
    def leader(event: Event) -> None:
        record_event("leader", event)

    @receiver(TOPIC, on_gap=True, every_node=True, concurrency=4)
    def node(event: Event) -> None:
        record_event("node", event)

    @receiver(TOPIC, on_gap=True)
    async def raising(event: Event) -> None:
        record_event("raising", event)
        if event.action == "gap" or event.data.get("raise") or random.random() < 0.03:
            raise RuntimeError("on purpose")


listener_established.connect(record_established)
