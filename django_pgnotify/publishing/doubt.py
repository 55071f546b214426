"""Saves in autocommit whose answer never came: Django says nothing of them, but they may stand."""

from __future__ import annotations

from collections.abc import Iterable

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Model

from ..epochs.use import is_in_use
from ..events import Action
from ..registry import Publication
from .changes import plain_pk
from .committed import names_of_events
from .publisher import outside_transaction
from .row_event import RowEvent
from .unsent import in_doubt

_SAVES: tuple[Action, ...] = ("created", "updated")


def save_failed(
    instance: Model, publications: Iterable[Publication], connection: BaseDatabaseWrapper
) -> None:
    """Have what a save may have changed be stale, if nobody can know whether it did.

    In a transaction nothing was committed by it, and what the server has refused was not done.
    """
    if outside_transaction(connection) and is_in_use():
        events = []
        for publication in publications:
            pk = None if instance.pk is None else plain_pk(publication.model, instance)
            events += [RowEvent(publication, action, pk, {}, None) for action in _SAVES]
        in_doubt(names_of_events(events), connection)
