"""The counts of a node's processes: added up over those that live and those that have ended."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from django_pgnotify.epochs.counts import (
    MOST_TAGS,
    OTHER_TAGS,
    CountsFile,
    add,
    busiest,
    node_counts,
)

# Writes its counts, says so, and lives until its standard input ends, or a child of its own does.
PROCESS = """
import json, os, sys
from django_pgnotify.epochs.counts import CountsFile
file = CountsFile(sys.argv[1])
file.write(json.loads(sys.argv[2]))
print("written", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(tmp_path / "table")


def process(table: str, counts: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", PROCESS, table, counts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "written\n"
    return started


def end(started: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        started.kill()
    started.communicate(timeout=30)


def test_a_node_without_counts_has_none(table: str) -> None:
    assert node_counts(table) == {}
    assert not os.path.exists(f"{table}.counts"), "asking makes nothing"


def test_the_counts_of_all_processes_are_added_up(table: str) -> None:
    mine = CountsFile(table)
    mine.write({"": {"hits": 1, "entries": 5, "tags": {"a": {"hits": 1}}}})
    mine.write({"": {"hits": 3, "entries": 7, "tags": {"a": {"hits": 2}}}})
    other = process(
        table, '{"": {"hits": 4, "stale": 1, "entries": 1, "tags": {"b": {"hits": 4}}}}'
    )
    expected: dict[str, Any] = {
        "": {
            "hits": 7,
            "stale": 1,
            "entries": 8,
            "processes": 2,
            "tags": {"a": {"hits": 2}, "b": {"hits": 4}},
        }
    }
    assert node_counts(table) == expected
    assert node_counts(table) == expected, "asking changes nothing"
    end(other)
    mine.close()


@pytest.mark.parametrize("kill", [False, True], ids=["ended", "killed"])
def test_what_a_process_counted_outlives_it_and_its_entries_do_not(table: str, kill: bool) -> None:
    mine = CountsFile(table)
    mine.write({"": {"hits": 1, "entries": 5}})
    other = process(table, '{"": {"hits": 10, "entries": 50}}')
    end(other, kill=kill)
    for _ in range(2):
        assert node_counts(table) == {"": {"hits": 11, "entries": 5, "processes": 1}}
    assert len(os.listdir(f"{table}.counts")) == 2, "that of the dead is gone"
    mine.write({"": {"hits": 2, "entries": 5}})
    assert node_counts(table)[""]["hits"] == 12
    mine.close()
    assert node_counts(table) == {"": {"hits": 12}}


def test_a_process_whose_file_was_removed_writes_another(table: str) -> None:
    mine = CountsFile(table)
    mine.write({"": {"hits": 1}})
    for path in Path(f"{table}.counts").iterdir():
        path.unlink()
    mine.write({"": {"hits": 2}})
    assert node_counts(table)[""]["hits"] == 2
    mine.close()


def test_a_shorter_text_replaces_a_longer_one(table: str) -> None:
    mine = CountsFile(table)
    mine.write({"a": {"hits": 123456}, "b": {"hits": 1}})
    mine.write({"a": {"hits": 7}})
    assert node_counts(table) == {"a": {"hits": 7, "processes": 1}}
    mine.close()


def test_the_folder_of_somebody_else_is_not_used(table: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, f"{table}.counts")
    with pytest.raises(PermissionError, match="no folder of this user"):
        CountsFile(table).write({})
    assert node_counts(table) == {}
    assert list(elsewhere.iterdir()) == []


def test_a_process_that_is_stopped_while_it_adds_up_holds_nobody(table: str) -> None:
    mine = CountsFile(table)
    mine.write({"": {"hits": 1}})
    with open(f"{table}.counts/ended") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            node_counts(table)
        mine.write({"": {"hits": 2}})
    assert node_counts(table)[""]["hits"] == 2
    mine.close()


def test_a_file_that_is_no_counts_is_counted_as_nothing(table: str) -> None:
    mine = CountsFile(table)
    mine.write({"": {"hits": 1}})
    (Path(f"{table}.counts") / "1-broken.json").write_text("{")
    assert node_counts(table)[""]["hits"] == 1
    mine.close()


def test_tags_beyond_the_limit_are_counted_together() -> None:
    total: dict[str, Any] = {}
    add(total, {"": {"tags": {f"tag:{number}": {"hits": 1} for number in range(MOST_TAGS + 5)}}})
    add(total, {"": {"tags": {"tag:0": {"hits": 1}, "new": {"stale": 2}}}})
    tags = total[""]["tags"]
    assert len(tags) == MOST_TAGS + 1
    assert tags["tag:0"] == {"hits": 2}
    assert tags[OTHER_TAGS] == {"hits": 5, "stale": 2}


def test_the_busiest_tags_come_first() -> None:
    tags = {"a": {"hits": 1}, "b": {"hits": 2, "stale": 3}, "c": {"hits": 1}}
    assert list(busiest(tags, 2)) == ["b", "a"]
