"""The caches of each node, out of what its listeners answer, for people and for programs.

Of this node they are read, too: when none of its listeners answers is when they are bypassed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..conf import conf
from ..epochs.node import node_table
from ..epochs.use import is_in_use
from ..listening.feed import status_of
from .durable import table

COLUMNS = (
    ("HITS", "hits"),
    ("MISSES", "misses"),
    ("STALE", "stale"),
    ("BYPASSED", "bypassed"),
    ("SECOND LEVEL", "second_level_hits"),
    ("FILLS", "fills"),
    ("REFUSED", "refused"),
)
HEADINGS = ("CACHE", "NODE", "PROCESSES", "ENTRIES", *(heading for heading, _ in COLUMNS))


def caches_of_nodes(listeners: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each epoch table: ``node``, ``path``, ``age``, ``problem`` and ``caches``.

    Several listeners of a node keep one table and tell the same; the freshest answer counts.
    """
    found: dict[tuple[str, str | None], dict[str, Any]] = {}
    for status in listeners:
        about: Any = status.get("epoch_table")
        caches = status.get("caches", {})
        if not (_is_about(about) and _are_counts(caches)):  # anybody may answer anything
            continue
        key = (status["node"], about["path"])
        if key not in found or _age(about) < _age(found[key]):
            found[key] = {"node": status["node"], **about, "caches": caches}
    return [found[key] for key in sorted(found, key=str)]


def caches_of_this_node() -> list[dict[str, Any]]:
    """As a listener of this node would answer; nothing where its processes share no table."""
    if not is_in_use() or (table := node_table()).path is None:
        return []
    return [{"node": conf.NODE, **status_of(table)}]


def cache_lines(nodes: list[dict[str, Any]], limits: Mapping[str, float]) -> Iterator[str]:
    """Tables of the caches and of their tags; nothing where no node keeps an epoch table.

    Args:
        nodes: what :func:`caches_of_nodes` returns.
        limits: what ``staleness_limits`` does.
    """
    rows = [
        (alias, one["node"], *_numbers(counts, ("processes", "entries")), *_counts(counts))
        for one in nodes
        for alias, counts in sorted(one["caches"].items())
    ]
    if rows:
        yield from table([HEADINGS, *rows])
    tags = [
        (tag, alias, one["node"], *_counts(counts))
        for one in nodes
        for alias, of_alias in sorted(one["caches"].items())
        for tag, counts in of_alias.get("tags", {}).items()
    ]
    if tags:
        yield from table([("TAG", "CACHE", "NODE", *(heading for heading, _ in COLUMNS)), *tags])
    for one in nodes:
        where = "in each process" if one["path"] is None else one["path"]
        if one["problem"]:
            state = f"not usable: {one['problem']}"
        else:
            state = _state(one["age"], limits)
        yield f"epoch table of {one['node']}: {where}, {state}"


def _state(age: float | None, limits: Mapping[str, float]) -> str:
    if age is None:
        return "bypassed: no heartbeat yet" if limits else "no heartbeat yet"
    over = [
        f"MAX_STALENESS{f' of {alias!r}' if alias else ''} is {limit:g} s"
        for alias, limit in limits.items()
        if age > limit
    ]
    if not over:
        return f"up to date {age:.1f} s ago"
    return f"bypassed: heartbeat is {age:.1f} s old, {', '.join(over)}"


def _is_about(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and isinstance(about.get("path", 0), (str, type(None)))
        and isinstance(about.get("age", ""), (int, float, type(None)))
        and isinstance(about.get("problem", 0), (str, type(None)))
    )


def _are_counts(caches: Any) -> bool:
    return isinstance(caches, dict) and all(
        isinstance(counts, dict)
        and isinstance(tags := counts.get("tags", {}), dict)
        and all(isinstance(of_tag, dict) for of_tag in tags.values())
        for counts in caches.values()
    )


def _age(about: dict[str, Any]) -> float:
    age = about.get("age")
    return float("inf") if age is None else float(age)


def _counts(counts: dict[str, Any]) -> list[str]:
    return _numbers(counts, [name for _, name in COLUMNS])


def _numbers(counts: dict[str, Any], names: Any) -> list[str]:
    """A number that this kind of cache does not have is shown as a dash."""
    return [str(counts[name]) if name in counts else "-" for name in names]
