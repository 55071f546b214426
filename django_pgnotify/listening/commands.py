"""What a session tells its listener to do. Data only; see ``session`` for when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a fresh connection; answer with ``connected`` or ``failed``."""


@dataclass(frozen=True, slots=True)
class Listen:
    """LISTEN on these channels, commit; answer with ``listened``."""

    channels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Unlisten:
    """UNLISTEN these channels; answer with ``unlistened``."""

    channels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Echo:
    """NOTIFY ourselves with this nonce; what comes back is given to ``echoed``."""

    nonce: str


@dataclass(frozen=True, slots=True)
class TryLead:
    """Try to take the leader's advisory lock; answer with ``led``.

    ``from_here`` says to lead from this place in the stream on: the old leader has said that it
    acts up to here. Otherwise from where the lock was taken, by the server's order of commits.
    """

    from_here: bool = False


@dataclass(frozen=True, slots=True)
class Lead:
    """This session is the leader from here on."""


@dataclass(frozen=True, slots=True)
class Follow:
    """This session is not the leader any more."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Frames may have been missed from ``since`` to ``until`` (monotonic seconds).

    ``for_leader`` says whose gap it is: that of what every listener runs, or that of what only
    the leader runs, which comes when this listener becomes the leader. ``since`` is None where
    the listener has just started, and cannot know who listened before.
    """

    since: float | None
    until: float
    cause: str
    for_leader: bool = False


@dataclass(frozen=True, slots=True)
class Established:
    """The session is proven to hear ``channels``, and no others."""

    channels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand these notifications to the receivers' side, in order."""

    notifications: list[Any]


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection, if there is one."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection is given up; the next attempt is in ``retry_in`` seconds."""

    cause: str
    retry_in: float


Command = (
    Connect
    | Listen
    | Unlisten
    | Echo
    | TryLead
    | Lead
    | Follow
    | Gap
    | Established
    | Deliver
    | Close
    | Lost
)
