"""How ``pgnotify_status`` shows the caches of the nodes that have answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from django_pgnotify.listening.status import status_payload
from django_pgnotify.management.caches import HEADINGS, cache_lines, caches_of_nodes
from django_pgnotify.wire import PAYLOAD_LIMIT, byte_length

COUNTS = {
    "near": {
        "hits": 90, "misses": 4, "stale": 3, "bypassed": 2, "second_level_hits": 1, "fills": 5,
        "refused": 6, "entries": 12, "processes": 4,
        "tags": {"model:shop.order": {"hits": 80, "stale": 3}},
    },
    "files": {"hits": 7, "misses": 1},
}  # fmt: skip


def status(node: str, age: float | None = 0.25, **changes: Any) -> dict[str, Any]:
    about = {"path": "/run/epochs", "age": age, "problem": None}
    return {"node": node, "topics": [], "epoch_table": about, "caches": COUNTS, **changes}


def lines_of(*listeners: dict[str, Any], **limits: float) -> list[str]:
    return list(cache_lines(caches_of_nodes(list(listeners)), {"": 30.0, **limits}))


def cells(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell.strip()]


def test_each_cache_and_tag_of_each_node_has_a_line() -> None:
    lines = lines_of(status("web2"), status("web1"))
    assert tuple(cell.strip() for cell in cells(lines[0])) == HEADINGS
    rows = [line.split() for line in lines]
    assert rows[1] == ["files", "web1", "-", "-", "7", "1", "-", "-", "-", "-", "-"]
    assert rows[2] == ["near", "web1", "4", "12", "90", "4", "3", "2", "1", "5", "6"]
    assert [row[1] for row in rows[1:5]] == ["web1", "web1", "web2", "web2"]
    assert rows[5][:3] == ["TAG", "CACHE", "NODE"]
    assert rows[6] == ["model:shop.order", "near", "web1", "80", "-", "3", "-", "-", "-", "-"]
    assert lines[8:] == [
        "epoch table of web1: /run/epochs, up to date 0.2 s ago",
        "epoch table of web2: /run/epochs, up to date 0.2 s ago",
    ]


def test_two_listeners_of_a_node_are_one_and_the_freshest_counts() -> None:
    stale = status("web1", 7.0, caches={})
    for both in ([stale, status("web1")], [status("web1"), stale]):
        [one] = caches_of_nodes(both)
        assert (one["node"], one["age"], one["caches"]) == ("web1", 0.25, COUNTS)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        (
            {"path": None, "age": None, "problem": None},
            "in each process, bypassed: no heartbeat yet",
        ),
        ({"path": "/x", "age": None, "problem": "no access"}, "/x, not usable: no access"),
        (
            {"path": "/x", "age": 41.04, "problem": None},
            "/x, bypassed: heartbeat is 41.0 s old, MAX_STALENESS is 30 s",
        ),
    ],
)
def test_a_table_that_is_of_no_use_says_why(about: dict[str, Any], says: str) -> None:
    [line] = lines_of(status("web1", caches={}, epoch_table=about))
    assert says in line


def test_a_heartbeat_is_too_old_for_the_caches_whose_limit_it_exceeds() -> None:
    [line] = lines_of(status("web1", 7, caches={}), quick=5, slow=300)
    assert line.endswith("bypassed: heartbeat is 7.0 s old, MAX_STALENESS of 'quick' is 5 s")
    never: dict[str, float] = {}
    [line] = cache_lines(caches_of_nodes([status("web1", 7000, caches={})]), never)
    assert line.endswith("up to date 7000.0 s ago")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"epoch_table": None},
        {"epoch_table": "/run/epochs"},
        {"epoch_table": {"path": 1, "age": 0, "problem": None}},
        {"epoch_table": {"path": "/x", "age": "0", "problem": None}},
        {"epoch_table": {"path": "/x", "age": 0, "problem": 7}},
        {"caches": [1]},
        {"caches": {"near": 1}},
        {"caches": {"near": {"tags": 1}}},
        {"caches": {"near": {"tags": {"a": 1}}}},
    ],
    ids=str,
)
def test_an_answer_that_is_not_one_of_ours_is_passed_over(answer: dict[str, Any]) -> None:
    odd = {"node": "web1", **(answer if not answer or "epoch_table" in answer else {})}
    if "caches" in answer:
        odd = status("web1", **answer)
    assert lines_of(odd) == []


def test_a_status_that_is_too_long_keeps_its_caches_and_gives_up_tags_first() -> None:
    caches: dict[str, Any] = {
        f"cache{number}": {
            "hits": 1,
            "tags": {f"tag:{n}:{'x' * 60}": {"hits": n} for n in range(10)},
        }
        for number in range(12)
    }
    topics = [f"topic-{number}" for number in range(100)]
    long = status("web1", topics=topics, caches=caches)
    text = status_payload(long)
    assert byte_length(text) <= PAYLOAD_LIMIT
    told = json.loads(text)
    assert told["topics"] == topics
    assert told["caches"].keys() == caches.keys()
    kept = told["caches"]["cache0"]["tags"]
    assert list(kept) == list(caches["cache0"]["tags"])[: len(kept)], "the first ones"
    huge = status(
        "web1", topics=topics * 20, caches={f"cache-{n}": {"hits": n} for n in range(999)}
    )
    assert byte_length(status_payload(huge)) <= PAYLOAD_LIMIT
