"""Where a listener hands what it hears."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from .connection import Notification


class Sink(Protocol):
    """Called on the loop of the listener; must return at once."""

    def established(self, channels: frozenset[str]) -> None:
        """From here on every frame on ``channels`` arrives, or a gap says that it may not have."""

    def notified(self, notifications: Sequence[Notification]) -> None: ...

    def gap(
        self, since: datetime | None, until: datetime, cause: str, *, for_leader: bool
    ) -> None: ...

    def led(self, leader: bool) -> None: ...

    def lost(self, cause: str, retry_in: float) -> None: ...

    def status(self) -> dict[str, Any]:
        """How the listener is, as plain values, for the roll call."""
