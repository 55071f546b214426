"""Full jitter: bounded, growing, for ever, and reset by a healthy period."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from django_pgnotify.backoff import Backoff


def highest(low: float, high: float) -> float:
    return high


@given(
    base=st.floats(0.001, 10),
    cap=st.floats(0.001, 1000),
    attempts=st.integers(1, 200),
)
def test_no_delay_is_negative_or_above_the_cap(base: float, cap: float, attempts: int) -> None:
    backoff = Backoff(base, cap)
    for number in range(attempts):
        assert 0 <= backoff.next() <= min(cap, base * 2.0**number)


def test_the_ceiling_doubles_until_the_cap() -> None:
    backoff = Backoff(0.1, 1.0, uniform=highest)
    assert [round(backoff.next(), 3) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_jitter_covers_the_whole_range_down_to_zero() -> None:
    asked: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    backoff = Backoff(1.0, 8.0, uniform=lowest)
    for _ in range(5):
        assert backoff.next() == 0.0
    assert asked == [(0.0, 1.0), (0.0, 2.0), (0.0, 4.0), (0.0, 8.0), (0.0, 8.0)]


def test_attempts_go_on_for_ever_without_overflow() -> None:
    backoff = Backoff(0.1, 30.0, uniform=highest)
    assert {backoff.next() for _ in range(5000)} >= {30.0}
    assert backoff.attempts == 5000


def test_a_reset_begins_a_new_series() -> None:
    backoff = Backoff(0.1, 30.0, uniform=highest)
    for _ in range(8):
        backoff.next()
    backoff.reset()
    assert backoff.attempts == 0
    assert backoff.next() == 0.1


def test_two_listeners_do_not_come_back_in_step() -> None:
    one, other = Backoff(1.0, 30.0), Backoff(1.0, 30.0)
    assert [one.next() for _ in range(10)] != [other.next() for _ in range(10)]
