"""Events too big for NOTIFY: written to a table, fetched by whoever hears of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from django.db.models.functions import Now

from ..models import StoredEvent

PRUNE_BATCH = 1000


def store(bodies: Iterable[str], using: str) -> list[int]:
    """Write each event's JSON text to a row; returns the rows' ids in the same order."""
    rows = StoredEvent.objects.using(using).bulk_create(
        [StoredEvent(body=body) for body in bodies], batch_size=100
    )
    return [row.pk for row in rows]


def fetch(ids: Sequence[int], using: str) -> dict[int, str]:
    """JSON texts by id; ids whose row has been pruned are absent."""
    rows = StoredEvent.objects.using(using).filter(pk__in=ids)
    return dict(rows.values_list("pk", "body"))


def prune(older_than: float, using: str) -> int:
    """Delete rows older than ``older_than`` seconds, at most a batch; returns how many."""
    rows = StoredEvent.objects.using(using)
    old = rows.filter(created_at__lt=Now() - timedelta(seconds=older_than)).order_by("pk")
    ids = list(old.values_list("pk", flat=True)[:PRUNE_BATCH])
    return rows.filter(pk__in=ids).delete()[0] if ids else 0
