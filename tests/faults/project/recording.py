"""Appends what happened in this process to its own file: one JSON array per line.

=================================================== ===========================================
``[at, "event", receiver, n, key, seq]``            a receiver was called with number ``n``
``[at, "gap", receiver, since, until, cause]``      a receiver was told of a gap
``[at, "led", true]``                               this listener became the leader, or ceased
``[at, "established"]``                             this listener is proven to hear everything
=================================================== ===========================================

Times are seconds since the epoch. Each line is one write(), whole even if we are killed next.
"""

from __future__ import annotations

import json
import logging
import os
import time

PATH = os.environ.get("PGNOTIFY_FAULTS_RECORD")
_file = os.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if PATH else None


def record(*fields: object) -> None:
    if _file is not None:
        os.write(_file, json.dumps([time.time(), *fields]).encode() + b"\n")


class LeadershipHandler(logging.Handler):
    """Records when this listener becomes the leader, or a standby."""

    def emit(self, entry: logging.LogRecord) -> None:
        if entry.msg == "This listener is %s":
            record("led", entry.args == ("the leader",))


class NoFailures(logging.Filter):
    """Leaves out the receiver that raises on purpose."""

    def filter(self, entry: logging.LogRecord) -> bool:
        return not entry.msg.startswith("Receiver %s failed")
