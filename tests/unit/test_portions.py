"""What a transaction published is sent in portions: all of it, in order, the first ones small."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify.publishing.buffer import FIRST_PORTION, LAST_PORTION, Noted, portions
from django_pgnotify.wire import Outgoing


def events(count: int) -> list[Noted]:
    return [Outgoing("jobs", None, str(number), 1) for number in range(count)]


def sizes(count: int) -> list[int]:
    return [len(part) for part in portions(events(count))]


@given(st.integers(0, 20_000))
def test_all_events_are_in_the_portions_in_their_order(count: int) -> None:
    everything = events(count)
    assert [event for part in portions(everything) for event in part] == everything


@given(st.integers(0, 20_000))
def test_no_portion_is_empty_or_smaller_than_the_one_before_it_but_the_last(count: int) -> None:
    found = sizes(count)
    assert all(found)
    assert found[:-1] == sorted(found[:-1])
    assert all(size <= LAST_PORTION for size in found)
    assert all(size <= FIRST_PORTION for size in found[:1])


@given(st.integers(0, 20_000))
def test_portions_are_few_so_that_statements_are(count: int) -> None:
    assert len(sizes(count)) <= 4 + count // LAST_PORTION


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [1]),
        (249, [249]),
        (250, [250]),
        (251, [250, 1]),
        (750, [250, 500]),
        (1000, [250, 500, 250]),
        (10_000, [250, 500, 1000, 2000, 2000, 2000, 2000, 250]),
    ],
)
def test_the_first_portions_are_small_and_the_others_large(count: int, expected: list[int]) -> None:
    assert sizes(count) == expected


def test_a_portion_is_made_only_once_the_one_before_it_was_sent() -> None:
    """A listener works on the first while the second is encoded."""
    everything = events(300)
    parts = portions(everything)
    assert len(next(parts)) == 250
    everything[250:] = everything[250:251]
    assert [len(part) for part in parts] == [1]
