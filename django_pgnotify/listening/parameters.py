"""What our own connections are opened with."""

from __future__ import annotations

from typing import Any

from django.db import connections

_KEEPALIVE_SECONDS = 10


def connection_params(using: str) -> dict[str, Any]:
    """What Django would connect ``using`` with, less what is for its own connections only."""
    # A copy: Django pops entries of OPTIONS in some versions, and may be connecting meanwhile.
    params = connections[using].copy().get_connection_params()
    for name in ("cursor_factory", "context", "prepare_threshold"):
        params.pop(name, None)
    return params


def with_keepalives(params: dict[str, Any], timeout: float) -> dict[str, Any]:
    """TCP's own probes, where the project has not chosen: a second line behind the heartbeat."""
    return {
        "application_name": "pglisten",
        "connect_timeout": max(2, round(timeout)),
        "keepalives": 1,
        "keepalives_idle": _KEEPALIVE_SECONDS,
        "keepalives_interval": _KEEPALIVE_SECONDS,
        "keepalives_count": 3,
        "tcp_user_timeout": 3 * _KEEPALIVE_SECONDS * 1000,
        **params,
    }
