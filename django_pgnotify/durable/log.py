"""The writer's side of the event log: one INSERT, in the transaction that the event tells of."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import ProgrammingError

from ..conf import conf
from ..publishing.sender import current_transport, own_connection
from ..stats import publishing_stats
from ..wire import Outgoing

ROWS_PER_STATEMENT = 1000

_INSERT_ONE = "INSERT INTO pgnotify_event_log (topic, key, source, body) VALUES (%s, %s, %s, %s)"
_INSERT_MANY = """
    INSERT INTO pgnotify_event_log (topic, key, source, body)
    SELECT topic, key, %s, body
    FROM unnest(%s::text[], %s::text[], %s::text[]) AS event(topic, key, body)
"""


def storable(text: str | None) -> str | None:
    """``text`` as PostgreSQL can hold it: NUL and lone surrogates become U+FFFD.

    An event's JSON escapes them; its key and a traceback stand in columns of their own.
    """
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.encode(errors="surrogatepass").decode(errors="replace").replace("\0", "\ufffd")


def append(events: Sequence[Outgoing], using: str) -> None:
    """Write events to the log of alias ``using``, in the transaction that is open there.

    More than ``ROWS_PER_STATEMENT`` are several statements: open a transaction for them.

    Raises:
        django.db.Error: PostgreSQL refused or could not be reached.
    """
    if not getattr(current_transport(), "keeps_log", True):
        return  # a test's transport, which delivers without PostgreSQL
    try:
        _insert(events, using)
    except ProgrammingError as exc:
        if not is_missing_table(exc):
            raise
        problem = f"The event was not published: {missing_tables(using)}."
        raise ProgrammingError(problem) from exc.__cause__
    publishing_stats.add("logged", len(events))


def is_missing_table(exc: BaseException) -> bool:
    """Whether a statement failed because a table of ours is not there."""
    sqlstate = getattr(exc, "sqlstate", None) or getattr(exc.__cause__, "sqlstate", None)
    return sqlstate == "42P01" and "pgnotify_" in str(exc)


def reason(exc: BaseException, using: str) -> str:
    """What an error of the log's database says, in one line; what to do, where that is known."""
    if is_missing_table(exc):
        return missing_tables(using)
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__


def missing_tables(using: str) -> str:
    """What to say where the tables have not been made."""
    where = "" if using == "default" else f" --database={using}"
    return (
        f"the tables of durable topics are missing on database {using!r}; "
        f"run 'manage.py migrate{where}'"
    )


def _insert(events: Sequence[Outgoing], using: str) -> None:
    with own_connection(using).cursor() as cursor:
        if len(events) == 1:
            topic, key, body, _ = events[0]
            cursor.execute(_INSERT_ONE, (topic, storable(key), conf.source, body))
        else:
            for start in range(0, len(events), ROWS_PER_STATEMENT):
                topics, keys, bodies, _ = zip(
                    *events[start : start + ROWS_PER_STATEMENT], strict=True
                )
                columns = (list(topics), list(map(storable, keys)), list(bodies))
                cursor.execute(_INSERT_MANY, (conf.source, *columns))
