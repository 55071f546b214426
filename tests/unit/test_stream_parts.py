"""The text of server-sent events, and the ids that browsers bring back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify.durable.cursor import Cursor
from django_pgnotify.streams import frames
from django_pgnotify.streams.position import LONGEST, Position, Positions

XIDS = st.integers(3, 2**63)


@st.composite
def snapshots(draw: Any) -> str:
    xmin = draw(XIDS)
    xips = sorted(draw(st.sets(st.integers(xmin, xmin + 10_000), max_size=30)))
    xmax = xmin + 10_001 + draw(st.integers(0, 1000))
    return f"{xips[0] if xips else xmin}:{xmax}:{','.join(map(str, xips))}"


CURSORS = st.builds(Cursor, snapshots(), st.just("") | snapshots(), st.integers(0, 2**63))
POSITIONS = st.builds(
    Position,
    st.integers(0, 10**13).map(lambda number: number / 1000),
    st.text("0123456789abcdef", max_size=12),
    st.none() | CURSORS,
)


@given(POSITIONS)
def test_a_position_comes_back_as_it_was(position: Position) -> None:
    text = Positions(["a", "b"]).encode(position)
    assert text is not None
    assert text.isascii()
    assert text.isprintable()
    found = Positions(["b", "a"]).decode(text)
    assert found is not None
    assert found[1:] == position[1:]
    assert abs(found.at - position.at) < 0.002


@given(POSITIONS, st.data())
def test_a_position_that_was_altered_is_refused(position: Position, data: st.DataObject) -> None:
    text = Positions(["a"]).encode(position)
    assert text is not None
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(min_codepoint=33, max_codepoint=126))
    altered = text[:place] + letter + text[place + 1 :]
    assert altered == text or Positions(["a"]).decode(altered) is None


@pytest.mark.parametrize("text", ["", ":", "~", "a~b~c~d~e", "ü", "1" * (LONGEST + 1), "\x00"])
def test_what_is_no_position_is_none(text: str) -> None:
    assert Positions(["a"]).decode(text) is None


def test_a_position_of_other_topics_is_refused() -> None:
    text = Positions(["a", "b"]).encode(Position(0.0))
    assert text is not None
    assert Positions(["a"]).decode(text) is None


def test_a_thousand_running_transactions_still_fit_and_too_many_are_left_out() -> None:
    def snapshot(running: int) -> str:
        xips = range(5_000_000_000, 5_000_000_000 + running * 7, 7)
        return f"{xips[0]}:{xips[-1] + 1}:{','.join(map(str, xips))}"

    positions = Positions(["a"])
    assert positions.encode(Position(0.0, "e", Cursor(snapshot(1000)))) is not None
    assert positions.encode(Position(0.0, "e", Cursor(snapshot(100_000)))) is None


def test_a_block_has_its_fields_in_lines_and_ends_with_an_empty_one() -> None:
    block = frames.block("one\ntwo\r\nthree\u2028", event="gap", id="7", retry=2.5)
    assert block.decode() == (
        "retry: 2500\nid: 7\nevent: gap\ndata: one\ndata: two\ndata: three\u2028\n\n"
    )


def test_a_lone_surrogate_does_not_break_a_block() -> None:
    assert frames.block("\ud800").decode() == "data: ?\n\n"
