"""What ``cached`` and its kin ask of a cache backend that checks epochs by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from ..epochs.table import Lease
from .level import NearLevel


class EpochCache(BaseCache):
    """Such a backend. All others get their values wrapped, see ``shelf``."""

    uses_epochs = True
    """Has ``pglisten`` keep the epoch table."""

    level: NearLevel

    @abstractmethod
    def fill(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """Store a value that was loaded after ``lease``; False where it may be stale already.

        Args:
            names: what it depends on beside its key.
            loaded_at: when the oldest part of it was loaded, in microseconds since 1970, where that
                was before the lease.
        """

    @abstractmethod
    async def afill(
        self,
        key: str,
        value: Any,
        lease: Lease,
        names: Iterable[str],
        timeout: Any = DEFAULT_TIMEOUT,
        version: int | None = None,
        loaded_at: int | None = None,
    ) -> bool:
        """As :meth:`fill`."""

    @abstractmethod
    def forget_miss(self, key: str, version: int | None = None) -> None:
        """The last miss of ``key`` was somebody's who has a lease of their own."""
