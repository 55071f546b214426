"""Takes one of the safeguards away, to see that the check misses it: ``--sabotage NAME``.

Applied in every process of the check. None of these may pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django_pgnotify.caching import loading, transactions
from django_pgnotify.epochs.table import EpochTable
from django_pgnotify.listening.feed import EpochFeed
from django_pgnotify.publishing import committed, riding


def fill_race() -> None:
    """A value counts from when it is stored, and not from when its load began."""

    def settle(self: EpochTable, lease: Any, names: Any) -> Any:
        return self.capture(names)

    EpochTable.settle = settle  # type: ignore[method-assign]


def silent_gap() -> None:
    """What was missed makes nothing stale."""
    EpochFeed.missed = lambda self: None  # type: ignore[method-assign]

    def proven(self: EpochFeed, at: int, channels: frozenset[str]) -> None:
        self.table.verify(at)
        self.table.beat(at)

    EpochFeed.proven = proven  # type: ignore[method-assign]


def eternal_trust() -> None:
    """The age of the heartbeat does not matter."""
    EpochTable.beat = lambda self, proven_at: None  # type: ignore[method-assign]
    from django_pgnotify.epochs.mapped import HEARTBEAT

    original = EpochTable._map

    def mapped(self: EpochTable) -> None:
        original(self)
        self.words[HEARTBEAT] = 1 << 62

    EpochTable._map = mapped  # type: ignore[method-assign]


def own_node_waits() -> None:
    """The writer leaves its node's table to the listener."""
    for module in (committed, riding):
        setattr(module, "bump", lambda names: None)  # noqa: B010 - it is a name of each


def early_publication() -> None:
    """What a transaction has loaded is stored at once."""

    def publish(store: Callable[[], Any]) -> bool:
        store()
        return True

    for module in (transactions, loading):
        setattr(module, "publish", publish)  # noqa: B010 - as above


SABOTAGES: dict[str, Callable[[], None]] = {
    "fill-race": fill_race,
    "silent-gap": silent_gap,
    "eternal-trust": eternal_trust,
    "own-node-waits": own_node_waits,
    "early-publication": early_publication,
}
