"""A coffee roaster's orders, from the till to the van."""

from __future__ import annotations

from decimal import Decimal

from django.db import models
from django.urls import reverse
from django.utils import timezone

from django_pgnotify import notify_changes


class Customer(models.Model):
    name = models.CharField(max_length=80)
    email = models.EmailField(unique=True)
    city = models.CharField(max_length=60)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Product(models.Model):
    sku = models.SlugField("SKU", max_length=20, unique=True)
    name = models.CharField(max_length=80)
    price = models.DecimalField(max_digits=8, decimal_places=2)
    stock = models.IntegerField(default=0, help_text="Falls when a packing slip reserves goods.")

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Status(models.TextChoices):
    NEW = "new", "New"
    PAID = "paid", "Paid"
    PACKED = "packed", "Packed"
    SHIPPED = "shipped", "Shipped"
    CANCELLED = "cancelled", "Cancelled"


# Where an order goes next, and the words on the button that sends it there.
NEXT_STEP = {
    Status.NEW: (Status.PAID, "Charge"),
    Status.PAID: (Status.PACKED, "Pack"),
    Status.PACKED: (Status.SHIPPED, "Ship"),
}

# How the activity log words an order's arrival in a status.
HEADLINES: dict[str, str] = {
    Status.NEW: "New order",
    Status.PAID: "Payment taken",
    Status.PACKED: "Packed",
    Status.SHIPPED: "Handed to the courier",
    Status.CANCELLED: "Cancelled",
}


@notify_changes(fields=["status", "total"])
class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.PROTECT, related_name="orders")
    status = models.CharField(max_length=10, choices=Status, default=Status.NEW)
    total = models.DecimalField(max_digits=9, decimal_places=2, default=Decimal(0))
    placed_at = models.DateTimeField(default=timezone.now)
    changed_at = models.DateTimeField(default=timezone.now, editable=False, db_index=True)

    class Meta:
        ordering = ("-changed_at",)

    def __str__(self) -> str:
        return self.number

    @property
    def number(self) -> str:
        return f"LR-{1040 + self.pk}" if self.pk else "LR-new"

    def admin_url(self) -> str:
        return reverse("admin:shop_order_change", args=[self.pk])

    @property
    def next_step(self) -> tuple[Status, str] | None:
        return NEXT_STEP.get(Status(self.status))

    @property
    def can_cancel(self) -> bool:
        return self.status in (Status.NEW, Status.PAID, Status.PACKED)

    def move_to(self, status: Status) -> None:
        """Change the status and say so; a change of the row is all it takes."""
        self.status = status
        self.changed_at = timezone.now()
        self.save(update_fields=["status", "changed_at"])

    def recalculate(self) -> Decimal:
        return sum((line.amount for line in self.lines.all()), Decimal(0))


class OrderLine(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    product = models.ForeignKey(Product, on_delete=models.PROTECT, related_name="+")
    quantity = models.PositiveIntegerField(default=1)
    unit_price = models.DecimalField(max_digits=8, decimal_places=2)

    class Meta:
        ordering = ("pk",)

    def __str__(self) -> str:
        return f"{self.quantity} of {self.product}"

    @property
    def amount(self) -> Decimal:
        return self.quantity * self.unit_price


@notify_changes(actions=["created"], fields=["order"])
class PackingSlip(models.Model):
    """Made by a receiver when an order is paid: the goods are reserved, the bench may pack."""

    order = models.OneToOneField(Order, on_delete=models.CASCADE, related_name="slip")
    pieces = models.PositiveIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return f"slip for {self.order}"


@notify_changes(actions=["created"])
class Activity(models.Model):
    """The log of what happened, written by receivers; its rows are the board's ticker."""

    class Kind(models.TextChoices):
        ORDER = "order", "Order"
        SLIP = "slip", "Packing slip"
        JOB = "job", "Job"

    kind = models.CharField(max_length=10, choices=Kind)
    text = models.CharField(max_length=200)
    status = models.CharField(max_length=10, choices=Status, blank=True)
    order = models.ForeignKey(
        Order, null=True, blank=True, on_delete=models.SET_NULL, related_name="activity"
    )
    # The event this row tells of: an event that is delivered twice is logged once.
    event_id = models.CharField(max_length=64, unique=True, editable=False)
    at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ("-at", "-pk")
        verbose_name_plural = "activity"

    def __str__(self) -> str:
        return self.text
