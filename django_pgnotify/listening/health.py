"""What a listener tells of itself: since when it hears, and what it may have missed."""

from __future__ import annotations

from datetime import datetime
from typing import Any


class Health:
    """The state of one listener, as its status shows it.

    Attributes:
        established_since: None while it is not.
        last_error: what its last attempt failed for; None once it is established.
        round_trip: seconds the last echo took.
        last_gap: since, until and cause as text.
    """

    def __init__(self) -> None:
        self.established_since: datetime | None = None
        self.last_error: Exception | None = None
        self.round_trip: float | None = None
        self.last_gap: dict[str, str | None] | None = None

    def note_gap(self, since: datetime | None, until: datetime, cause: str) -> None:
        """Remember the latest gap."""
        self.last_gap = {"since": _text(since), "until": _text(until), "cause": cause}

    def as_dict(self, last_echo: datetime | None) -> dict[str, Any]:
        """As plain values."""
        return {
            "established": self.established_since is not None,
            "established_since": _text(self.established_since),
            "last_echo": _text(last_echo),
            "round_trip": self.round_trip,
            "last_gap": self.last_gap,
        }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
