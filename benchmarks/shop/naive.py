"""What one writes first: a signal handler that sends a NOTIFY for each row after the commit."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from django.db import connections, transaction
from django.db.models.signals import post_save

from .models import FIELDS, Naive, NaiveInside, NaiveLoad

BURST = "burst"


def topics(count: int) -> list[str]:
    """Names of so many topics; the first is BURST."""
    return [f"{BURST}{number}" if number else BURST for number in range(count)]


def payload(model: str, pk: Any, data: dict[str, Any]) -> str:
    return json.dumps({"model": model, "pk": pk, "action": "created", "data": data})


def notify(using: str, channel: str, text: str) -> None:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, %s)", (channel, text))


def on_save(sender: Any, instance: Any, using: str, **kwargs: Any) -> None:
    label = sender._meta.label_lower
    text = payload(label, instance.pk, {name: getattr(instance, name) for name in FIELDS})
    if sender is NaiveInside:
        notify(using, label, text)
    else:
        transaction.on_commit(partial(notify, using, label, text), using=using)


post_save.connect(on_save, sender=Naive)
post_save.connect(on_save, sender=NaiveInside)
post_save.connect(on_save, sender=NaiveLoad)
