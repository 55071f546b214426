"""The figures at the top of the board: computed once, and anew when an order changes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from django.db.models import Count, Q, Sum
from django.utils import timezone

from django_pgnotify.caching import cached

from .models import Order, Status

# The bound on staleness when nobody listens is PGNOTIFY_MAX_STALENESS; this one is there because
# "today" slides with the clock.
TIMEOUT = 300

TAKEN = (Status.PAID, Status.PACKED, Status.SHIPPED)


def summary() -> tuple[dict[str, Any], bool]:
    """The figures, and whether they came out of the cache."""
    asked_at = timezone.now().isoformat()
    figures = compute()
    return figures, figures["computed_at"] < asked_at


@cached(key="shop:summary", timeout=TIMEOUT, depends_on=[Order])
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
