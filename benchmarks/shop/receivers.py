"""The receivers of ``pglisten``: each records when it was called, and does nothing else.

``BENCHMARK_RECEIVER`` says which there are; the driver has none.
"""

from __future__ import annotations

import os

from benchmarks.recording import recorder
from django_pgnotify import Event, receiver

from .models import AfterCommit, Atomic, Background, Load
from .naive import BURST

KIND = os.environ.get("BENCHMARK_RECEIVER")
SOURCES = [AfterCommit, Atomic, Background, BURST]

if KIND is not None:
    record = recorder()

    @receiver(Load)
    def ignore(event: Event) -> None:
        pass


if KIND == "sync":

    @receiver(SOURCES)
    def receive(event: Event) -> None:
        record(event)

elif KIND == "async":

    @receiver(SOURCES)
    async def areceive(event: Event) -> None:
        record(event)
