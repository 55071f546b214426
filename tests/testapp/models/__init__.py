"""One model per thing that publishing has to get right."""

from __future__ import annotations

from tests.testapp.models.articles import Article, Tag
from tests.testapp.models.filtered import Audited, Invoice, Profile, Remote, Urgent
from tests.testapp.models.inheritance import (
    Bicycle,
    Car,
    Dated,
    Memo,
    Place,
    Restaurant,
    Sportscar,
    Vehicle,
)
from tests.testapp.models.keys import Document, Membership, Sku
from tests.testapp.models.orders import Order, Shipment

__all__ = [
    "Article",
    "Audited",
    "Bicycle",
    "Car",
    "Dated",
    "Document",
    "Invoice",
    "Membership",
    "Memo",
    "Order",
    "Place",
    "Profile",
    "Remote",
    "Restaurant",
    "Shipment",
    "Sku",
    "Sportscar",
    "Tag",
    "Urgent",
    "Vehicle",
]
