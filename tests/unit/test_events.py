"""The vocabulary: topics, deliveries, actions, events and their ids."""

from __future__ import annotations

import copy
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
from hypothesis import example, given
from hypothesis import strategies as st

from django_pgnotify import Event, Topic
from django_pgnotify.decoding import event_from
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
from django_pgnotify.exceptions import FrameError, InvalidAction, InvalidDelivery, InvalidTopic

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


# -- events from the wire ----------------------------------------------------------------------

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def decoded(raw: dict[str, Any], **about: Any) -> Event:
    """The event that a listener makes of a frame's JSON object."""
    defaults: dict[str, Any] = {"topic": "jobs", "source": "web1:7", "received_at": MOMENT}
    return event_from(raw, **defaults | about)


def pair() -> tuple[Event, Event]:
    """An event from the wire of which nobody has read anything yet, and its like by hand."""
    raw = {
        "id": "e-1",
        "action": "updated",
        "at": MOMENT.timestamp(),
        "model": "testapp.order",
        "pk": 7,
        "changed": ["status"],
        "data": "paid",
    }
    by_hand = event(
        action="updated",
        model="testapp.order",
        pk=7,
        data="paid",
        key="testapp.order:7",
        published_at=MOMENT,
        changed=("status",),
        using="default",
    )
    return decoded(raw, using="default"), by_hand


LOOKS: dict[str, Callable[[Event], object]] = {
    "itself": lambda one: one,
    "repr": repr,
    "hash": hash,
    "asdict": dataclasses.asdict,
    "astuple": dataclasses.astuple,
    "replace": lambda one: dataclasses.replace(one, data=1),
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "key": lambda one: one.key,
    "published_at": lambda one: one.published_at,
    "match": lambda one: [getattr(one, name) for name in Event.__match_args__],
    "type": type,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_an_event_from_the_wire_is_as_one_made_by_hand_whatever_is_done_with_it_first(
    look: Callable[[Event], object],
) -> None:
    from_wire, by_hand = pair()
    assert look(from_wire) == look(by_hand)
    assert look(by_hand) == look(from_wire)


@pytest.mark.parametrize("again", [pickle.dumps, copy.copy, dataclasses.replace, repr, hash])
def test_an_event_from_the_wire_is_the_same_after_it_was_looked_at(
    again: Callable[[Event], object],
) -> None:
    from_wire, by_hand = pair()
    again(from_wire)
    again(from_wire)
    assert from_wire == by_hand
    assert hash(from_wire) == hash(by_hand)
    assert {from_wire: 1}[by_hand] == 1


def test_a_pickle_of_an_untouched_event_from_the_wire_is_read_as_one_made_by_hand() -> None:
    from_wire, by_hand = pair()
    assert pickle.dumps(from_wire) == pickle.dumps(by_hand)


def test_an_event_from_the_wire_is_an_event_and_nothing_else() -> None:
    from_wire, _ = pair()
    assert type(from_wire) is Event
    assert dataclasses.is_dataclass(from_wire)
    match from_wire:
        case Event(key=key, published_at=published_at):
            assert (key, published_at) == ("testapp.order:7", MOMENT)
        case _:
            pytest.fail("no Event")


@pytest.mark.parametrize("looked_at_before", [True, False])
def test_an_event_from_the_wire_is_frozen(looked_at_before: bool) -> None:
    from_wire, by_hand = pair()
    if looked_at_before:
        repr(from_wire)
    for name in EVENT_FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(from_wire, name, "other")
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(from_wire, name)
    for name in ("sent_at", "extra"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(from_wire, name, 1.0)
    assert from_wire == by_hand


def test_what_is_filled_in_at_its_first_use_is_made_once() -> None:
    from_wire, _ = pair()
    assert from_wire.published_at is from_wire.published_at
    assert from_wire.key is from_wire.key


@pytest.mark.parametrize("name", ["nothing", "_key", "sent", "__wrapped__"])
def test_an_event_has_no_attribute_that_it_was_not_given(name: str) -> None:
    for one in pair():
        assert not hasattr(one, name)
        with pytest.raises(AttributeError, match=name) as caught:
            getattr(one, name)
        assert caught.value.name == name
        assert caught.value.obj is one


def test_an_event_that_is_only_being_made_has_no_time_and_no_end_of_recursion() -> None:
    """As pickle and copy make it, before they fill it."""
    bare = Event.__new__(Event)
    for name in ("published_at", "key", "id"):
        with pytest.raises(AttributeError):
            getattr(bare, name)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({}, None),
        ({"key": "k"}, "k"),
        ({"model": "a.b", "action": "updated", "pk": 1}, "a.b:1"),
        ({"model": "a.b", "action": "updated", "pk": 1, "key": "k"}, "k"),
        ({"model": "a.b", "action": "deleted", "pk": None}, "a.b:None"),
        ({"model": "a.b", "action": "updated", "pk": [1, "x"]}, "a.b:[1, 'x']"),
    ],
)
def test_an_event_s_key_is_its_own_or_its_row_s(raw: dict[str, Any], key: str | None) -> None:
    one = decoded(raw)
    assert one.key == key
    assert one == dataclasses.replace(one)
    assert dataclasses.asdict(one)["key"] == key


def test_an_event_without_a_time_was_published_when_it_was_received() -> None:
    assert decoded({}).published_at is MOMENT


FIRST, LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)


@given(st.floats(FIRST.timestamp(), LAST.timestamp()))
@example(FIRST.timestamp())
@example(LAST.timestamp())
@example(0.0)
@example(-0.1)
def test_a_time_that_was_accepted_can_be_read(at: float) -> None:
    one = decoded({"at": at})
    assert one.published_at.tzinfo is UTC
    assert abs(one.published_at.timestamp() - at) < 0.001
    assert "published_at" in repr(one)


@pytest.mark.parametrize(
    "at",
    [
        float("nan"),
        float("inf"),
        float("-inf"),
        FIRST.timestamp() - 1,
        LAST.timestamp() + 86400,
        1e300,
        -1e300,
        10**400,
        -(10**400),
    ],
)
def test_a_time_out_of_range_is_refused_when_it_is_decoded_not_when_it_is_read(at: Any) -> None:
    with pytest.raises(FrameError, match="out of range"):
        decoded({"at": at})


@pytest.mark.parametrize("at", [True, "0", [], {}])
def test_a_time_that_is_no_number_is_refused(at: Any) -> None:
    with pytest.raises(FrameError, match="number of seconds"):
        decoded({"at": at})


def test_threads_that_look_at_one_event_first_at_the_same_time_see_the_same() -> None:
    for _ in range(200):
        from_wire, by_hand = pair()
        together = threading.Barrier(4)
        seen: list[tuple[Any, Any]] = []

        def look(
            one: Event = from_wire,
            together: threading.Barrier = together,
            seen: list[Any] = seen,
        ) -> None:
            together.wait(10)
            seen.append((one.published_at, one.key))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [(by_hand.published_at, by_hand.key)] * 4


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
