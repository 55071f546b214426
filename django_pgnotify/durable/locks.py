"""The advisory locks of durable consumers, which say who runs one and who could."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from django.db import connections

TABLE = "SELECT 'pgnotify_consumer'::regclass::oid"
GRANTED = """
    SELECT (classid::bigint << 32) | objid::bigint AS key, pid FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_HELD = f"SELECT ({TABLE})::bigint, ARRAY(SELECT key FROM ({GRANTED}) AS granted)"  # noqa: S608


class Keys:
    """The two advisory locks of a consumer; the table's oid keeps schemas apart."""

    def __init__(self, table: int, name: str) -> None:
        self.holder = _number(f"holder:{table}:{name}")
        self.candidate = _number(f"candidate:{table}:{name}")


def _number(text: str) -> int:
    digest = hashlib.blake2b(f"pgnotify:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def held(names: Iterable[str], using: str) -> set[str]:
    """Those of the consumers that a process holds now, whatever is stored of it.

    Raises:
        django.db.Error: PostgreSQL refused or could not be reached.
    """
    with connections[using].cursor() as cursor:
        cursor.execute(_HELD)
        table, granted = cursor.fetchone()
    keys = set(granted)
    return {name for name in names if Keys(table, name).holder in keys}
