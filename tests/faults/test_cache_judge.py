"""The judge of the cache check must not be blind: each kind of wrong is put before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.caches import records, run, sabotage
from tests.faults.caches.judge import Applied, Verdict, chains, judge
from tests.faults.caches.records import (
    COMMITTED,
    IN_DOUBT,
    KILLED,
    LOADED,
    ROLLED_BACK,
    Probe,
    Read,
    ReadLog,
    Write,
    WriteLog,
)

SECOND = 10**9
HERE, THERE = 0, 1
ALLOWED = 2.0


def write(stamp: int, before: int, at: float, node: int = THERE, outcome: int = COMMITTED) -> Write:
    """Locked at ``at`` seconds, sent to COMMIT 0.1 s later, and acknowledged after 0.2 s."""
    return timed(stamp, before, (at, at + 0.1, at + 0.2), node, outcome)


def timed(
    stamp: int, before: int, times: tuple[float, float, float], node: int, outcome: int = COMMITTED
) -> Write:
    locked, leaving, done = (int(time * SECOND) for time in times)
    return Write(stamp, before, locked, leaving, done, 7, node, outcome)


def read(stamp: int, at: float, flags: int = 0) -> Read:
    return Read(int(at * SECOND), int((at + 0.05) * SECOND), stamp, 7, 0, flags)


def verdict(writes: list[Write], *reads: Read, probes: tuple[Probe, ...] = ()) -> Verdict:
    by_stamp = {each.stamp: each for each in writes}
    last = max((each.stamp for each in writes if each.outcome != ROLLED_BACK), default=0)
    rows = chains(by_stamp, {7: last}, [HERE, THERE])
    found = Verdict()
    judge(HERE, "here", reads, by_stamp, rows, Applied(probes), ALLOWED, found)
    return found


def rules(*args: object, **kwargs: object) -> list[str]:
    return [each.rule for each in verdict(*args, **kwargs).violations]  # type: ignore[arg-type]


TWO = [write(1, 0, 10.0), write(2, 1, 20.0)]
"""Acknowledged at 10.2 and at 20.2."""


def probe(published: float, seen: float) -> Probe:
    return Probe(int(published * SECOND), int(seen * SECOND))


def test_fresh_values_are_well_and_counted() -> None:
    found = verdict(TWO, read(0, 9.0), read(1, 10.3, LOADED), read(1, 15.0), read(2, 20.3))
    assert found.violations == []
    assert (found.reads[0], found.hits[0], found.stale[0]) == (4, 3, 0)
    assert found.stalest == 0.0


def test_a_stale_value_is_allowed_until_the_bound_and_not_a_moment_longer() -> None:
    found = verdict(TWO, read(1, 22.2))
    assert (found.violations, found.stale[0]) == ([], 1)
    assert found.stalest == pytest.approx(2.0)
    [late] = verdict(TWO, read(1, 22.201)).violations
    assert (late.rule, late.row, late.stamp) == ("too old", 7, 1)
    assert late.late == pytest.approx(2.001)


def test_a_value_may_be_stale_by_several_versions_and_the_first_of_them_counts() -> None:
    assert rules([*TWO, write(3, 2, 21.0)], read(1, 22.3)) == ["too old"]
    # A later version that was acknowledged sooner makes the value stale too.
    slow = timed(2, 1, (20.0, 20.1, 25.0), THERE)
    assert rules([TWO[0], slow, write(3, 2, 20.15)], read(1, 22.3)) == []
    assert rules([TWO[0], slow, write(3, 2, 20.15)], read(1, 22.36)) == ["too old"]


def test_what_a_later_probe_has_overtaken_must_be_seen_at_once() -> None:
    stale = read(1, 20.6)
    assert rules(TWO, stale, probes=(probe(20.3, 20.5),)) == ["overtaken"]
    assert rules(TWO, stale, probes=(probe(20.3, 20.7),)) == []  # not yet applied
    assert rules(TWO, stale, probes=(probe(20.1, 20.5),)) == []  # published before
    # Probes seen out of their order: the newest of those that were seen counts.
    assert rules(TWO, stale, probes=(probe(20.3, 20.4), probe(20.1, 20.5))) == ["overtaken"]


def test_the_own_nodes_writes_are_read_from_their_acknowledgement_on() -> None:
    mine = [write(1, 0, 10.0), write(2, 1, 20.0, HERE)]
    assert rules(mine, read(1, 20.2)) == []
    assert rules(mine, read(1, 20.21)) == ["own write"]
    assert rules(mine, read(1, 22.3)) == ["own write", "too old"]
    # An own write before one of another node: both make the value stale.
    after = [*mine, write(3, 2, 20.1)]
    assert rules(after, read(2, 20.35)) == []
    assert rules(after, read(1, 20.35)) == ["own write"]


def test_nothing_may_be_read_before_its_commit_was_sent() -> None:
    assert rules(TWO, read(2, 20.06)) == []  # it ended after that
    assert rules(TWO, read(2, 20.04)) == ["too early"]


@pytest.mark.parametrize("stamp", [3, 99])
def test_what_was_rolled_back_or_never_written_is_a_ghost(stamp: int) -> None:
    writes = [*TWO, write(3, 2, 30.0, outcome=ROLLED_BACK)]
    assert rules(writes, read(stamp, 31.0)) == ["ghost"]


@pytest.mark.parametrize("outcome", [IN_DOUBT, KILLED])
def test_a_write_in_doubt_counts_from_the_moment_somebody_wrote_on_top_of_it(outcome: int) -> None:
    doubtful = write(2, 1, 20.0, HERE, outcome)
    assert rules([TWO[0], doubtful], read(1, 99.0)) == []
    found = [TWO[0], doubtful, write(3, 2, 30.0)]
    assert rules(found, read(1, 30.0)) == []
    assert rules(found, read(2, 31.0)) == []
    # It was acknowledged to nobody, so neither its node nor a probe makes it seen at once.
    assert rules(found, read(1, 30.15), probes=(probe(30.11, 30.12),)) == []
    assert rules(found, read(1, 32.01)) == ["too old"]
    assert rules(found, read(1, 30.35), probes=(probe(30.3, 30.31),)) == ["overtaken"]


def test_what_contradicts_the_chain_is_no_verdict() -> None:
    lost = {each.stamp: each for each in TWO}
    with pytest.raises(ValueError, match=r"stamp=2.*is not there"):
        chains(lost, {7: 1}, [HERE])
    back = {1: write(1, 0, 10.0, outcome=ROLLED_BACK)}
    with pytest.raises(ValueError, match=r"stamp=1.*is there"):
        chains(back, {7: 1}, [HERE])


def test_records_are_read_back_and_the_last_note_of_a_write_counts(tmp_path: Path) -> None:
    log = WriteLog(tmp_path / "one.writes")
    log.add([write(1, 0, 10.0, outcome=KILLED), write(2, 1, 20.0, outcome=KILLED)])
    log.add([write(1, 0, 10.0)])
    stored = records.writes(tmp_path / "one.writes")
    assert {stamp: each.outcome for stamp, each in stored.items()} == {1: COMMITTED, 2: KILLED}
    seen = ReadLog(tmp_path / "one.reads")
    looks = [read(stamp, 1.0, LOADED) for stamp in range(1000)]
    for look in looks:
        seen.add(look)
    seen.flush()
    with (tmp_path / "one.reads").open("ab") as file:
        file.write(b"cut short")
    assert list(records.reads(tmp_path / "one.reads")) == looks


def test_the_command_line_names_every_safeguard_that_can_be_taken_away() -> None:
    assert set(run.SABOTAGES) == set(sabotage.SABOTAGES)
