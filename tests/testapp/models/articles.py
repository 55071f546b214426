"""A many-to-many relation, changed from either side."""

from __future__ import annotations

from django.db import models

from django_pgnotify import notify_changes


class Tag(models.Model):
    """Not notified: a change of its articles is the articles' event."""

    name = models.CharField(max_length=40, unique=True)

    def __str__(self) -> str:
        return self.name


@notify_changes
class Article(models.Model):
    title = models.CharField(max_length=80)
    tags = models.ManyToManyField(Tag, related_name="articles")

    def __str__(self) -> str:
        return self.title
