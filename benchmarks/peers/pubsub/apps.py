from __future__ import annotations

from django.apps import AppConfig


class PubsubConfig(AppConfig):
    name = "benchmarks.peers.pubsub"

    def ready(self) -> None:
        from . import listeners  # noqa: F401 - registers its triggers and callbacks
