"""The roll call: every listener of a database says how it is, each for itself, over NOTIFY.

Nothing is stored, so nothing can be stale: who does not answer is not there, or is deaf.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..conf import conf
from ..exceptions import ConnectionLost
from ..wire import wire_channel
from .connection import ListenConnection, Notification, first_line
from .parameters import connection_params
from .status import REPLY_PREFIX, STATUS_CHANNEL

_STATUS = {"node": str, "pid": int, "role": str, "topics": list, "established": bool}
_QUEUE = b"SELECT pg_notification_queue_usage()"
_SUSPECTS = b"""
SELECT pid, coalesce(datname, ''), coalesce(application_name, ''), coalesce(usename, ''), state,
       extract(epoch FROM clock_timestamp() - coalesce(xact_start, state_change)),
       coalesce(wait_event, '')
FROM pg_stat_activity
WHERE pid <> pg_backend_pid()
  AND backend_type = 'client backend'
  AND (xact_start < clock_timestamp() - interval '5 s' OR wait_event = 'ClientWrite')
ORDER BY 6 DESC
LIMIT 10
"""


class Suspect(NamedTuple):
    """A session that holds up the queue if it listens: it is in a transaction, or does not read.

    The queue is the whole cluster's, so the session may be one of another database.
    """

    pid: int
    database: str
    application: str
    user: str
    state: str
    seconds: float
    wait: str


class RollCall(NamedTuple):
    """What the call brought: a status per listener, the share of the queue in use, suspects."""

    listeners: list[dict[str, Any]]
    queue_usage: float
    suspects: list[Suspect]


async def call_the_roll(using: str, seconds: float) -> RollCall:
    """Ask every listener on the database of alias ``using``; answers count for ``seconds``.

    Raises:
        ListenError: the database cannot be reached or listened on.
    """
    arrived = asyncio.Event()
    connection = await ListenConnection.open(
        connection_params(using), timeout=conf.CONNECT_TIMEOUT, on_input=arrived.set
    )
    timeout = conf.HEARTBEAT_TIMEOUT
    reply = wire_channel(f"{REPLY_PREFIX}{secrets.token_hex(8)}", conf.CHANNEL_PREFIX)
    status = wire_channel(STATUS_CHANNEL, conf.CHANNEL_PREFIX)
    try:
        await connection.listen([reply], timeout=timeout)
        await connection.execute(b"SELECT pg_notify($1, $2)", (status, reply), timeout=timeout)
        [(usage,)] = await connection.execute(_QUEUE, timeout=timeout)
        rows = await connection.execute(_SUSPECTS, timeout=timeout)
        answers: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(seconds):
                while connection.lost is None:
                    answers += _answers(connection.take())
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            answers += _answers(connection.take())
        if connection.lost is not None:
            raise ConnectionLost(first_line(connection.lost)) from connection.lost
    finally:
        connection.close()
    return RollCall(
        sorted(answers, key=lambda answer: (answer["node"], answer["pid"])),
        float(usage or 0),
        [_suspect(row) for row in rows],
    )


def _answers(notifications: Sequence[Notification]) -> list[dict[str, Any]]:
    """Those that are the status of a listener; anybody may send anything."""
    found = []
    for heard in notifications:
        with suppress(ValueError, RecursionError):
            status = json.loads(heard.payload)
            if isinstance(status, dict) and _STATUS.items() <= _types(status).items():
                found.append(status)
    return found


def _types(status: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in status.items()}


def _suspect(row: tuple[bytes | None, ...]) -> Suspect:
    pid, database, application, user, state, seconds, wait = (value or b"" for value in row)
    return Suspect(
        int(pid),
        database.decode(errors="replace"),
        application.decode(errors="replace"),
        user.decode(errors="replace"),
        state.decode(),
        float(seconds or 0),
        wait.decode(),
    )
