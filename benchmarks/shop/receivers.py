"""The receivers of ``pglisten``: each records when it was called, and does nothing else.

``BENCHMARK_RECEIVER`` says of which kind they are, ``BENCHMARK_RECEIVERS`` how many of them there
are, and ``BENCHMARK_TOPICS`` how many topics they hear. With ``BENCHMARK_CACHES`` there are none of
them, and caches are told instead. The driver has none.
"""

from __future__ import annotations

import os

from benchmarks.caching import KEY
from benchmarks.recording import recorder
from django_pgnotify import Event, Topic, invalidates, receiver

from .models import AfterCommit, Atomic, Background, Durable, Load
from .naive import topics

CACHES = "BENCHMARK_CACHES" in os.environ
KIND = None if CACHES else os.environ.get("BENCHMARK_RECEIVER")
RECEIVERS = int(os.environ.get("BENCHMARK_RECEIVERS", "1"))
TOPICS = int(os.environ.get("BENCHMARK_TOPICS", "1"))
LOG = Topic("log", delivery="durable")
TAGGED, KEYED = "tagged", "keyed"
SOURCES = [AfterCommit, Atomic, Background, *topics(TOPICS)]

if KIND is not None:
    record = recorder()

    @receiver(Load)
    def ignore(event: Event) -> None:
        pass


for number in range(RECEIVERS):
    if KIND == "sync":

        @receiver(SOURCES, dispatch_uid=f"receive {number}")
        def receive(event: Event) -> None:
            record(event)

    elif KIND == "async":

        @receiver(SOURCES, dispatch_uid=f"receive {number}")
        async def areceive(event: Event) -> None:
            record(event)

    elif KIND in ("durable", "transactional"):

        @receiver(
            [Durable, LOG], dispatch_uid=f"read {number}", transactional=KIND == "transactional"
        )
        def read(event: Event) -> None:
            record(event)


if CACHES:
    invalidates(TAGGED, tags=["number:{data[number]}"])
    if "BENCHMARK_REDIS" in os.environ:
        invalidates(KEYED, keys=["number:{data[number]}"], cache="redis")
        invalidates(AfterCommit, keys=[KEY], cache="redis")
