"""Primary keys that are not one integer."""

from __future__ import annotations

import uuid

from django.db import models

from django_pgnotify import notify_changes


@notify_changes(fields=["title"])
class Document(models.Model):
    """A UUID, known before the first save."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    title = models.CharField(max_length=80, default="")

    def __str__(self) -> str:
        return self.title


@notify_changes
class Sku(models.Model):
    """A text key, with whatever a shop puts into one."""

    code = models.CharField(primary_key=True, max_length=80)
    stock = models.IntegerField(default=0)

    def __str__(self) -> str:
        return self.code


@notify_changes(fields=["role"])
class Membership(models.Model):
    """A composite key of an integer, a text and a UUID."""

    pk = models.CompositePrimaryKey("team", "person", "badge")
    team = models.IntegerField()
    person = models.CharField(max_length=40)
    badge = models.UUIDField()
    role = models.CharField(max_length=40, default="member")

    def __str__(self) -> str:
        return f"{self.person} of {self.team}"
