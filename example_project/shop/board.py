"""The board's content as HTML, the same for the page and for what a websocket sends later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db.models import QuerySet
from django.template.loader import render_to_string

from .models import Activity, Order, Status

COLUMNS = (
    (Status.NEW, "Waiting for payment"),
    (Status.PAID, "Reserved, to be packed"),
    (Status.PACKED, "Waiting for the courier"),
    (Status.SHIPPED, "On their way"),
)
CARDS_PER_COLUMN = 8
TICKER_LENGTH = 14


def with_what_a_card_shows() -> QuerySet[Order]:
    return Order.objects.select_related("customer", "slip").prefetch_related("lines__product")


def columns(by_status: Mapping[str, int]) -> list[dict[str, Any]]:
    orders = with_what_a_card_shows()
    return [
        {
            "status": status,
            "hint": hint,
            "count": by_status[status],
            "orders": orders.filter(status=status).order_by("-changed_at")[:CARDS_PER_COLUMN],
        }
        for status, hint in COLUMNS
    ]


def activity() -> QuerySet[Activity]:
    return Activity.objects.select_related("order")[:TICKER_LENGTH]


def snapshot(by_status: Mapping[str, int]) -> dict[str, str]:
    """Everything on the board that lives."""
    return {
        "columns": render_to_string("shop/_columns.html", {"columns": columns(by_status)}),
        "ticker": render_to_string("shop/_ticker.html", {"activity": activity()}),
    }


def card(pk: int) -> tuple[str, str] | None:
    """Status and HTML of the order as it is now; None once it is gone."""
    order = with_what_a_card_shows().filter(pk=pk).first()
    if order is None:
        return None
    return order.status, render_to_string("shop/_card.html", {"order": order})


def ticker_entry(pk: int) -> str | None:
    entry = Activity.objects.select_related("order").filter(pk=pk).first()
    if entry is None:
        return None
    return render_to_string("shop/_ticker_entry.html", {"entry": entry})
