"""One table for each way of publishing a change; the columns are the same."""

from __future__ import annotations

from django.db import models

from django_pgnotify import notify_changes

FIELDS = ["number", "status"]
"""What an event carries; a naive publisher sends the same."""


class Row(models.Model):
    number = models.IntegerField()
    status = models.CharField(max_length=20, default="new")
    total = models.DecimalField(max_digits=10, decimal_places=2, default=0)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self._meta.label} {self.number}"


class Silent(Row):
    """Publishes nothing."""


class SilentToo(Row):
    """Publishes nothing either: how far it is from ``Silent`` is what the measurement is worth."""


@notify_changes(fields=FIELDS)
class AfterCommit(Row):
    """Publishes in the default tier."""


@notify_changes(fields=FIELDS)
class Background(Row):
    """The same, saved while the background sender is on."""


@notify_changes(fields=FIELDS, delivery="atomic")
class Atomic(Row):
    """Publishes inside the transaction."""


@notify_changes(fields=FIELDS, delivery="durable")
class Durable(Row):
    """Writes its events to the log."""


@notify_changes(fields=FIELDS)
class Load(Row):
    """Publishes what keeps the listener busy while something else is measured."""


class Naive(Row):
    """Publishes by hand: see ``naive.py``."""


class NaiveInside(Row):
    """The same, inside the transaction."""


class NaiveLoad(Row):
    """As ``Load``, by hand."""


class Account(models.Model):
    """What a business transaction charges."""

    balance = models.IntegerField(default=0)

    def __str__(self) -> str:
        return f"account {self.pk}"
