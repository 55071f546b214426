"""The everyday cases: all fields tracked and none carried, and some carried."""

from __future__ import annotations

from decimal import Decimal

from django.db import models
from django.utils import timezone

from django_pgnotify import notify_changes


@notify_changes
class Order(models.Model):
    """Decorated without arguments: events say which row, not what is in it."""

    status = models.CharField(max_length=20, default="new")
    total = models.DecimalField(max_digits=10, decimal_places=2, default=Decimal("0.00"))
    note = models.TextField(blank=True, default="")
    placed_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"order {self.pk} ({self.status})"


@notify_changes(fields=["status", "weight", "sent_at", "order"])
class Shipment(models.Model):
    """Events carry values of several types, among them a foreign key's and a Decimal."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="shipments")
    status = models.CharField(max_length=20, default="packed")
    weight = models.DecimalField(max_digits=8, decimal_places=3, null=True)
    sent_at = models.DateTimeField(null=True)
    label = models.CharField(max_length=40, blank=True, default="")

    def __str__(self) -> str:
        return f"shipment {self.pk} ({self.status})"
