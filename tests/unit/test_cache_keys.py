"""Keys of cached functions: one for each call that may return something else, or an early error."""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import math
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify.caching.frozen import FLAT, PICKLED, PLAIN, freeze
from django_pgnotify.caching.keys import Arguments, key_maker
from django_pgnotify.exceptions import InvalidArgument, InvalidTemplate


class Colour(enum.Enum):
    RED = "red"


class Size(enum.Enum):
    RED = "red"


def report(year: int, kind: str = "all", *, full: bool = False) -> None: ...


def key_of(*args: Any, key: Any = None, **kwargs: Any) -> str:
    return key_maker(Arguments(report), key)(*args, **kwargs)


def test_the_same_call_written_in_another_way_has_the_same_key() -> None:
    assert key_of(1) == key_of(year=1) == key_of(1, "all") == key_of(1, kind="all", full=False)
    assert key_of(1, kind={"a": 1, "b": 2}) == key_of(1, kind={"b": 2, "a": 1})
    assert key_of(1, kind={"a", "b"}) == key_of(1, kind={"b", "a"})


def test_calls_with_other_values_have_other_keys() -> None:
    moment = datetime.datetime(2026, 1, 1)
    values: list[Any] = [
        1, 1.0, True, "1", b"1", None, "None", decimal.Decimal(1), uuid.UUID(int=1), moment,
        moment.replace(tzinfo=datetime.UTC), moment.date(), datetime.timedelta(1), (1,), [1],
        ((1,),), {1}, frozenset({1}), {"1": 1}, {1: 1}, ("1,1",), ("1", "1"), Colour.RED,
        Size.RED, (), [], {},
    ]  # fmt: skip
    assert len({key_of(value) for value in values}) == len(values)
    assert key_of(1, "2") != key_of(12, "")


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner)),
    max_leaves=6,
)


@given(plain, plain)
def test_two_values_have_the_same_key_only_if_they_are_the_same(one: Any, other: Any) -> None:
    same = repr(one) == repr(other)
    assert (key_of(one) == key_of(other)) is same


def test_a_key_is_short_enough_for_memcached_whatever_the_arguments() -> None:
    key = key_of("x" * 10_000)
    assert len(key) < 240
    assert key.isascii()
    assert " " not in key


@pytest.mark.parametrize("value", [object(), lambda: 1, [object()], {"a": object()}, type])
def test_a_value_that_no_text_stands_for_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="kind=") as raised:
        key_of(1, value)
    assert "key=" in str(raised.value)
    assert "kind= of type " in str(raised.value)


def test_a_template_is_filled_from_the_arguments_defaults_included() -> None:
    assert key_of(7, key="report:{year}:{kind}") == "report:7:all"
    assert key_of(year=7, key="report:{year:04d}") == "report:0007"
    assert key_of(uuid.UUID(int=1), key="{year.hex}") == uuid.UUID(int=1).hex


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("report:{month}", "'month'"),
        ("report:{year", "malformed"),
        ("report:{}", "''"),
        ("report", "none of its parameters"),
        ("", "non-empty"),
        (7, "non-empty"),
    ],
)
def test_a_template_that_cannot_tell_calls_apart_is_refused_at_once(key: Any, words: str) -> None:
    with pytest.raises(InvalidTemplate, match=words):
        key_maker(Arguments(report), key)


def test_a_function_makes_the_key_of_the_same_arguments_and_only_text_will_do() -> None:
    assert key_of(7, key=lambda year, **rest: f"r{year}") == "r7"
    with pytest.raises(InvalidArgument, match="returned None"):
        key_of(7, key=lambda year: None)


def test_a_method_needs_a_key_of_its_own() -> None:
    class Shop:
        def total(self) -> None: ...

    with pytest.raises(InvalidArgument, match="method"):
        key_maker(Arguments(Shop.total), None)
    assert key_maker(Arguments(Shop.total), "total:{self}")("x") == "total:x"


def test_a_call_that_the_function_would_refuse_is_refused() -> None:
    with pytest.raises(TypeError, match="year"):
        key_of()


def doubled(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def wrapper(*args: Any) -> Any:
        return 2 * func(*args)

    return wrapper


def bare(func: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(year: int) -> Any:
        return func(year)

    return wrapper


def total_of(name: str) -> Callable[..., str]:
    def total(year: int) -> str:
        return f"{name} {year}"

    return total


class Report:
    def __call__(self, year: int) -> int:
        return year

    def of(self, year: int) -> int:
        return year

    @classmethod
    def made(cls, year: int) -> int:
        return year

    @staticmethod
    def plain(year: int) -> int:
        return year


@pytest.mark.parametrize(
    ("func", "words"),
    [
        (lambda year: year, "a lambda"),
        (functools.partial(report, kind="new"), r"a partial\(\)"),
        (functools.update_wrapper(functools.partial(report, kind="new"), report), r"a partial\(\)"),
        (total_of("A"), "each name around it"),
        (doubled(total_of("A")), "each name around it"),
        (bare(report), "each func around it"),
        (Report(), "can be called"),
        (Report().of, "a method of <"),
        (Report.made, "a method of <class"),
    ],
)
def test_a_function_whose_name_may_be_anothers_needs_a_key_of_its_own(
    func: Callable[..., Any], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words) as raised:
        key_maker(Arguments(func), None)
    assert "Give key=" in str(raised.value)
    assert key_maker(Arguments(func), "total:{year}")(7) == "total:7"


def test_a_function_with_a_name_of_its_own_needs_no_key() -> None:
    def alone(year: int) -> int:
        return year

    makers = [
        key_maker(Arguments(func), None)
        for func in (report, doubled(report), functools.cache(alone), Report.plain, math.sqrt)
    ]
    keys = [maker(7) for maker in makers]
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys)) == 4


# -- values as they are kept -----------------------------------------------------------------------


class Text(str):  # noqa: SLOT000 - that is the point
    """With attributes of its own, so that somebody can change it."""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("text", PLAIN),
        (None, PLAIN),
        ((1, ("a", None)), PLAIN),
        (frozenset({1}), PLAIN),
        (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), PLAIN),
        ({"a": 1, "b": (1, 2)}, FLAT),
        ([1, 2], FLAT),
        ({1, 2}, FLAT),
        ({"a": [1]}, PICKLED),
        ([[1]], PICKLED),
        (([1],), PICKLED),
        (bytearray(b"a"), PICKLED),
        (Text("a"), PICKLED),
        ({Text("a"): 1}, PICKLED),
        (Colour.RED, PICKLED),
    ],
)
def test_what_a_caller_changes_the_next_one_does_not_get(value: Any, kind: int) -> None:
    frozen = freeze(value)
    assert frozen.kind == kind
    first, second = frozen.thaw(), frozen.thaw()
    assert first == second == value
    assert type(first) is type(value)
    if kind == FLAT:
        assert first is not second
        assert first is not value
        first.clear()
        assert frozen.thaw() == value
