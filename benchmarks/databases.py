"""The server, and a database of its own for each variant.

A NOTIFY wakes every listener of its database, so variants that are measured in turn must not
share one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from example_project.embedded import EmbeddedPostgres

SETTINGS = "benchmarks.shop.settings"

_free: list[str] = []


@contextmanager
def served() -> Iterator[EmbeddedPostgres]:
    """Start the server, and set Django up on it in this process."""
    with EmbeddedPostgres(version=18) as server:
        set_up(server.port)
        from benchmarks.shop.settings import ALIASES, TEMPLATE

        server.create_database(TEMPLATE)
        _make_tables()
        _free[:] = ALIASES
        yield server


def set_up(port: int = 0) -> None:
    """Set Django up; without a port nothing can connect."""
    os.environ.update(DJANGO_SETTINGS_MODULE=SETTINGS, BENCHMARK_PORT=str(port))
    import django

    django.setup()


def _make_tables() -> None:
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", run_syncdb=True, verbosity=0)
    # Nobody may be connected to what a database is made from.
    connection.close()


@contextmanager
def database() -> Iterator[str]:
    """A fresh database; its alias, which is its name too."""
    from django.db import connections

    from benchmarks.shop.settings import TEMPLATE

    if not _free:
        raise RuntimeError("more variants in one case than aliases in shop/settings.py")
    alias = _free.pop(0)
    _administer(f"CREATE DATABASE {alias} TEMPLATE {TEMPLATE}")
    try:
        yield alias
    finally:
        connections[alias].close()
        _administer(f"DROP DATABASE {alias} WITH (FORCE)")
        _free.append(alias)


def _administer(sql: str) -> None:
    import psycopg

    with psycopg.connect(dsn("postgres"), autocommit=True) as connection:
        connection.execute(sql.encode())


def dsn(name: str) -> str:
    from benchmarks.shop.settings import HOST

    return f"host={HOST} port={os.environ['BENCHMARK_PORT']} user=postgres dbname={name}"


def environ(alias: str) -> dict[str, str]:
    """What makes ``alias`` the default database of another process."""
    return {"BENCHMARK_DATABASE": alias}
