"""The text of server-sent events, as the WHATWG's HTML standard defines it (section 9.2).

A block is some ``field: value`` lines and an empty one. One without ``data`` calls nobody in the
browser; an ``id`` in it is kept all the same, and comes back as ``Last-Event-ID``.
"""

from __future__ import annotations

import re

COMMENT = b": \n\n"
"""Keeps proxies, and the browser's own watch over the connection, from giving up on it."""

_LINE_ENDS = re.compile(r"\r\n|\r|\n")  # and no others, unlike str.splitlines()


def block(
    data: str | None = None,
    *,
    event: str | None = None,
    id: str | None = None,
    retry: float | None = None,
) -> bytes:
    """One block; ``data`` may have several lines, the rest none.

    Args:
        event: type of the event; None for the browser's default, ``message``.
        id: what the browser says when it comes back; None leaves the one it has.
        retry: seconds for which it waits before it comes back.
    """
    lines = []
    if retry is not None:
        lines.append(f"retry: {round(retry * 1000)}")
    if id is not None:
        lines.append(f"id: {id}")
    if event is not None:
        lines.append(f"event: {event}")
    if data is not None:
        lines += [f"data: {line}" for line in _LINE_ENDS.split(data)]
    return ("\n".join(lines) + "\n\n").encode(errors="replace")
