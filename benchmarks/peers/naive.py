"""The naive listener: psycopg's ``notifies()``, json.loads, a call, and nothing else.

    python -m benchmarks.peers.naive DSN CHANNEL ...

The receiver records what comes on the first channels; the last one is ignored.
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


def main(dsn: str, *channels: str) -> None:
    record = recorder()
    receivers: dict[str, Callable[[Any], None]] = dict.fromkeys(channels[:-1], record)
    receivers[channels[-1]] = ignore
    with psycopg.connect(dsn, autocommit=True) as connection:
        for channel in channels:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        print("ready", flush=True)
        for notify in connection.notifies():
            receivers[notify.channel](json.loads(notify.payload))


if __name__ == "__main__":
    main(*sys.argv[1:])
