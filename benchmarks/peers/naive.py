"""The naive listener: psycopg's ``notifies()``, json.loads, a call, and nothing else.

    python -m benchmarks.peers.naive DSN CHANNEL,CHANNEL,... CHANNEL

The receiver records what comes on the first channels, and ignores the last one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.recording import recorder


def ignore(event: object) -> None:
    pass


def main(dsn: str, recorded: str, ignored: str) -> None:
    record = recorder()
    receivers: dict[str, Callable[[Any], None]] = dict.fromkeys(recorded.split(","), record)
    receivers[ignored] = ignore
    with psycopg.connect(dsn, autocommit=True) as connection:
        for channel in receivers:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        print("ready", flush=True)
        for notify in connection.notifies():
            receivers[notify.channel](json.loads(notify.payload))


if __name__ == "__main__":
    main(*sys.argv[1:])
