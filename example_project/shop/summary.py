"""The figures at the top of the board: computed once, cached for every process of this machine."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from typing import Any

from django.core.cache import cache
from django.db.models import Count, Q, Sum
from django.utils import timezone

from .models import Order, Status

KEY = "shop:summary"
LEASE = "shop:summary:lease"

# What receivers.py has deleted when an order changes.
KEYS = [KEY, LEASE]

# The bound on staleness when nobody listens. The figures also slide with the clock.
TIMEOUT = 300

TAKEN = (Status.PAID, Status.PACKED, Status.SHIPPED)


def summary() -> tuple[dict[str, Any], bool]:
    """The figures, and whether they came out of the cache."""
    cached = cache.get(KEY)
    if cached is not None:
        return cached, True
    # A change may be invalidated between our reading the rows and our storing the result, which
    # would then be stale with nobody left to delete it. The lease goes with the key, so a result
    # whose lease is gone is used once and not stored.
    lease = uuid.uuid4().hex
    cache.set(LEASE, lease, TIMEOUT)
    figures = compute()
    if cache.get(LEASE) == lease:
        cache.set(KEY, figures, TIMEOUT)
    return figures, False


def compute() -> dict[str, Any]:
    now = timezone.now()
    by_status = dict.fromkeys(Status.values, 0)
    by_status |= dict(Order.objects.order_by().values_list("status").annotate(Count("pk")))
    last_day = Q(placed_at__gte=now - timedelta(hours=24))
    figures = Order.objects.aggregate(
        orders_today=Count("pk", filter=last_day),
        revenue_today=Sum("total", filter=last_day & Q(status__in=TAKEN)),
        open_value=Sum("total", filter=Q(status__in=(Status.NEW, Status.PAID, Status.PACKED))),
    )
    return {
        "by_status": by_status,
        "to_pack": by_status[Status.PAID],
        "to_ship": by_status[Status.PACKED],
        "orders_today": figures["orders_today"],
        "revenue_today": f"{figures['revenue_today'] or 0:,.2f}",
        "open_value": f"{figures['open_value'] or 0:,.2f}",
        "computed_at": now.isoformat(),
        "computed_by": os.getpid(),
    }
