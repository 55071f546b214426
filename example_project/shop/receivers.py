"""What happens when an order changes. pglisten imports this module and calls what is in it."""

from __future__ import annotations

import logging

from asgiref.sync import sync_to_async

from django_pgnotify import Event, forward, publish, receiver

from . import orders
from .models import HEADLINES, Activity, Order, PackingSlip, Status

logger = logging.getLogger(__name__)

BOARD_GROUP = "orders"

# To the browsers: every board, in whatever web process, is a member of this one group.
forward(Order, group=BOARD_GROUP, type="order.changed")
forward(PackingSlip, group=BOARD_GROUP, type="slip.printed", actions=["created"])
forward(Activity, group=BOARD_GROUP, type="activity.added", actions=["created"])
forward("shop.summary", group=BOARD_GROUP, type="summary.changed")


@receiver(Order, every_node=True, on_gap=True)
def announce_summary(event: Event) -> None:
    """Tell the boards that the cached summary is stale; after a gap, to load it all.

    By the time that a receiver runs, it is so on this node. Each node says it for itself: one that
    is told by another may still have the old figures.
    """
    publish("shop.summary", {"whole_board": event.action == "gap"})


@receiver(Order, actions=["created", "updated"], retries=3, on_gap=True)
def write_packing_slip(event: Event) -> None:
    """A paid order has its goods reserved and a slip written for the packing bench."""
    if event.action == "gap":
        # Nobody listened for a while; the rows know what was missed.
        wanted = orders.waiting_for_slip()
    elif event.data.get("status") == Status.PAID:
        wanted = [event.pk]
    else:
        return
    for order_pk in wanted:
        slip = orders.prepare_packing(order_pk)
        if slip is not None:
            logger.info("packing slip %s: %s pieces reserved", slip.order.number, slip.pieces)
            Activity.objects.get_or_create(
                event_id=f"slip:{slip.pk}",
                defaults={
                    "kind": Activity.Kind.SLIP,
                    "text": f"Slip printed, {slip.pieces} pieces reserved",
                    "order": slip.order,
                },
            )


@receiver(Order, retries=3)
def keep_log(event: Event) -> None:
    """One line of the activity log for each change of an order."""
    order, status = event.instance(), event.data.get("status", "")
    if event.action == "deleted":
        text, status = f"{Order(pk=event.pk)} deleted", Status.CANCELLED
    elif event.action == "updated" and event.changed and "status" not in event.changed:
        text = "Details edited"
    else:
        text = HEADLINES[status]
    Activity.objects.get_or_create(
        event_id=event.id,
        defaults={
            "kind": Activity.Kind.ORDER,
            "text": text,
            "status": status,
            "order": order,
            "at": event.published_at,
        },
    )


@receiver("jobs", concurrency=4)
async def run_job(event: Event) -> None:
    """A free topic. Try it from psql:  NOTIFY jobs, 'roast 20 kg of Yirgacheffe'"""
    text = event.data if isinstance(event.data, str) else str(event.data.get("text", event.data))
    await sync_to_async(Activity.objects.get_or_create)(
        event_id=event.id,
        defaults={"kind": Activity.Kind.JOB, "text": text[:200], "at": event.published_at},
    )
