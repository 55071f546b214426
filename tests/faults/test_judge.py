"""The judge of the model check must not be blind: each kind of wrong is put before it."""

from __future__ import annotations

from tests.faults.model.judge import Handled, Verdict, judge

SECOND = 10**9
LEDGER = {"a": 3, "b": 1}


def calls(*events: tuple[str, int] | tuple[str, int, str]) -> list[Handled]:
    """One call each second, by the life ``first`` unless it says otherwise."""
    return [
        Handled(number * SECOND, event[2] if len(event) == 3 else "first", event[0], event[1])
        for number, event in enumerate(events)
    ]


def verdict(
    handled: list[Handled],
    *,
    exact: bool = False,
    killed: dict[str, int] | None = None,
    crashes: tuple[int, ...] = (),
) -> Verdict:
    return judge(
        "c", LEDGER, handled, exact=exact, killed=killed or {}, server_crashes=list(crashes)
    )


ALL = (("a", 1), ("b", 1), ("a", 2), ("a", 3))


def test_everything_once_and_in_order_is_well() -> None:
    for exact in (True, False):
        good = verdict(calls(*ALL), exact=exact)
        assert (good.violations, good.handled, good.twice) == ([], 4, 0)


def test_what_is_missing_was_lost() -> None:
    assert verdict(calls(*ALL[:-1])).violations == ["c: ('a', 3) was lost"]


def test_what_was_rolled_back_must_not_appear() -> None:
    [violation] = verdict(calls(*ALL, ("b", 2))).violations
    assert violation == "c: ('b', 2) was never committed"


def test_the_order_of_a_key_counts_and_no_other() -> None:
    [violation] = verdict(calls(("a", 2), ("b", 1), ("a", 1), ("a", 3))).violations
    assert violation == "c: ('a', 1) after number 2"


def test_a_transactional_consumer_has_nothing_twice_crash_or_no_crash() -> None:
    again = calls(*ALL, ("a", 3, "second"))
    assert verdict(again, exact=True, killed={"first": 0}).violations == ["c: ('a', 3) twice"]


def test_another_has_an_event_twice_only_across_a_crash_of_the_process_or_the_server() -> None:
    again = calls(*ALL, ("a", 3, "second"))
    assert len(verdict(again).violations) == 1
    assert verdict(again, killed={"second": 0}).violations
    assert verdict(again, killed={"first": 0}).violations == []
    assert verdict(again, crashes=(4 * SECOND - 1,)).violations == []
    assert verdict(again, crashes=(0,)).violations
    assert verdict(calls(*ALL, ("a", 3)), killed={"first": 0}).violations
