"""The vocabulary: topics, deliveries, actions, events and their ids."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify import Event, Topic
from django_pgnotify.events import (
    ACTIONS,
    DELIVERIES,
    EVENT_FIELDS,
    MODEL_ACTIONS,
    check_actions,
    check_delivery,
    check_topic,
    new_event_id,
)
from django_pgnotify.exceptions import InvalidAction, InvalidDelivery, InvalidTopic

ROOT = Path(__file__).parents[2]


def event(**values: Any) -> Event:
    defaults: dict[str, Any] = {
        "id": "e-1",
        "topic": "jobs",
        "action": "published",
        "model": None,
        "pk": None,
        "data": None,
        "key": None,
        "source": "web1:7",
        "published_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return Event(**defaults | values)


# -- topics ----------------------------------------------------------------------------------


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\x00" not in text))
def test_any_non_blank_text_without_nul_or_surrogates_names_a_topic(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidTopic, match="UTF-8"):
            check_topic(name)
    else:
        assert check_topic(name) == name
        assert str(Topic(name)) == name


@pytest.mark.parametrize("make", [check_topic, Topic], ids=["publish", "Topic"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "non-empty"),
        ("   \t\n", "non-empty"),
        ("a\x00b", "NUL"),
        ("\ud800", "UTF-8"),
        (None, "NoneType"),
        (7, "int"),
        (b"jobs", "bytes"),
        (["jobs"], "list"),
        (object, "type"),
    ],
)
def test_a_bad_topic_is_refused_with_what_it_was(
    make: Callable[[Any], object], bad: Any, says: str
) -> None:
    with pytest.raises(InvalidTopic, match=says) as caught:
        make(bad)
    if says != "non-empty":
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_a_bad_topic_is_caught_as_type_and_as_value_error(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        check_topic(None)
    with pytest.raises(kind):
        check_topic("")


def test_a_topic_is_a_value() -> None:
    assert Topic("jobs", delivery="atomic") == Topic("jobs", delivery="atomic")
    assert len({Topic("jobs"), Topic("jobs"), Topic("jobs", delivery="atomic")}) == 2
    assert pickle.loads(pickle.dumps(Topic("jobs"))) == Topic("jobs")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Topic("jobs").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("bad", ["immediate", "", "AFTER_COMMIT", 1, [], {"a": 1}])
def test_an_unknown_tier_is_refused_and_the_valid_ones_are_listed(bad: Any) -> None:
    for make in (check_delivery, lambda value: Topic("jobs", delivery=value)):
        with pytest.raises(InvalidDelivery) as caught:
            make(bad)
        assert repr(bad) in str(caught.value)
        for tier in DELIVERIES:
            assert tier in str(caught.value)


def test_a_topic_without_a_tier_leaves_the_choice_to_the_setting() -> None:
    assert Topic("jobs").delivery is None
    assert [check_delivery(tier) for tier in DELIVERIES] == list(DELIVERIES)


# -- actions ---------------------------------------------------------------------------------


def test_no_actions_means_all_of_them() -> None:
    assert check_actions(None) is None


@given(st.lists(st.sampled_from(ACTIONS), min_size=1))
def test_valid_actions_become_a_set(actions: list[str]) -> None:
    assert check_actions(actions) == frozenset(actions)
    assert check_actions(iter(actions)) == frozenset(actions)


@pytest.mark.parametrize("bad", [["create"], ["created", "nope"], [1], [None], [["created"]]])
def test_an_unknown_action_is_named_and_the_valid_ones_are_listed(bad: list[Any]) -> None:
    with pytest.raises(InvalidAction) as caught:
        check_actions(bad)
    assert repr(bad[-1]) in str(caught.value)
    for action in ACTIONS:
        assert action in str(caught.value)


@pytest.mark.parametrize("bad", ["created", 5, True])
def test_actions_that_are_no_list_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidAction, match="list of actions"):
        check_actions(bad)


def test_an_empty_list_of_actions_is_refused_because_nothing_would_match() -> None:
    with pytest.raises(InvalidAction, match="empty"):
        check_actions([])


@pytest.mark.parametrize("action", ["published", "gap"])
def test_a_model_cannot_publish_what_is_not_a_change_of_a_row(action: str) -> None:
    with pytest.raises(InvalidAction, match=repr(action)):
        check_actions([action], MODEL_ACTIONS)


# -- events ----------------------------------------------------------------------------------


def test_an_event_is_frozen() -> None:
    for name in EVENT_FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event(), name, "other")
    with pytest.raises((AttributeError, TypeError)):
        event().extra = 1  # type: ignore[attr-defined]


def test_an_event_has_the_fields_of_the_contract() -> None:
    contract = ("id", "topic", "action", "model", "pk", "data", "key", "source", "published_at")
    assert EVENT_FIELDS[: len(contract)] == contract
    assert {"changed", "using"} == set(EVENT_FIELDS[len(contract) :])


def test_an_event_crosses_a_process_boundary() -> None:
    one = event(model="testapp.order", pk=(1, "a"), data={"a": [1, None]}, changed=("a",))
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(("model", "pk"), [(None, None), (None, 7), ("testapp.order", None)])
def test_an_event_of_no_row_has_no_instance(model: str | None, pk: Any) -> None:
    assert event(model=model, pk=pk).instance() is None


async def test_an_event_of_no_row_has_no_instance_for_async_code_either() -> None:
    assert await event().ainstance() is None


# -- ids -------------------------------------------------------------------------------------


def test_ids_are_unique_across_threads() -> None:
    found: list[list[str]] = []
    together = threading.Barrier(8)

    def take() -> None:
        together.wait()
        found.append([new_event_id() for _ in range(2000)])

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [one for some in found for one in some]
    assert len(set(ids)) == len(ids) == 16_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_does_not_repeat_the_ids_of_its_parent() -> None:
    program = """
import os, sys
from django_pgnotify.events import new_event_id
new_event_id()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, new_event_id().encode())
    os._exit(0)
os.wait()
print(os.read(read, 100).decode(), new_event_id())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.split()
    assert child.partition("-")[0] != parent.partition("-")[0]
