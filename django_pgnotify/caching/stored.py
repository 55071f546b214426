"""What stands in a cache that processes share: a value, and what it is judged by when it is read.

The epochs of the node that loaded it are exact there. On another node they mean nothing; there the
value counts if it was loaded after the last time that anything it depends on was bumped, with
``PGNOTIFY_CLOCK_SKEW`` between the clocks of the two. Each node bumps when it hears of a change,
so later than the change was committed: what was loaded before the commit is always the older one.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple

from ..conf import conf
from ..epochs.clock import time_of
from ..epochs.table import EpochTable, Snapshot
from .frozen import Frozen

_MARK = "django_pgnotify:1"
_MICROSECONDS = 1_000_000


LONGEST_KEY = 180
"""Characters of a key there. memcached takes 250 with the prefix and version that a cache adds."""


REPLACE_WITHIN = 10
"""Seconds in which one ``add`` replaces what does not count, and every other one is too late."""


class Found(NamedTuple):
    """A value that counts, with the epochs that it counts under on this node."""

    value: Frozen
    snapshot: Snapshot
    expires: float | None
    """Seconds since 1970; None for never."""


def keys_begin(space: str) -> str:
    """What tells the keys of a NearCache from those of others in the same cache."""
    return _digest(space, 4)


def key_there(begin: str, key: str) -> str:
    """The key in the cache that processes share of a key of the NearCache before it."""
    full = f"{begin}:{key}"
    return full if len(full) <= LONGEST_KEY else f"{begin}:{_digest(key, 16)}"


def replacing(key_there: str, stored: object) -> str:
    """A key that one caller of ``add`` can have, who then replaces what does not count there."""
    stored_as = repr(stored[1:5]) if isinstance(stored, (tuple, list)) else ""
    return f"{key_there}:{_digest(stored_as, 8)}"


def _digest(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).hexdigest()


def wrap(value: Frozen, snapshot: Snapshot, timeout: float | None) -> tuple[Any, ...]:
    """``value`` as it is stored: a plain tuple, which any serializer can carry."""
    expires = None if timeout is None else time.time() + timeout
    return (
        _MARK,
        snapshot.table,
        snapshot.at,
        list(snapshot.names),
        list(snapshot.epochs),
        expires,
        *value,
    )


def is_wrapped(stored: object) -> bool:
    return isinstance(stored, (tuple, list)) and len(stored) == 8 and stored[0] == _MARK


def names_in(stored: object) -> list[str]:
    """What a stored value depends on, stale or not; nothing if it is somebody else's."""
    return list(stored[3]) if isinstance(stored, (tuple, list)) and is_wrapped(stored) else []


def unwrap(stored: object, table: EpochTable) -> Found | None:
    """What is in ``stored`` if it counts now; None where it is stale or of somebody else's."""
    if not isinstance(stored, (tuple, list)) or not is_wrapped(stored):
        return None
    _, made_by, at, names, epochs, expires, kind, payload = stored
    now = table.capture(names)  # before it is judged
    if not now.table:
        return (
            None  # the file has been taken away a moment ago: nothing can be told of what changed
        )
    if made_by == now.table:
        if list(now.epochs) != list(epochs):
            return None
    else:
        latest = max(time_of(epoch) for epoch in now.epochs)
        if at <= latest + conf.CLOCK_SKEW * _MICROSECONDS:
            return None
    if expires is not None and expires <= time.time():
        return None
    return Found(Frozen(kind, payload), now._replace(at=at), expires)
