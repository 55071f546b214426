"""What an operator does with durable consumers and dead letters.

The admin and the commands ``pgnotify_consumers``, ``pgnotify_deadletters`` and ``pgnotify_replay``
are faces of these functions. Each takes effect in a running ``pglisten`` at once. ``using`` is the
alias of the database that has the log; default ``PGNOTIFY_DATABASE``.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from django.db import transaction
from django.db.models import F, Max, Min, QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from .conf import conf
from .durable.cursor import BEGINNING, Logged, put_restored_behind
from .durable.entries import prepare
from .durable.epoch import current_epoch
from .durable.lag import Lag, lag_of
from .durable.locks import held
from .durable.state import current_snapshot
from .durable.waking import wake_consumers
from .exceptions import InvalidArgument, UnknownConsumer
from .models import Consumer, DeadLetter, LoggedEvent

Position = Literal["now", "beginning", "continue"]

_ROWS = 1000


def consumer(name: str, using: str | None = None) -> Consumer:
    """The consumer of this name.

    Raises:
        UnknownConsumer: there is none; the message lists those that there are.
    """
    alias = conf.DATABASE if using is None else using
    found = Consumer.objects.using(alias).filter(name=name).first()
    if found is None:
        names = Consumer.objects.using(alias).order_by("name").values_list("name", flat=True)
        raise UnknownConsumer(
            f"There is no durable consumer {name!r} on database {alias!r}; "
            f"there are {', '.join(map(repr, names)) or 'none'}."
        )
    return found


def consumers(using: str | None = None) -> list[tuple[Consumer, Lag]]:
    """All consumers by name, each with how far it is behind."""
    alias = conf.DATABASE if using is None else using
    known = list(Consumer.objects.using(alias).order_by("name"))
    look_who_holds(known)
    return [(one, lag_of(one)) for one in known]


def look_who_holds(known: Iterable[Consumer]) -> None:
    """Set ``held`` of consumers, which are on one database, by one query."""
    rows = list(known)
    if rows:
        names = held([one.name for one in rows], rows[0]._state.db or "default")
        for one in rows:
            one.held = one.name in names


def state_of(one: Consumer) -> str:
    """What a consumer does, in a few words."""
    if one.resync:
        return f"waits for a resync: {one.resync}"
    if one.paused:
        return "paused"
    if one.held is None:
        look_who_holds([one])
    return "runs" if one.held and one.holder else "not run"


def pause(name: str, using: str | None = None) -> None:
    """Have a consumer stop, at most a quarter of a second and the event at hand from now.

    Where it has come to is stored. Raises UnknownConsumer.
    """
    _pause(consumer(name, using), True)


def resume(name: str, using: str | None = None) -> None:
    """Have a paused consumer go on where it stopped. Raises UnknownConsumer."""
    _pause(consumer(name, using), False)


def reset(name: str, to: Position | datetime, using: str | None = None) -> None:
    """Set where a consumer goes on, and end its wait for a resync.

    Args:
        to: ``"now"`` skips what it has not had; ``"beginning"`` gives it all that the log has,
            again; a time gives it what was published from then on, again (and what overlapped
            with that); ``"continue"`` keeps its place, where a cursor of before is known to be
            right, as after ``pg_upgrade``.

    Raises:
        UnknownConsumer: there is no such consumer.
        InvalidArgument: ``to`` is none of these, or a time without a time zone.
    """
    one = consumer(name, using)
    alias = one._state.db or "default"
    now = current_snapshot(alias)
    place: dict[str, Any]
    if to == "continue":
        place = {}
    elif to == "now":
        place = {"snapshot": now, "target": "", "position": 0}
    elif to == "beginning":
        place = {"snapshot": BEGINNING, "target": "", "position": 0}
    elif isinstance(to, datetime) and timezone.is_aware(to):
        place = {"snapshot": BEGINNING, "target": now, "position": _before(one, to)}
    else:
        raise InvalidArgument(
            f"to= takes 'now', 'beginning', 'continue' or an aware datetime; got {to!r}."
        )
    rows = Consumer.objects.using(alias).filter(pk=one.pk)
    epoch = str(current_epoch(alias))
    if place:
        put_restored_behind(one.topics, alias)
    rows.update(revision=F("revision") + 1, resync="", epoch=epoch, **place)
    wake_consumers(alias)


def delete(name: str, using: str | None = None) -> None:
    """Forget a consumer, its cursor and its dead letters; nothing is kept in the log for it.

    One that a ``pglisten`` still has begins anew, as a new one does. Raises UnknownConsumer.
    """
    one = consumer(name, using)
    alias = one._state.db or "default"
    one.delete()
    wake_consumers(alias)


def replay(
    name: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    events: Iterable[int] | None = None,
    using: str | None = None,
) -> int:
    """Give a consumer events of the log again: those of a stretch of time, or selected ones.

    They come beside its cursor, by id, before later events of the same key.

    Args:
        since: published at this time or later; an aware datetime.
        until: published before this time.
        events: ids in the event log. Those of other topics than the consumer's are left out.

    Returns:
        How many events it will get.

    Raises:
        UnknownConsumer: there is no such consumer.
        InvalidArgument: neither a time nor events were given, or a time without a time zone.
    """
    one = consumer(name, using)
    alias = one._state.db or "default"
    rows = LoggedEvent.objects.using(alias).filter(topic__in=one.topics)
    if since is None and until is None and events is None:
        raise InvalidArgument("Say which events: since=, until= or events=.")
    for moment in (since, until):
        if moment is not None and not (isinstance(moment, datetime) and timezone.is_aware(moment)):
            raise InvalidArgument(f"A time is an aware datetime; got {moment!r}.")
    if since is not None:
        rows = rows.filter(created_at__gte=since)
    if until is not None:
        rows = rows.filter(created_at__lt=until)
    if events is not None:
        rows = rows.filter(pk__in=list(events))
    with transaction.atomic(alias):
        count = _send_again(one, rows)
    wake_consumers(alias)
    return count


def _send_again(one: Consumer, rows: QuerySet[LoggedEvent]) -> int:
    count = last = 0
    while batch := list(rows.filter(pk__gt=last).order_by("pk")[:_ROWS]):
        letters = [
            DeadLetter(
                consumer=one,
                event_id=row.pk,
                topic=row.topic,
                key=key_of(row),
                source=row.source,
                body=row.body,
                published_at=row.created_at,
                retry_at=Now(),  # the clock that says when it is due
            )
            for row in batch
        ]
        DeadLetter.objects.using(rows.db).bulk_create(
            letters,
            update_conflicts=True,
            unique_fields=["consumer", "event_id"],
            update_fields=["retry_at", "attempts"],
        )
        count += len(batch)
        last = batch[-1].pk
    return count


def key_of(row: LoggedEvent) -> str | None:
    """The key of a logged event as receivers see it: its own, or its model and primary key."""
    logged = Logged(row.pk, row.topic, row.source, row.created_at, row.body)
    return prepare(logged, row.body, "default").key


def dead_letters(name: str | None = None, using: str | None = None) -> QuerySet[DeadLetter]:
    """Events whose attempts are used up, of one consumer or of all, oldest first."""
    letters = DeadLetter.objects.using(conf.DATABASE if using is None else using)
    letters = letters.filter(retry_at=None).order_by("event_id").select_related("consumer")
    return letters if name is None else letters.filter(consumer=consumer(name, using))


def error_line(letter: DeadLetter) -> str:
    """What the last attempt raised: the last line of its traceback, cut."""
    return (letter.error.strip().splitlines() or [""])[-1][:100]


def requeue(letters: QuerySet[DeadLetter]) -> int:
    """Have events tried again, with all attempts before them; returns how many."""
    count = letters.order_by().update(retry_at=Now(), attempts=0)
    wake_consumers(letters.db)
    return count


def discard(letters: QuerySet[DeadLetter]) -> int:
    """Give events up for good; returns how many."""
    count = letters.order_by().delete()[0]
    wake_consumers(letters.db)
    return count


def _pause(one: Consumer, paused: bool) -> None:
    alias = one._state.db or "default"
    # No new revision: where it has come to is stored all the same.
    Consumer.objects.using(alias).filter(pk=one.pk).update(paused=paused)
    wake_consumers(alias)


def _before(one: Consumer, moment: datetime) -> int:
    """The id behind which everything was published at ``moment`` or later."""
    rows = LoggedEvent.objects.using(one._state.db).filter(topic__in=one.topics)
    lowest: int | None = rows.filter(created_at__gte=moment).aggregate(Min("id"))["id__min"]
    if lowest is None:
        lowest = (rows.aggregate(Max("id"))["id__max"] or 0) + 1
    return lowest - 1
