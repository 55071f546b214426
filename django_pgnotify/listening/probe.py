"""``pglisten --check``: prove that what is published is heard, or name the cause."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import psycopg

from ..conf import conf
from ..exceptions import CannotConnect, ListenError
from ..wire import wire_channel
from .connection import ListenConnection, first_line
from .parameters import connection_params

_IDENTITY = (
    b"SELECT current_database(), pg_postmaster_start_time(), inet_server_port(), current_user"
)


async def probe(using: str) -> str | None:
    """LISTEN on alias ``using``, NOTIFY on ``PGNOTIFY_DATABASE``, and wait for it.

    Returns:
        None if it arrives within ``PGNOTIFY_HEARTBEAT_TIMEOUT``, else the cause in one sentence.
    """
    arrived = asyncio.Event()
    try:
        listening = await _open(using, arrived.set)
    except ListenError as exc:
        return _cannot_reach(using, exc)
    try:
        try:
            publishing = await _open(conf.DATABASE, lambda: None)
        except ListenError as exc:
            return _cannot_reach(conf.DATABASE, exc)
        try:
            return await _prove(using, listening, publishing, arrived)
        except (ListenError, psycopg.Error) as exc:
            return f"database {using!r} refused: {first_line(exc)}"
        finally:
            publishing.close()
    finally:
        listening.close()


async def _prove(
    using: str, listening: ListenConnection, publishing: ListenConnection, arrived: asyncio.Event
) -> str | None:
    timeout = conf.HEARTBEAT_TIMEOUT
    channel = wire_channel(f"pgnotify.check.{secrets.token_hex(8)}", conf.CHANNEL_PREFIX)
    await listening.listen([channel], timeout=timeout)
    await publishing.execute(b"SELECT pg_notify($1, $2)", (channel, "check"), timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            while not any(heard.channel == channel for heard in listening.take()):
                if listening.lost is not None:
                    return f"the connection to database {using!r} broke: {listening.lost}"
                await arrived.wait()
                arrived.clear()
    except TimeoutError:
        return await _why_silent(using, listening, publishing, timeout)
    return None


async def _why_silent(
    using: str, listening: ListenConnection, publishing: ListenConnection, timeout: float
) -> str:
    if listening.pooled:
        return (
            f"a NOTIFY did not come back within {timeout:g} s: database {using!r} is reached "
            f"through a pooler in transaction mode (PgBouncer or alike), where LISTEN does not "
            f"work. Name an alias that goes to the server itself in PGNOTIFY_LISTEN_DATABASE."
        )
    ours = await listening.execute(_IDENTITY, timeout=timeout)
    theirs = await publishing.execute(_IDENTITY, timeout=timeout)
    if ours[0][:2] != theirs[0][:2]:
        return (
            f"a NOTIFY did not come back within {timeout:g} s: PGNOTIFY_DATABASE "
            f"{conf.DATABASE!r} and {using!r} are different databases, and NOTIFY stays in one."
        )
    return f"a NOTIFY did not come back within {timeout:g} s on database {using!r}."


async def _open(using: str, on_input: Callable[[], None]) -> ListenConnection:
    return await ListenConnection.open(
        connection_params(using),
        timeout=conf.CONNECT_TIMEOUT,
        on_input=on_input,
    )


def _cannot_reach(using: str, exc: ListenError) -> str:
    verb = "cannot connect to" if isinstance(exc, CannotConnect) else "cannot listen on"
    return f"{verb} database {using!r}: {exc}"
