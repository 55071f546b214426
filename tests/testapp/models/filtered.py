"""What ``notify_changes`` can be told: topic, actions, delivery, database; and rich fields."""

from __future__ import annotations

from typing import Any

from django.db import models

from django_pgnotify import notify_changes


@notify_changes(topic="billing", fields=["number"])
class Invoice(models.Model):
    """On a topic of its own choice."""

    number = models.CharField(max_length=20)
    paid = models.BooleanField(default=False)

    def __str__(self) -> str:
        return self.number


@notify_changes(actions=["created", "deleted"])
class Audited(models.Model):
    """Updates are nobody's business."""

    name = models.CharField(max_length=20)

    def __str__(self) -> str:
        return self.name


@notify_changes(delivery="atomic")
class Urgent(models.Model):
    """NOTIFY inside the writing transaction."""

    name = models.CharField(max_length=20)

    def __str__(self) -> str:
        return self.name


@notify_changes
class Remote(models.Model):
    """Lives on the ``other`` database (tests.testapp.routers)."""

    name = models.CharField(max_length=20)

    def __str__(self) -> str:
        return self.name


def upload_to(instance: models.Model, filename: str) -> str:
    return f"profiles/{filename}"


@notify_changes(fields=["settings", "picture"])
class Profile(models.Model):
    """Carries a JSON value and the name of a file."""

    settings: models.JSONField[Any, Any] = models.JSONField(default=dict)
    picture = models.FileField(upload_to=upload_to, blank=True, default="")

    def __str__(self) -> str:
        return f"profile {self.pk}"
