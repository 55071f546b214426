"""Abstract bases, proxies, and multi-table parents and children."""

from __future__ import annotations

from django.db import models

from django_pgnotify import notify_changes


class Dated(models.Model):
    """An abstract base; its concrete children are notified one by one."""

    day = models.DateField(null=True)

    class Meta:
        abstract = True


@notify_changes(fields=["day", "text"])
class Memo(Dated):
    text = models.CharField(max_length=80, default="")

    def __str__(self) -> str:
        return self.text


@notify_changes
class Vehicle(models.Model):
    """Notified itself; has a proxy, and children that are and are not notified."""

    name = models.CharField(max_length=40)

    def __str__(self) -> str:
        return self.name


class Car(Vehicle):
    """A proxy of a notified model: a save through it is a save of the vehicle."""

    class Meta:
        proxy = True


class Bicycle(Vehicle):
    """A multi-table child that is not notified, of a parent that is."""

    gears = models.PositiveSmallIntegerField(default=1)


@notify_changes(fields=["seats"])
class Sportscar(Vehicle):
    """A multi-table child that is notified, of a parent that is too."""

    seats = models.PositiveSmallIntegerField(default=2)


class Place(models.Model):
    """Not notified; has a notified multi-table child."""

    address = models.CharField(max_length=80)

    def __str__(self) -> str:
        return self.address


@notify_changes
class Restaurant(Place):
    stars = models.PositiveSmallIntegerField(default=0)
