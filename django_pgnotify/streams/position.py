"""What a stream's ``id:`` says: how far its reader has come. Signed, for a browser brings it back.

Of a durable stream it holds the cursor in the event log (see ``durable.cursor``), so that what
commits late is not lost over a reconnect either. Of a live one it holds only the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from django.core.signing import BadSignature, Signer

from ..durable.cursor import Cursor, Snapshot

LONGEST = 3000
"""Characters of an id: servers take 8 KB of headers. What is longer is not sent."""

_SALT = "django_pgnotify.streams.position"
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Position(NamedTuple):
    """Where a reader is.

    Attributes:
        at: when it was there, in seconds since the epoch.
        epoch: which server its cursor belongs to, empty without one.
        cursor: its place in the event log; None for a stream of live events only.
    """

    at: float
    epoch: str = ""
    cursor: Cursor | None = None


class Positions:
    """Writes and reads the ids of the streams of some topics; those of others are refused."""

    def __init__(self, topics: Iterable[str]) -> None:
        self._salt = "\0".join((_SALT, *sorted(topics)))

    def encode(self, position: Position) -> str | None:
        """The id; None if it would be too long, because too many transactions are running."""
        parts = [_to_36(int(position.at * 1000)), position.epoch]
        if position.cursor is not None:
            snapshot, target, place = position.cursor
            parts += [_shorter(snapshot), _shorter(target) if target else "", _to_36(place)]
        text = Signer(salt=self._salt).sign("~".join(parts))
        return text if len(text) <= LONGEST else None

    def decode(self, text: str) -> Position | None:
        """The position, None if it is none that :meth:`encode` gave."""
        if len(text) > LONGEST:
            return None
        try:
            at, epoch, *cursor = Signer(salt=self._salt).unsign(text).split("~")
            seconds = int(at, 36) / 1000
            if not cursor:
                return Position(seconds, epoch)
            snapshot, target, place = cursor
            return Position(
                seconds,
                epoch,
                Cursor(_longer(snapshot), _longer(target) if target else "", int(place, 36)),
            )
        except (BadSignature, ValueError):
            return None

    def now(self, epoch: str = "", cursor: Cursor | None = None) -> str | None:
        """The id of somebody who is at ``cursor`` now."""
        return self.encode(Position(time.time(), epoch, cursor))


def _shorter(snapshot: str) -> str:
    """A snapshot with its running transactions as differences, in base 36."""
    xmin, xmax, xip = Snapshot.parse(snapshot)
    parts = [_to_36(xmin), _to_36(xmax - xmin)]
    before = xmin
    for xid in sorted(xip):
        parts.append(_to_36(xid - before))
        before = xid
    return ".".join(parts)


def _longer(text: str) -> str:
    """The inverse of :func:`_shorter`; raises ValueError."""
    xmin, span, *steps = (int(part, 36) for part in text.split("."))
    xips, xid = [], xmin
    for step in steps:
        xid += step
        xips.append(str(xid))
    return f"{xmin}:{xmin + span}:{','.join(xips)}"


def _to_36(number: int) -> str:
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if not number:
            return digits
