"""Group and key templates: what they may name, and names that Channels accepts in any case."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from channels.layers import BaseChannelLayer
from hypothesis import example, given
from hypothesis import strategies as st

from django_pgnotify.events import EVENT_FIELDS, Event
from django_pgnotify.exceptions import InvalidTemplate
from django_pgnotify.forwarding import check_group, group_name
from django_pgnotify.templates import (
    check_template,
    fields_of,
    fill,
    literal_head,
    literal_parts,
)

channels = BaseChannelLayer()
SERIAL = uuid.UUID("6f1c0f0e-8a55-4b39-9c1d-3f4f4f0d2a11")


def event(**fields: Any) -> Event:
    fields = {
        "id": "a-1",
        "topic": "shop.order",
        "action": "updated",
        "model": "shop.order",
        "pk": 7,
        "data": {},
        "key": None,
        "source": "node:1",
        "published_at": datetime(2030, 1, 2, tzinfo=UTC),
        **fields,
    }
    return Event(**fields)


# -- group names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "values", "name"),
    [
        ("order.{pk}", {"pk": 7}, "order.7"),
        ("order.{pk}", {"pk": "A-1_b.c"}, "order.A-1_b.c"),
        ("doc.{pk}", {"pk": SERIAL}, f"doc.{SERIAL}"),
        ("{topic}.{action}", {"topic": "shop.order", "action": "updated"}, "shop.order.updated"),
        ("room.{data[room]}", {"data": {"room": "lobby"}}, "room.lobby"),
        ("seat.{data[row][seat]}", {"data": {"row": {"seat": 3}}}, "seat.3"),
        ("seat.{data[seats][1]}", {"data": {"seats": [4, 5]}}, "seat.5"),
        ("page.{pk:05}", {"pk": 42}, "page.00042"),
        ("orders", {}, "orders"),
    ],
)
def test_a_safe_value_stands_in_the_name_as_it_is(
    template: str, values: dict[str, Any], name: str
) -> None:
    assert group_name(template, **values) == name


@given(st.text())
@example("")
@example("O'Brien")
@example("a b")
@example("Zürich")
@example("\x00")
@example("\n")
@example("७")  # a digit, but no ASCII one
@example("x" * 500)
def test_channels_accepts_the_name_whatever_the_value(value: str) -> None:
    name = group_name("order.{pk}", pk=value)
    assert channels.require_valid_group_name(name)
    assert name.startswith("order.")
    assert name == group_name("order.{pk}", pk=value), "and it is the same every time"


@given(st.lists(st.text(max_size=150), min_size=2, max_size=2, unique=True))
@example(["O'Brien", "O`Brien"])
@example(["x" * 200 + "1", "x" * 200 + "2"])
@example(["", " "])
def test_different_values_have_different_names(values: list[str]) -> None:
    first, second = (group_name("order.{pk}", pk=value) for value in values)
    assert first != second


@pytest.mark.parametrize(
    ("forwarded", "joined"),
    [
        (SERIAL, str(SERIAL)),
        (7, "7"),
        (Decimal("1.50"), "1.50"),
        (datetime(2030, 1, 2, 3, 4, tzinfo=UTC), "2030-01-02 03:04:00+00:00"),
        ("O'Brien", "O'Brien"),
    ],
)
def test_a_consumer_that_knows_the_value_as_text_joins_the_same_group(
    forwarded: object, joined: str
) -> None:
    assert group_name("thing.{pk}", pk=forwarded) == group_name("thing.{pk}", pk=joined)


def test_a_composite_key_stands_in_the_name_part_by_part() -> None:
    assert group_name("member.{pk}", pk=(3, "ann")) == "member.3.ann"
    assert group_name("team.{pk[0]}", pk=(3, "ann")) == "team.3"


def test_different_composite_keys_have_different_names() -> None:
    """Or the messages of one row would reach those who joined for another."""
    names = {
        group_name("member.{pk}", pk=pk) for pk in [("a.b", "c"), ("a", "b.c"), ("a", "b", "c")]
    }
    assert len(names) == 3


def test_a_long_name_keeps_its_beginning_and_stays_unique() -> None:
    names = {group_name("order.{pk}", pk="x" * length) for length in range(90, 130)}
    assert len(names) == 40
    assert all(len(name) <= 99 and name.startswith("order.xxx") for name in names)


def test_a_value_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="pk"):
        group_name("order.{pk}")


# -- what a template may be --------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_group, lambda group: check_template(group, "group=")])
@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("order.{id_}", "'id_'"),
        ("order.{}", "no field"),
        ("order.{0}", "'0'"),
        ("order.{pk.real}", "pk.real"),
        ("order.{pk.__class__}", "__class__"),
        ("order.{data[a].b}", r"data\[a\]\.b"),
        ("order.{pk:{data}}", "no field"),
        ("order.{pk", "malformed"),
        ("order.}", "malformed"),
        ("order.{pk!z}", "malformed"),
        ("", "non-empty"),
        (None, "non-empty"),
        (b"orders", "non-empty"),
        (7, "non-empty"),
    ],
)
def test_a_template_that_could_never_be_filled_is_refused(
    check: Callable[[object], object], group: object, words: str
) -> None:
    with pytest.raises(InvalidTemplate, match=words) as caught:
        check(group)
    if "field" in words:
        for field in EVENT_FIELDS:
            assert field in str(caught.value), "the message lists what there is"


@pytest.mark.parametrize(
    "group", ["order:{pk}", "order {pk}", "Zürich", "a/{pk}", "{{{pk}}}", "ords\n"]
)
def test_a_group_template_with_characters_channels_refuses_is_refused(group: str) -> None:
    with pytest.raises(InvalidTemplate, match="ASCII"):
        check_group(group)


def test_a_group_template_whose_literal_text_is_too_long_is_refused() -> None:
    check_group("x" * 99)
    with pytest.raises(InvalidTemplate, match="99"):
        check_group("x" * 100)


@pytest.mark.parametrize("field", EVENT_FIELDS)
def test_every_field_of_an_event_can_be_named(field: str) -> None:
    template = check_template(f"a.{{{field}}}", "group=")
    assert fill(template, fields_of(event())) == f"a.{getattr(event(), field)}"


# -- filling ----------------------------------------------------------------------------------


def test_braces_are_doubled_to_stand_for_themselves() -> None:
    assert fill("{{{pk}}}", {"pk": 1}) == "{1}"


def test_conversions_and_formats_apply_before_the_text_is_escaped() -> None:
    seen: list[str] = []

    def escape(text: str) -> str:
        seen.append(text)
        return "?"

    assert fill("{pk!r}.{pk:>3}", {"pk": "a"}, escape=escape) == "?.?"
    assert seen == ["'a'", "  a"]


@pytest.mark.parametrize(
    ("template", "parts", "head"),
    [
        ("order:{pk}:x", ["order:", ":x"], "order:"),
        ("orders", ["orders"], "orders"),
        ("{pk}:x", [":x"], ""),
        ("{pk}", [], ""),
    ],
)
def test_the_literal_parts_of_a_template(template: str, parts: list[str], head: str) -> None:
    assert literal_parts(template) == parts
    assert literal_head(template) == head


def test_the_literal_head_of_a_template_covers_every_key_it_can_make() -> None:
    for template in ("{{a}}:{pk}", "a{{:{pk}", "a:{pk}{{"):
        assert fill(template, {"pk": 1}).startswith(literal_head(template))
        assert literal_head(template), template
