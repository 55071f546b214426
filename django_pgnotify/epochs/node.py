"""The epoch table of this process's node: one for each listen database and channel prefix."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.db import connections

from ..conf import AUTO, conf
from .clock import node_clock
from .mapped import IS_SUPPORTED
from .table import EpochTable

_SHARED_MEMORY = "/dev/shm"

_tables: dict[tuple[str | None, int, str], EpochTable] = {}
_guard = threading.Lock()


def node_table() -> EpochTable:
    """The table that the settings name, of this process's node.

    Never raises for its file: where that cannot be used, ``problem`` says why, the heartbeat is
    missing and caches are bypassed; it is tried again every second.

    Raises:
        InvalidSetting: a setting has a value that cannot work.
    """
    path, slots, owner = _place()
    key = (path, slots, owner)
    table = _tables.get(key)
    if table is None:
        with _guard:
            table = _tables.get(key)
            if table is None:
                table = _tables[key] = _open(path, slots, owner)
    return table


def table_path() -> str | None:
    """The file that the settings name; None where each process has a table of its own."""
    return _place()[0]


def _place() -> tuple[str | None, int, str]:
    """Path, slots and owner of the table that the settings name."""
    path, slots = conf.EPOCH_TABLE, conf.EPOCH_SLOTS
    if path == AUTO and not IS_SUPPORTED:
        path = None
    owner = "" if path is None else _owner(everything=path == AUTO)
    # The user is asked for each time: a process may start as root, fork, and become another one.
    return default_path(owner, slots, os.geteuid()) if path == AUTO else path, slots, owner


@lru_cache(maxsize=16)
def default_path(owner: str, slots: int, user: int) -> str:
    """Where the table is that is named nowhere: in memory where there is such a folder."""
    text = f"{owner} {user} {slots}".encode()
    digest = hashlib.blake2b(text, digest_size=8).hexdigest()
    folder = Path(_SHARED_MEMORY)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        folder = Path(tempfile.gettempdir())
    return str(folder / f"pgnotify-epochs-{digest}")


def _owner(*, everything: bool) -> str:
    """What the table is about. In a file that was named, two ways to one database are one."""
    database: dict[str, Any] = connections.settings.get(conf.listen_database, {})
    parts = [database.get("NAME"), conf.CHANNEL_PREFIX]
    if everything:
        parts += [database.get("HOST"), database.get("PORT")]
        parts.append((database.get("OPTIONS") or {}).get("service"))
    return "\0".join(str(part or "") for part in parts)


def _open(path: str | None, slots: int, owner: str) -> EpochTable:
    if path is None:
        return EpochTable.in_process(slots)
    table = EpochTable.dead(path, slots, owner)
    table.verify(node_clock())
    return table


def _forked() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
