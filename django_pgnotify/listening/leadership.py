"""The leader's lock: a session advisory lock on the listening connection itself.

To lose the connection is to lose the lock, so a leader that cannot hear does not lead for long. A
leader that goes in order says so in the stream of notifications; one whose network is cut cannot,
and its backend may not notice for hours, so a standby ends that backend's session in time.
"""

from __future__ import annotations

import logging
import secrets
import zlib

from psycopg import errors

from ..wire import wire_channel
from .connection import ListenConnection

logger = logging.getLogger("django_pgnotify.listening")

_LOCK_CLASS = 0x70676E74  # "pgnt": the advisory lock space of leaders
# The mark is committed while we hold the lock: what comes before it in the stream of notifications
# may have reached the last leader, which held the lock until then; what comes after it cannot have.
_TAKE = b"""
WITH attempt AS MATERIALIZED (SELECT pg_try_advisory_lock($1::int4, $2::int4) AS taken)
SELECT taken, CASE WHEN taken THEN pg_notify($3, $4) END FROM attempt
"""
# All, because a session that asks twice holds the lock twice.
_LET_GO = b"SELECT pg_advisory_unlock_all(), pg_notify($1, '')"
# CASE, because AND goes on past NULL, which the silence of another role's session is.
_END_SILENT_HOLDER = b"""
SELECT pid, silence, CASE WHEN silence > $3::float8 THEN pg_terminate_backend(pid) END
FROM (
    SELECT a.pid, extract(epoch FROM clock_timestamp() - a.state_change) AS silence
    FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
      AND l.classid::bigint = $1::bigint
      AND l.objid::bigint = ($2::bigint + 4294967296) % 4294967296
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS holder
"""


class LeaderLock:
    """The lock that listeners of one name compete for.

    Args:
        name: of the leadership: listeners of other names have leaders of their own.
        prefix: ``PGNOTIFY_CHANNEL_PREFIX``.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self.channel = wire_channel(f"pgnotify.leader.{name}", prefix)
        """Where a leader says that it lets go (with nothing in it), and the next that it leads."""
        self.mark: bytes | None = None
        """What this listener said there when the lock became its own."""
        number = zlib.crc32(f"{prefix}:{name}".encode())
        signed = number - (1 << 32) if number >= 1 << 31 else number
        self._key = (str(_LOCK_CLASS), str(signed))

    async def try_take(self, connection: ListenConnection, timeout: float) -> bool:
        """Take the lock if it is free; tells whether it is ours now.

        If so, ``mark`` has its place among the notifications from then on, and has arrived.
        """
        self.mark, mark = None, secrets.token_hex(8)
        params = (*self._key, self.channel, mark)
        [(taken, _)] = await connection.execute(_TAKE, params, timeout=timeout)
        if taken == b"t":
            self.mark = mark.encode()
        return self.mark is not None

    async def let_go(self, connection: ListenConnection, timeout: float) -> None:
        """Free the lock, and say so to those who wait for it."""
        await connection.execute(_LET_GO, (self.channel,), timeout=timeout)

    async def silence_of_holder(
        self, connection: ListenConnection, limit: float, timeout: float
    ) -> float | None:
        """Seconds since the holder's last sign of life; beyond ``limit`` its session is ended.

        None where there is no holder any more, or where its session is another role's, which this
        one may neither see nor end.
        """
        try:
            holders = await connection.execute(
                _END_SILENT_HOLDER, (*self._key, str(limit)), timeout=timeout
            )
        except errors.InsufficientPrivilege as exc:
            logger.info("The session of a silent leader is not ours to end: %s", exc)
            return None
        silence = None
        for pid, seconds, ended in holders:
            if seconds is None:
                continue
            silence = float(seconds)
            if ended == b"t":
                logger.warning(
                    "Ended the session of a leader that was silent for %.1f s (backend %s)",
                    silence,
                    (pid or b"?").decode(),
                )
        return silence
