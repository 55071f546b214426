"""The server, and a database of its own for each variant.

A NOTIFY wakes every listener of its database, so variants that are measured in turn must not
share one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psycopg

from example_project.embedded import EmbeddedPostgres

SETTINGS = "benchmarks.shop.settings"

Disk = Literal["none", "real", "slow"]
"""``none``: fsync is off, and the CPU is what limits. ``real``: the WAL is flushed at each commit,
as in production. ``slow``: that takes SLOW_FLUSH µs more, as on a disk that is not next door."""

SLOW_FLUSH = 2000

_free: list[str] = []


@contextmanager
def served() -> Iterator[EmbeddedPostgres]:
    """Start the server, and set Django up on it in this process."""
    with tempfile.TemporaryDirectory(prefix="pgnotify-bench-") as folder:
        # PostgreSQL does not run as root, and has to reach its data.
        Path(folder).chmod(0o755)
        data_dir = Path(folder) / "data"
        os.environ["BENCHMARK_FOLDER"] = folder
        with EmbeddedPostgres(data_dir, version=18, options={"max_connections": 600}) as server:
            set_up(server.port)
            from benchmarks.shop.settings import ALIASES, TEMPLATE

            _use_disk("none")
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
def database(disk: Disk = "none") -> Iterator[str]:
    """A fresh database; its alias, which is its name too. All that are open have the same disk."""
    from django.db import connections

    from benchmarks.shop.settings import TEMPLATE

    if not _free:
        raise RuntimeError("more variants in one case than aliases in shop/settings.py")
    alias = _free.pop(0)
    _use_disk("none")
    _administer(f"CREATE DATABASE {alias} TEMPLATE {TEMPLATE}")
    if disk == "slow":
        _administer(f"ALTER DATABASE {alias} SET commit_delay = {SLOW_FLUSH}")
        _administer(f"ALTER DATABASE {alias} SET commit_siblings = 0")
    _use_disk(disk)
    try:
        yield alias
    finally:
        connections[alias].close()
        _administer(f"DROP DATABASE {alias} WITH (FORCE)")
        _free.append(alias)


def _use_disk(disk: Disk) -> None:
    for setting in ("fsync", "full_page_writes"):
        _administer(f"ALTER SYSTEM SET {setting} = {'off' if disk == 'none' else 'on'}")
    _administer("SELECT pg_reload_conf()")


def _administer(sql: str) -> None:
    with psycopg.connect(dsn("postgres"), autocommit=True) as connection:
        connection.execute(sql.encode())


def dsn(name: str) -> str:
    from benchmarks.shop.settings import HOST

    return f"host={HOST} port={os.environ['BENCHMARK_PORT']} user=postgres dbname={name}"
