"""The ways of publishing a change of a row, and of hearing of it, that scenarios compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.apps import apps
from django.test import override_settings

from django_pgnotify.conf import SETTINGS

from . import listeners
from .frame import CannotRun


@dataclass(frozen=True, slots=True)
class Way:
    """Args:
    listen: starts who hears of it; None where nobody does.
    label: the model whose rows are saved.
    load: the model for what only keeps the listener busy.
    settings: switched on in the process that saves; :meth:`check` that there are such.
    """

    listen: listeners.Listen | None
    label: str
    load: str = ""
    settings: tuple[str, ...] = ()

    @property
    def environ(self) -> dict[str, str]:
        """What another process needs, beside the database, to save its rows."""
        peer = {"BENCHMARK_PEER": "pubsub"} if self.label.startswith("pubsub.") else {}
        return {**peer, "BENCHMARK_SETTINGS": " ".join(self.settings)}

    def model(self) -> Any:
        try:
            return apps.get_model(self.label)
        except LookupError:
            raise CannotRun(f"its app {self.label.partition('.')[0]!r} is not installed") from None

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Its settings, in this process."""
        if not self.settings:  # settings that are overridden take longer to read
            yield
            return
        with override_settings(**dict.fromkeys(self.settings, True)):
            yield

    def check(self) -> None:
        if not set(self.settings) <= set(SETTINGS):
            raise CannotRun("not in this version")


SILENT = Way(None, "shop.Silent")
SILENT_TOO = Way(None, "shop.SilentToo")
OURS = Way(listeners.pglisten, "shop.AfterCommit", "shop.Load")
OURS_UNHEARD = Way(None, "shop.AfterCommit")
OURS_ASYNC = Way(partial(listeners.pglisten, receiver="async"), "shop.AfterCommit", "shop.Load")
OURS_ATOMIC = Way(listeners.pglisten, "shop.Atomic", "shop.Load")
OURS_BACKGROUND = Way(
    listeners.pglisten, "shop.Background", "shop.Load", ("PGNOTIFY_BACKGROUND_SENDER",)
)
OURS_DURABLE = Way(partial(listeners.pglisten, receiver="durable"), "shop.Durable")
NAIVE = Way(listeners.naive, "shop.Naive", "shop.NaiveLoad")
NAIVE_INSIDE = Way(listeners.naive, "shop.NaiveInside", "shop.NaiveLoad")
PUBSUB = Way(listeners.pgpubsub, "pubsub.Plain", "pubsub.PlainLoad")
PUBSUB_STORED = Way(listeners.pgpubsub, "pubsub.Stored", "pubsub.StoredLoad")
