"""Sends encoded events: packs them into frames and issues ``pg_notify``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.utils.connection import ConnectionDoesNotExist

from .. import signing
from ..conf import conf
from ..exceptions import UnsupportedDatabase
from ..stats import publishing_stats
from ..wire import FramePacker, Outgoing, reference_to
from .statement import notify


class Transport(Protocol):
    """What carries encoded events away; PostgreSQL, unless a test says otherwise."""

    def send(self, events: Sequence[Outgoing], using: str) -> None: ...


class NotifyTransport:
    """Issues NOTIFY on the Django connection of an alias, in the transaction that is open there."""

    def send(self, events: Sequence[Outgoing], using: str) -> None:
        packer = packer_in_use()
        if packer.fit(events):
            self._notify(packer.pack(events), using)
            return
        # One transaction, so that nobody hears of a row that is not there yet.
        with transaction.atomic(using, savepoint=False):
            self._notify(packer.pack(self._stored(events, packer, using)), using)

    def _stored(
        self, events: Sequence[Outgoing], packer: FramePacker, using: str
    ) -> list[Outgoing]:
        from .store import store  # models are not importable before the apps are loaded

        big = [event for event in events if not packer.fits(event)]
        rows = iter(store([event.body for event in big], using))
        publishing_stats.add("stored", len(big))
        return [
            event if packer.fits(event) else reference_to(event, next(rows)) for event in events
        ]

    def _notify(self, frames: list[tuple[str, str]], using: str) -> None:
        notify(frames, own_connection(using))
        publishing_stats.add("frames", len(frames))


def packer_in_use() -> FramePacker:
    """Packs what this process publishes, as it is configured now."""
    return _packer(conf.source, conf.CHANNEL_PREFIX, conf.SIGNING)


@lru_cache(maxsize=16)
def _packer(source: str, prefix: str, signing_on: bool) -> FramePacker:
    return FramePacker(source, prefix, signing.sign if signing_on else None)


def own_connection(using: str) -> BaseDatabaseWrapper:
    """The Django connection of ``using``, made anew where it is one inherited through a fork.

    Two processes that talk on one socket get each other's answers.
    """
    connection = connections[using]
    opened_by = getattr(connection, _OPENED_BY, None)
    if opened_by not in (None, os.getpid()) and not connection.in_atomic_block:
        _inherited.append(connection.connection)  # to collect it could end the parent's session
        connection.connection = None
    return connection


def _note_process(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    setattr(connection, _OPENED_BY, os.getpid())
    pgconn = getattr(connection.connection, "pgconn", None)
    setattr(connection, _BACKEND, 0 if pgconn is None else pgconn.backend_pid)


def lost_backend(connection: BaseDatabaseWrapper) -> int | None:
    """Pid of the server process that a broken connection had; None if it is not broken.

    It may be carrying out still what it was last told.
    """
    raw = connection.connection
    return getattr(connection, _BACKEND, 0) if getattr(raw, "closed", False) else None


_OPENED_BY = "_pgnotify_opened_by"
_BACKEND = "_pgnotify_backend"
_inherited: list[Any] = []
connection_created.connect(_note_process, dispatch_uid="django_pgnotify")

_default_transport = NotifyTransport()
_transport: Transport = _default_transport


def send(events: Sequence[Outgoing], using: str) -> None:
    """Send ``events`` now, in order, through the transport in use.

    Raises:
        django.db.Error: PostgreSQL refused or could not be reached.
    """
    _transport.send(events, using)
    publishing_stats.add("published", len(events))


def send_by_notify(events: Sequence[Outgoing], using: str) -> None:
    """As :func:`send`, whatever transport a test may have put in use meanwhile."""
    _default_transport.send(events, using)
    publishing_stats.add("published", len(events))


@contextmanager
def transport_in_use(transport: Transport) -> Iterator[None]:
    """Send through another transport, in all threads, for the length of a test."""
    global _transport
    previous, _transport = _transport, transport
    try:
        yield
    finally:
        _transport = previous


def current_transport() -> Transport:
    return _transport


def is_default_transport() -> bool:
    return _transport is _default_transport


def check_alias(using: object) -> str:
    """Return ``using`` if it is the alias of a PostgreSQL database.

    Raises:
        UnsupportedDatabase: it is not in DATABASES, or its engine is not PostgreSQL.
    """
    return postgres_connection(using).alias


def postgres_connection(using: object) -> BaseDatabaseWrapper:
    """The Django connection of a PostgreSQL alias; raises as :func:`check_alias` does."""
    try:
        connection = connections[using] if isinstance(using, str) else None
    except ConnectionDoesNotExist:
        connection = None
    if connection is None:
        raise UnsupportedDatabase(
            f"There is no database alias {using!r}; "
            f"DATABASES has {', '.join(map(repr, connections))}."
        )
    if connection.vendor != "postgresql":
        raise UnsupportedDatabase(
            f"Database alias {using!r} is {connection.vendor}, which has no NOTIFY; "
            f"name a PostgreSQL alias in using= or PGNOTIFY_DATABASE."
        )
    return connection
