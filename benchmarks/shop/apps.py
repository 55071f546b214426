from __future__ import annotations

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "benchmarks.shop"

    def ready(self) -> None:
        from . import naive  # noqa: F401 - connects its signal handlers
