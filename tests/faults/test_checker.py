"""The judge of the fault runs must not be blind: each kind of wrong is put before it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.faults.checker import (
    Established,
    Gap,
    Handled,
    Led,
    Life,
    Line,
    Published,
    Status,
    Verdict,
    check,
    parse,
)

KEYS = ("amber", "birch")


def published(count: int, **statuses: Status) -> list[Published]:
    """Number ``n`` is published in the tenth of a second that begins ``n`` seconds after 0."""
    return [
        Published(n, KEYS[n % 2], n, float(n), n + 0.1, statuses.get(f"n{n}", "sent"))
        for n in range(1, count + 1)
    ]


def handled(*numbers: int, receiver: str = "node", late: float = 0.2) -> list[Line]:
    return [Handled(n + late, receiver, n, KEYS[n % 2], n) for n in numbers]


def life(*lines: Sequence[Line], name: str = "one", receiver_leads: bool = False) -> Life:
    begin: list[Line] = [Established(0.5)]
    if receiver_leads:
        begin.append(Led(0.5, True))
    return Life(name, begin + [line for some in lines for line in some])


def gap(since: float | None, until: float, receiver: str = "node") -> list[Line]:
    return [Gap(until, receiver, since, until, "a cause")]


def judge(numbers: list[Published], *lives: Life) -> Verdict:
    return check(numbers, lives, every_node=["node"], leaders=["leader"])


def judge_node(numbers: list[Published], *lives: Life) -> list[tuple[str, int]]:
    verdict = check(numbers, lives, every_node=["node"], leaders=[])
    return [(violation.rule, violation.n) for violation in verdict.violations]


def judge_leader(numbers: list[Published], *lives: Life) -> list[tuple[str, int]]:
    verdict = check(numbers, lives, every_node=[], leaders=["leader"])
    return [(violation.rule, violation.n) for violation in verdict.violations]


# -- every listener -------------------------------------------------------------------------------


def test_nothing_is_wrong_where_everything_was_handled() -> None:
    lines = [*handled(1, 2, 3), *handled(1, 2, 3, receiver="leader")]
    assert judge(published(3), life(lines, receiver_leads=True)).violations == []


def test_a_loss_is_found() -> None:
    assert judge_node(published(4), life(handled(1, 2, 4))) == [("lost", 3)]


def test_a_loss_in_one_of_two_listeners_is_found() -> None:
    deaf = life(handled(1, 3), name="deaf")
    assert judge_node(published(3), life(handled(1, 2, 3)), deaf) == [("lost", 2)]


def test_a_loss_at_the_end_of_a_running_listener_is_found() -> None:
    assert judge_node(published(3), life(handled(1, 2))) == [("lost", 3)]


def test_a_missing_number_inside_a_gap_is_accounted_for() -> None:
    verdict = judge(published(4), life(handled(1), gap(1.5, 3.5), handled(4)))
    assert [v.n for v in verdict.violations if v.receiver == "node"] == []
    assert verdict.counts["node"] == {"handled": 2, "in a gap": 2}


def test_a_gap_without_a_beginning_reaches_back_to_the_start() -> None:
    assert judge_node(published(3), life(gap(None, 2.5), handled(3))) == []


@pytest.mark.parametrize(
    ("since", "until", "rules"),
    [
        (2.05, 3.05, []),  # each end falls into the tenth of a second of a publication
        (2.11, 3.05, [("lost", 2)]),
        (2.05, 2.99, [("lost", 3)]),
    ],
)
def test_a_gap_covers_what_may_have_been_published_in_it_and_no_more(
    since: float, until: float, rules: list[tuple[str, int]]
) -> None:
    assert judge_node(published(4), life(handled(1), gap(since, until), handled(4))) == rules


def test_a_gap_told_to_another_receiver_or_listener_excuses_nothing() -> None:
    other = life(handled(1), gap(1.5, 2.5), handled(3), name="other")
    wrong = life(handled(1), gap(1.5, 2.5, "leader"), handled(3))
    assert judge_node(published(3), other, wrong) == [("lost", 2)]


def test_a_gap_that_is_told_after_newer_numbers_is_late() -> None:
    assert judge_node(published(3), life(handled(1, 3), gap(1.5, 2.5))) == [("told late", 2)]


def test_a_number_whose_notify_failed_may_come_or_not() -> None:
    numbers = published(4, n2="unsent", n3="unsent")
    assert judge_node(numbers, life(handled(1, 2, 4))) == []


def test_numbers_of_before_the_first_proof_are_not_expected() -> None:
    late = life(handled(3))
    late.lines[0] = Established(2.5)
    assert judge_node(published(3), late) == []


def test_a_listener_that_was_never_established_is_expected_to_hear_nothing() -> None:
    assert judge_node(published(3), Life("one", [])) == []


@pytest.mark.parametrize("ending", ["killed", "terminated"])
def test_what_was_on_its_way_to_a_process_that_ended_is_no_loss(ending: str) -> None:
    ended = life(handled(1, 2))
    ended.ending, ended.ended_at = ending, 4.5  # type: ignore[assignment]
    assert judge_node(published(6), ended) == []


def test_a_process_that_was_up_to_date_when_it_ended_has_lost_what_it_had_not_handled() -> None:
    ended = life(handled(1, 2))
    ended.ending, ended.ended_at, ended.up_to_date = "killed", 5.5, 4
    assert judge_node(published(6), ended) == [("lost", 3), ("lost", 4)]


def test_a_number_that_is_handled_twice_by_one_process_is_found() -> None:
    assert judge_node(published(3), life(handled(1, 2, 2, 3))) == [("twice", 2)]


def test_a_reordering_within_a_key_is_found() -> None:
    assert judge_node(published(4), life(handled(1, 4, 2, 3))) == [("out of order", 2)]


def test_with_concurrency_different_keys_may_overtake_each_other() -> None:
    assert judge_node(published(3), life(handled(2, 1, 3))) == []


def test_a_number_that_was_never_committed_is_a_ghost() -> None:
    numbers = published(2, n1="rolled back", n2="uncommitted")
    assert judge_node(numbers, life(handled(1, 2))) == [("ghost", 1), ("ghost", 2)]


def test_a_number_that_comes_with_another_key_is_found() -> None:
    changed: list[Line] = [Handled(1.2, "node", 1, "amber", 1)]
    assert judge_node(published(1), life(changed)) == [("altered", 1)]


# -- the leader -----------------------------------------------------------------------------------


def leading(*lines: Sequence[Line], name: str = "one") -> Life:
    return life(*lines, name=name, receiver_leads=True)


def led(*numbers: int, late: float = 0.2) -> list[Line]:
    return handled(*numbers, receiver="leader", late=late)


def test_a_number_is_handled_by_any_leader_or_told_by_any() -> None:
    first = leading(led(1, 2))
    second = life([Led(4.5, True)], gap(2.5, 4.5, "leader"), led(5), name="two")
    assert judge_leader(published(5), first, second) == []


def test_a_loss_between_two_leaders_is_found() -> None:
    first = leading(led(1, 2))
    second = life([Led(4.5, True)], gap(3.5, 4.5, "leader"), led(5), name="two")
    assert judge_leader(published(5), first, second) == [("lost", 3)]


def test_the_leaders_receivers_get_all_numbers_in_order() -> None:
    assert judge_leader(published(3), leading(led(2, 1, 3))) == [("out of order", 1)]


def test_a_number_handled_by_two_leaders_is_found() -> None:
    first = leading(led(1, 2, 3, 4))
    second = life([Led(9.5, True)], led(3, late=7), led(10), name="two")
    unsent: Status = "unsent"
    numbers = published(10, **{f"n{n}": unsent for n in range(5, 10)})
    assert judge_leader(numbers, first, second) == [("two leaders", 3)]


def test_a_number_handled_by_two_leaders_is_found_at_a_take_over_too() -> None:
    first = leading(led(1, 2, 3))
    second = life([Led(3.3, True)], led(3, 4, late=0.5), name="two")
    assert judge_leader(published(4), first, second) == [("two leaders", 3)]


def test_what_a_killed_leader_had_received_is_counted_apart() -> None:
    first = leading(led(1, 2))
    first.ending, first.ended_at = "killed", 3.5
    second = life([Led(4.5, True)], gap(3.6, 4.5, "leader"), led(5), name="two")
    verdict = check(
        published(5),
        [first, second],
        every_node=[],
        leaders=["leader"],
    )
    assert verdict.counts["leader"]["received by a leader that was killed before handling it"] == 1
    # Number 4 was published after the kill: only the successor could tell of it, and did.
    assert verdict.violations == []


def test_a_standby_that_is_killed_excuses_no_loss() -> None:
    standby = life(name="standby")
    standby.ending, standby.ended_at = "killed", 3.5
    assert judge_leader(published(3), leading(led(1, 2)), standby) == [("lost", 3)]


def test_a_replaced_leader_that_is_late_is_counted() -> None:
    first = leading(led(1, 2), led(3, late=7))
    second = life([Led(3.5, True)], led(4, 5), name="two")
    verdict = check(
        published(5),
        [first, second],
        every_node=[],
        leaders=["leader"],
    )
    counts = verdict.counts["leader"]
    assert counts["handled late by a leader that had been replaced"] == 1


# -- the records ----------------------------------------------------------------------------------


def test_the_lines_of_a_record_are_read() -> None:
    assert parse([1.5, "event", "node", 7, "amber", 3]) == Handled(1.5, "node", 7, "amber", 3)
    assert parse([1.5, "gap", "node", 1.0, 1.4, "why"]) == Gap(1.5, "node", 1.0, 1.4, "why")
    assert parse([1.5, "led", True]) == Led(1.5, True)
    assert parse([1.5, "established"]) == Established(1.5)
    with pytest.raises(ValueError, match="not a line"):
        parse([1.5, "unheard of"])


def test_a_violation_says_what_to_look_for() -> None:
    numbers = published(2)
    verdict = check(
        numbers,
        [life(handled(1))],
        every_node=["node"],
        leaders=[],
    )
    assert str(verdict.violations[0]).startswith(
        "lost: number 2, receiver 'node' in one: key 'amber'"
    )
