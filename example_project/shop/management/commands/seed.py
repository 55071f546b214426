"""Fill an empty shop: products, customers, two days of orders, and the user admin/admin."""

from __future__ import annotations

import random
from datetime import timedelta
from decimal import Decimal
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand
from django.db import transaction
from django.utils import timezone

from django_pgnotify import no_notify

from ...models import (
    HEADLINES,
    Activity,
    Customer,
    Order,
    OrderLine,
    PackingSlip,
    Product,
    Status,
)

PRODUCTS = [
    ("yirgacheffe-250", "Yirgacheffe, washed, 250 g", "11.50", 420),
    ("huila-250", "Huila Decaf, 250 g", "10.80", 260),
    ("house-1kg", "House Espresso, 1 kg", "27.00", 310),
    ("sumatra-500", "Sumatra Mandheling, 500 g", "18.40", 180),
    ("kenya-250", "Kenya Nyeri AA, 250 g", "13.20", 205),
    ("geisha-125", "Panama Geisha, 125 g", "24.00", 44),
    ("filters-02", "Paper filters 02, 100 pcs", "5.90", 640),
    ("dripper-02", "Ceramic dripper 02", "22.50", 75),
    ("grinder-c2", "Hand grinder C2", "64.00", 38),
    ("kettle-900", "Gooseneck kettle, 0.9 l", "48.00", 52),
]

CUSTOMERS = [
    ("Amelia Hartley", "Leeds"),
    ("Café Mistral", "Bristol"),
    ("Jonas Lindqvist", "Malmö"),
    ("Priya Raman", "London"),
    ("The Copper Kettle", "York"),
    ("Tomás Oliveira", "Porto"),
    ("Saoirse O'Brien", "Galway"),
    ("Hana Novotná", "Brno"),
    ("Bakehouse 22", "Glasgow"),
    ("Mehmet Demir", "Berlin"),
    ("Elif & Sons Deli", "Cardiff"),
    ("Ruth Okafor", "Manchester"),
    ("Studio Nord", "Aarhus"),
    ("Luca Ferrari", "Torino"),
]

# Minutes ago that the orders of each status were placed.
ORDERS = {
    Status.SHIPPED: [2580, 2304, 1890, 1610, 1385, 1170, 960, 742, 655, 540],
    Status.CANCELLED: [1740, 812],
    Status.PACKED: [430, 385, 322],
    Status.PAID: [268, 214, 165, 121],
    Status.NEW: [88, 61, 37, 18, 4],
}

PATH = [Status.NEW, Status.PAID, Status.PACKED, Status.SHIPPED]


class Command(BaseCommand):
    help = "Fill the shop with believable orders and make the user admin/admin. Safe to repeat."

    def handle(self, *args: Any, **options: Any) -> None:
        # Nothing of this is news to anybody: the rows are there before the listener is.
        with transaction.atomic(), no_notify():
            users = get_user_model().objects
            if not users.filter(username="admin").exists():
                users.create_superuser("admin", "admin@larkfield.example", "admin")
            for sku, name, price, stock in PRODUCTS:
                Product.objects.get_or_create(
                    sku=sku, defaults={"name": name, "price": Decimal(price), "stock": stock}
                )
            for number, (name, city) in enumerate(CUSTOMERS, start=1):
                Customer.objects.get_or_create(
                    email=f"customer{number}@larkfield.example",
                    defaults={"name": name, "city": city},
                )
            if not Order.objects.exists():
                self.place_orders()
        self.stdout.write(f"seed: {Order.objects.count()} orders, user admin, password admin")

    def place_orders(self) -> None:
        chance = random.Random(7)  # the same shop every time
        products, customers = list(Product.objects.order_by("pk")), list(Customer.objects.all())
        now = timezone.now()
        wanted = [(minutes, status) for status, ages in ORDERS.items() for minutes in ages]
        recent = []
        for minutes, status in sorted(wanted, reverse=True):
            placed_at = now - timedelta(minutes=minutes)
            changed_at = placed_at + (now - placed_at) * chance.uniform(0.05, 0.6)
            basket = chance.sample(products, k=chance.choice([1, 2, 2, 3]))
            lines = [
                OrderLine(product=item, quantity=chance.choice([1, 1, 2, 4]), unit_price=item.price)
                for item in basket
            ]
            order = Order.objects.create(
                customer=chance.choice(customers),
                status=status,
                total=sum(line.amount for line in lines),
                placed_at=placed_at,
                changed_at=placed_at if status == Status.NEW else changed_at,
            )
            for line in lines:
                line.order = order
            OrderLine.objects.bulk_create(lines)
            if status in PATH[1:]:
                PackingSlip.objects.create(order=order, pieces=sum(line.quantity for line in lines))
            recent.append(order)
        for order in recent:
            Activity.objects.create(
                kind=Activity.Kind.ORDER,
                text=HEADLINES[order.status],
                status=order.status,
                order=order,
                event_id=f"seed:{order.pk}",
                at=order.changed_at,
            )
