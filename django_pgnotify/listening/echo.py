"""The echo: a NOTIFY to oneself, whose return proves that everything before it has been heard."""

from __future__ import annotations

import json

from ..conf import conf
from .connection import ListenConnection
from .parameters import connection_params

_NOTIFY = b"SELECT pg_notify($1, $2)"
_ECHO = (
    b"SELECT pg_notify($1, $2), (SELECT json_agg(channel) FROM pg_listening_channels() AS channel)"
)


async def echo(
    connection: ListenConnection, using: str, channel: str, nonce: str, timeout: float
) -> frozenset[str] | None:
    """Send ``nonce`` to ``channel``; returns what the server listens to for us, if that says much.

    Raises:
        ConnectionLost: no answer within ``timeout`` seconds, or the connection broke.
        CannotConnect: behind a pooler a second connection is needed, and cannot be had.
    """
    if not connection.pooled:
        [(_, channels)] = await connection.execute(_ECHO, (channel, nonce), timeout=timeout)
        return frozenset(json.loads(channels or b"[]"))
    # Behind a pooler our own session would answer from whichever backend it is lent for this one
    # statement. Only a NOTIFY from elsewhere proves that the LISTEN is still ours.
    other = await ListenConnection.open(
        connection_params(using), timeout=conf.CONNECT_TIMEOUT, on_input=lambda: None
    )
    try:
        await other.execute(_NOTIFY, (channel, nonce), timeout=timeout)
    finally:
        other.close()
    return None
