"""What the shop does with orders, whoever asks: a view, the admin, a command, a receiver."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from django.db import transaction
from django.db.models import F

from django_pgnotify import Topic, publish

from .models import Customer, Order, OrderLine, PackingSlip, Product, Status

SHIPMENTS = Topic("shop.shipments", delivery="durable")
"""Parcels as they are handed over; kept in the event log, for whoever was not looking."""


class OrderRefusedError(Exception):
    """The step is not open to the order as it stands; the message is for the person who asked."""


def advance(pk: int) -> Order:
    """Take the order one step on: new, paid, packed, shipped."""
    with transaction.atomic():
        order = Order.objects.select_for_update().get(pk=pk)
        if order.next_step is None:
            raise OrderRefusedError(f"{order} is {order.get_status_display().lower()} already")
        order.move_to(order.next_step[0])
        if order.status == Status.SHIPPED:
            publish(SHIPMENTS, shipment(order))
    return order


def shipment(order: Order) -> dict[str, Any]:
    """What the courier desk shows of a parcel."""
    return {
        "order": order.pk,
        "number": order.number,
        "customer": order.customer.name,
        "city": order.customer.city,
        "at": order.changed_at.isoformat(),
    }


def cancel(pk: int) -> Order:
    """Cancel the order and put reserved goods back on the shelf."""
    with transaction.atomic():
        order = Order.objects.select_for_update().get(pk=pk)
        if not order.can_cancel:
            raise OrderRefusedError(f"{order} is {order.get_status_display().lower()} already")
        if PackingSlip.objects.filter(order=order).delete()[0]:
            _move_stock(order, +1)
        order.move_to(Status.CANCELLED)
    return order


def place(
    customer: Customer | None = None, wanted: Iterable[tuple[Product, int]] | None = None
) -> Order:
    """Write a new order, by default one that somebody might well have placed."""
    with transaction.atomic():
        if customer is None:
            customer = random.choice(list(Customer.objects.all()))
        if wanted is None:
            shelf = list(Product.objects.filter(stock__gt=10)) or list(Product.objects.all())
            basket = random.sample(shelf, k=min(len(shelf), random.choice([1, 1, 2, 2, 3])))
            wanted = [(product, random.choice([1, 1, 2, 3])) for product in basket]
        lines = [
            OrderLine(product=product, quantity=quantity, unit_price=product.price)
            for product, quantity in wanted
        ]
        order = Order(customer=customer, total=sum(line.amount for line in lines))
        order.save()
        for line in lines:
            line.order = order
        OrderLine.objects.bulk_create(lines)
    return order


def prepare_packing(order_pk: int) -> PackingSlip | None:
    """Reserve the goods of a paid order and write its slip; None when there is nothing to do."""
    with transaction.atomic():
        order = Order.objects.select_for_update().filter(pk=order_pk, status=Status.PAID).first()
        if order is None or PackingSlip.objects.filter(order=order).exists():
            return None
        _move_stock(order, -1)
        return PackingSlip.objects.create(
            order=order, pieces=sum(line.quantity for line in order.lines.all())
        )


def _move_stock(order: Order, sign: int) -> None:
    # In one order of keys everywhere, so that two orders of the same goods cannot deadlock.
    for line in order.lines.order_by("product_id"):
        Product.objects.filter(pk=line.product_id).update(stock=F("stock") + sign * line.quantity)


def waiting_for_slip() -> list[int]:
    """Paid orders without a slip: what a receiver missed while nobody listened."""
    return list(
        Order.objects.filter(status=Status.PAID, slip=None)
        .order_by("placed_at")
        .values_list("pk", flat=True)
    )
