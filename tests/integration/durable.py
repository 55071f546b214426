"""What the tests of durable topics share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from django_pgnotify import Event, Topic, consumers, receiver
from django_pgnotify.durable.waking import wake_consumers
from django_pgnotify.models import Consumer, DeadLetter
from django_pgnotify.testing import running_listener
from tests.integration.recording import DEADLINE, Recorder, dsn

LEDGER = Topic("ledger", delivery="durable")


def consume(func: Callable[[Event], Any], name: str = "ledger", **options: Any) -> None:
    """Make ``func`` the durable consumer ``name`` of the ledger."""
    receiver(options.pop("source", LEDGER), dispatch_uid=name, **options)(func)


def register() -> None:
    """Have the consumers exist, without anything handled."""
    with running_listener():
        pass


@contextmanager
def other_session() -> Iterator[psycopg.Connection[Any]]:
    """A session of somebody else's, with a transaction of its own."""
    with psycopg.connect(dsn()) as other:
        yield other


def write(other: psycopg.Connection[Any], data: str, key: str | None = None) -> None:
    """Write an event to the log as a program that knows nothing of Django, and sends no NOTIFY."""
    other.execute(
        "INSERT INTO pgnotify_event_log (topic, key, source, body) VALUES"
        " ('ledger', %s::text, 'psql',"
        " json_build_object('key', %s::text, 'data', %s::json)::text)",
        [key, key, data],
    )


def wake() -> None:
    wake_consumers("default")


def stored(name: str = "ledger") -> Consumer:
    return consumers.consumer(name)


def letters(name: str = "ledger") -> list[DeadLetter]:
    return list(DeadLetter.objects.filter(consumer__name=name).order_by("event_id"))


class Picky(Recorder):
    """A receiver that raises while the data of an event is among ``bad``."""

    def __init__(self, bad: Sequence[Any]) -> None:
        super().__init__()
        self.bad = set(bad)
        self.attempts = Recorder()

    def __call__(self, event: Event) -> None:
        self.attempts(event)
        if event.data in self.bad:
            raise ValueError(f"cannot take {event.data!r}")
        super().__call__(event)


def until(met: Callable[[], bool]) -> None:
    """Look again, a query each time, until it is so."""
    deadline = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s"
