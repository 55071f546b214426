"""Group and key templates: refused when written, not when the first event comes."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify import Event
from django_pgnotify.events import EVENT_FIELDS
from django_pgnotify.exceptions import InvalidTemplate
from django_pgnotify.templates import check_template, fields_of, fill, literal_head, literal_parts

EVENT = Event(
    id="e-1",
    topic="shop.order",
    action="updated",
    model="shop.order",
    pk=7,
    data={"status": "paid", "a b": 1, "lines": [{"sku": "x"}]},
    key="shop.order:7",
    source="web1:1",
    published_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    changed=("status", "total"),
)


def filled(template: str, **values: Any) -> str:
    return fill(check_template(template, "keys="), fields_of(EVENT) | values)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("orders", "orders"),
        ("order:{pk}", "order:7"),
        ("{model}/{pk}/{action}", "shop.order/7/updated"),
        ("{pk:05d}", "00007"),
        ("{pk!r}", "7"),
        ("{published_at:%Y-%m-%d}", "2026-01-02"),
        ("s:{data[status]}", "s:paid"),
        ("{data[a b]}", "1"),
        ("{data[lines][0][sku]}", "x"),
        ("{changed[1]}", "total"),
        ("{{literal}}:{pk}", "{literal}:7"),
        ("{topic}{topic}", "shop.ordershop.order"),
    ],
)
def test_a_template_is_filled_from_the_fields_of_an_event(template: str, text: str) -> None:
    assert filled(template) == text


def test_a_composite_key_is_joined_by_full_stops() -> None:
    badge = uuid.UUID(int=1)
    assert filled("m:{pk}", pk=(1, "ann", badge)) == f"m:1.ann.{badge}"
    assert filled("m:{pk[1]}", pk=(1, "ann", badge)) == "m:ann"


@pytest.mark.parametrize("name", EVENT_FIELDS)
def test_every_field_of_an_event_may_be_named(name: str) -> None:
    assert check_template("{" + name + "}", "group=")


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ("order.{id_}", "id_"),
        ("order.{order}", "order"),
        ("order.{}", "''"),
        ("order.{0}", "0"),
        ("order.{PK}", "PK"),
        ("{pk.real}", "pk.real"),
        ("{pk.__class__}", "pk.__class__"),
        ("{published_at.year}", "published_at.year"),
        ("{pk:{action}}", "pk"),
        ("{pk}{nope}", "nope"),
        (" {pk }", "pk "),
    ],
)
def test_a_template_that_names_no_field_is_refused_with_the_choices(bad: str, names: str) -> None:
    with pytest.raises(InvalidTemplate) as caught:
        check_template(bad, "group=")
    message = str(caught.value)
    assert message.startswith("group=")
    assert repr(bad) in message
    assert names in message
    for field in EVENT_FIELDS:
        assert field in message


@pytest.mark.parametrize(
    "bad", ["{", "}", "{pk", "pk}", "{pk!}", "{data[a}", "{pk!z}", "{data[]}", "{data[a]b}"]
)
def test_a_malformed_template_is_refused_when_it_is_written(bad: str) -> None:
    with pytest.raises(InvalidTemplate) as caught:
        check_template(bad, "keys=")
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", ["", None, 7, b"order", ["order.{pk}"], {}])
def test_what_is_no_template_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidTemplate, match="non-empty format string"):
        check_template(bad, "group=")


@pytest.mark.parametrize(
    ("template", "head"),
    [
        ("orders", "orders"),
        ("order:{pk}", "order:"),
        ("{pk}:order", ""),
        ("order:{pk}:{action}", "order:"),
        ("{{x}}:{pk}", "{x}:"),
        ("{{all}}", "{all}"),
        ("a{{b", "a{b"),
    ],
)
def test_the_head_of_a_template_is_what_every_key_of_it_begins_with(
    template: str, head: str
) -> None:
    """On a gap, keys that begin so are deleted; a wrong head would leave stale ones."""
    assert filled(template).startswith(head)
    assert literal_head(template) == head


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@given(
    st.lists(
        st.sampled_from(["{pk}", "{action}", "{data[status]}"])
        | st.text("ab:{}.", max_size=5).map(escaped),
        min_size=1,
        max_size=5,
    ).map("".join)
)
def test_whatever_the_template_its_head_begins_what_it_makes(template: str) -> None:
    if not template:
        return
    assert filled(template).startswith(literal_head(template))


def test_the_literal_parts_are_what_every_event_has_in_common() -> None:
    assert "".join(literal_parts("a{pk}b{{c}}{action}")) == "ab{c}"
    assert literal_parts("{pk}") == []


def test_only_what_comes_from_the_event_is_escaped() -> None:
    text = fill("o:{data[status]}.{pk}", fields_of(EVENT), escape=lambda text: f"<{text}>")
    assert text == "o:<paid>.<7>"


def test_a_value_that_looks_like_a_template_is_text() -> None:
    assert filled("k:{key}", key="{pk}{nope}") == "k:{pk}{nope}"
