"""The frame of the benchmarks: order, figures, tables, targets and charts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import cli, report, results
from benchmarks.chart import chart
from benchmarks.figures import percentile, ratio, spread
from benchmarks.frame import CannotRun, Case, CaseResult, Measure, Metric, Scenario, Target, Variant
from benchmarks.recording import LostEvents, Recording, recorder
from benchmarks.results import Section
from benchmarks.running import interleaved, run_case

RATE = Metric("", "events/s", more_is_better=True)


def variant(name: str, *values: float, calls: list[str] | None = None) -> Variant:
    """Measures these values, one a round; fails once there are no more."""

    @contextmanager
    def opened() -> Iterator[Measure]:
        left = list(values)

        def measure() -> dict[str, float]:
            if calls is not None:
                calls.append(name)
            return {RATE.name: left.pop(0)}

        yield measure

    return Variant(name, opened)


def missing(name: str, reason: str) -> Variant:
    @contextmanager
    def opened() -> Iterator[Measure]:
        raise CannotRun(reason)
        yield

    return Variant(name, opened)


def case(*variants: Variant, rounds: int = 2, targets: tuple[Target, ...] = ()) -> Case:
    return Case("a case", (RATE,), variants, variants[0].name, rounds, warmups=0, targets=targets)


def result(measured: dict[str, list[float]], *targets: Target) -> CaseResult:
    variants = tuple(variant(name) for name in ("naive", "ours"))
    absent = {v.name: "no compiler" for v in variants if v.name not in measured}
    values = {name: {RATE.name: values} for name, values in measured.items()}
    return CaseResult(case(*variants, targets=targets), values, absent)


def scenario(name: str = "burst") -> Scenario:
    return Scenario(name, "A burst", "listening", "What it is.", lambda quick: [])


# -- the order ------------------------------------------------------------------------------------


def test_variants_are_measured_in_turn() -> None:
    assert list(interleaved("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_a_case_measures_its_variants_in_turn_and_leaves_the_warm_up_out() -> None:
    calls: list[str] = []
    both = (variant("A", 9, 1, 2, calls=calls), variant("B", 9, 3, 4, calls=calls))
    done = run_case(Case("", (RATE,), both, "A", 2, warmups=1), 2, lambda text: None)
    assert calls == ["A", "B"] * 3
    assert done.measured == {"A": {"": [1, 2]}, "B": {"": [3, 4]}}


def test_a_variant_that_cannot_run_is_reported_and_the_others_go_on() -> None:
    done = run_case(case(variant("A", 1, 2), missing("B", "no\n| compiler")), 2, lambda text: None)
    assert done.measured == {"A": {"": [1, 2]}}
    assert done.missing == {"B": "no / compiler"}


def test_a_variant_that_fails_in_a_later_round_leaves_no_figures() -> None:
    done = run_case(case(variant("A", 1, 2), variant("B", 3)), 2, lambda text: None)
    assert list(done.measured) == ["A"]
    assert done.missing["B"].startswith("IndexError in measure()")


# -- the figures ----------------------------------------------------------------------------------


def test_a_spread_is_the_median_and_the_range() -> None:
    assert spread([3, 1, 100]) == (3, 1, 100)


def test_a_ratio_is_taken_round_by_round() -> None:
    # The second round met a machine that was ten times slower, for both.
    assert ratio([2, 20, 2], [1, 10, 1]) == (2, 2, 2)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio([1, 2], [1])


def test_a_round_in_which_the_reference_took_no_time_cannot_meet_a_target() -> None:
    assert ratio([5, 5, 5], [-1, 0, 5]).median == float("inf")


def test_percentiles_are_values_that_were_measured() -> None:
    values = list(range(1, 101))
    assert [percentile(values, p) for p in (0, 50, 95, 100)] == [1, 50, 95, 100]
    assert percentile([7], 99) == 7


def test_targets_are_met_at_their_limit() -> None:
    assert Target("", "", "ours", "naive", at_least=1.5).met(1.5)
    assert not Target("", "", "ours", "naive", at_least=1.5).met(1.49)
    assert Target("", "", "ours", None, at_most=10).met(10)
    assert not Target("", "", "ours", None, at_most=10).met(10.1)


def test_a_target_has_one_limit() -> None:
    with pytest.raises(ValueError, match="one limit"):
        Target("", "", "ours", "naive")
    with pytest.raises(ValueError, match="one limit"):
        Target("", "", "ours", "naive", at_least=1, at_most=2)


def test_a_case_refuses_targets_and_names_that_lead_nowhere() -> None:
    with pytest.raises(ValueError, match="is about no variant"):
        case(variant("A"), targets=(Target("faster", "", "A", "C", at_least=1),))
    with pytest.raises(ValueError, match="is about no metric"):
        case(variant("A"), targets=(Target("faster", "p50", "A", None, at_least=1),))
    with pytest.raises(ValueError, match="is no variant"):
        Case("", (RATE,), (variant("A"),), "C", 1)
    with pytest.raises(ValueError, match="one name"):
        case(variant("A"), variant("A"))


# -- what is written ------------------------------------------------------------------------------


def test_a_table_has_each_variant_with_its_ratio_or_the_reason() -> None:
    assert report.case_table(result({"naive": [1000, 3000], "ours": [2000, 3000]})) == (
        "|  | events/s | × naive |\n"
        "| --- | ---: | ---: |\n"
        "| naive | 2,000 (1,000–3,000) | 1.00 |\n"
        "| ours | 2,500 (2,000–3,000) | 1.50 |"
    )
    assert "| ours | cannot run: no compiler |  |" in report.case_table(result({"naive": [1, 2]}))


@pytest.mark.parametrize(
    ("measured", "row"),
    [
        ({"naive": [1.0], "ours": [2.0]}, "| burst | faster | ≥ 1.5 | 2.00 | met |"),
        ({"naive": [1.0], "ours": [1.0]}, "| burst | faster | ≥ 1.5 | 1.00 | **not met** |"),
        ({"ours": [1.0]}, "| burst | faster | ≥ 1.5 |  | cannot run |"),
    ],
)
def test_the_summary_says_of_each_target_whether_it_is_met(
    measured: dict[str, list[float]], row: str
) -> None:
    target = Target("faster", "", "ours", "naive", at_least=1.5)
    section = Section(scenario(), [result(measured, target)], {})
    assert row in report.summary([section]).splitlines()


def test_a_target_without_a_reference_is_about_the_value_itself() -> None:
    target = Target("growth", "", "ours", None, at_most=10)
    [verdict] = report.verdicts(result({"ours": [11.0, 4.0, 5.0]}, target))
    assert verdict.value == (5.0, 4.0, 11.0)
    assert verdict.says == "met"


def test_figures_have_three_digits_that_count() -> None:
    figures = map(report.number, (123456.7, 99.96, 1.234, -3.0))
    assert list(figures) == ["123,457", "100.0", "1.23", "-3.00"]


def test_a_chart_is_well_formed_shows_every_variant_and_is_the_same_each_time() -> None:
    drawn_of = [(scenario("burst & more"), [result({"naive": [1.0, 2.0]})])]
    drawn = chart("Listening", drawn_of)
    texts = [text.text for text in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"burst & more: a case", "naive", "ours", "cannot run"} <= set(texts)
    assert chart("Listening", drawn_of) == drawn


# -- from run to run ------------------------------------------------------------------------------


def facts(date: str, run: str = "full") -> dict[str, str]:
    return {"run": run, "date": date, "CPU": f"that of {date}"}


def with_cases(name: str, *results_of: CaseResult, title: str = "") -> Scenario:
    cases = [each.case for each in results_of]
    return Scenario(name, title or name.title(), "listening", "What it is.", lambda quick: cases)


def stored(folder: Path, *sections: Section) -> None:
    cli.write(folder, sections[-1].facts, sections)


def test_a_run_of_some_scenarios_keeps_the_figures_of_the_others(tmp_path: Path) -> None:
    first, second = result({"naive": [1.0, 3.0], "ours": [2.0, 2.0]}), result({"naive": [7.0]})
    burst, idle = with_cases("burst", first), with_cases("idle", second)
    old, new = facts("2025-01-31"), facts("2026-02-01")
    stored(tmp_path, Section(burst, [first], old), Section(idle, [second], old))

    again = result({"naive": [9.0]})
    now = [Section(with_cases("idle", again), [again], new)]
    sections = results.merged(tmp_path, now, [burst, idle])
    assert [(s.scenario.name, s.facts["date"]) for s in sections] == [
        ("burst", "2025-01-31"),
        ("idle", "2026-02-01"),
    ]
    assert sections[0].results[0].measured == first.measured
    cli.write(tmp_path, new, sections)
    page = (tmp_path / "results.md").read_text()
    assert "|  | run 1 | run 2 |" in page
    assert "| CPU | that of 2025-01-31 | that of 2026-02-01 |" in page
    assert "## Burst\n\nWhat it is.\n\nMeasured on 2025-01-31 in run 1." in page
    assert "## Idle\n\nWhat it is.\n\nMeasured on 2026-02-01 in run 2." in page
    assert "| naive | 9.00 (9.00–9.00) | 1.00 |" in page
    assert "| ours | 2.00 (2.00–2.00) | 1.33 |" in page
    # Written and read once more, nothing has changed.
    third = results.merged(tmp_path, [], [burst, idle])
    assert [(s.facts, s.results[0].measured) for s in third] == [
        (s.facts, s.results[0].measured) for s in sections
    ]


def test_a_page_of_one_run_has_one_column_of_facts(tmp_path: Path) -> None:
    only = result({"naive": [1.0]})
    stored(tmp_path, Section(with_cases("burst", only), [only], facts("2025-01-31")))
    page = (tmp_path / "results.md").read_text()
    assert "|  | measured on |\n| --- | ---: |\n| run | full |" in page
    assert "Measured on 2025-01-31." in page
    assert json.loads((tmp_path / "results.json").read_text())["earlier"] == {}


def test_what_was_measured_before_a_variant_a_metric_or_a_case_came_is_still_shown(
    tmp_path: Path,
) -> None:
    old = result({"naive": [1.0]})
    stored(tmp_path, Section(with_cases("burst", old), [old], facts("2025-01-31")))
    more = case(variant("naive"), variant("ours"), variant("newer"))
    other = Case("another case", (RATE,), more.variants, "naive", 1)
    by_time = Case("a case", (Metric("", "events/s"), Metric("p50", "µs")), more.variants, None, 1)
    for cases, shown in (
        ([more, other], {"a case": {"naive": {"": [1.0]}}}),
        ([by_time], {"a case": {}}),
        ([other], {}),
    ):
        now = Scenario("burst", "", "listening", "", lambda quick, cases=cases: cases)  # type: ignore[misc]
        section = results.earlier(tmp_path, now)
        assert section is not None
        assert {each.case.name: each.measured for each in section.results} == shown
    section = results.earlier(
        tmp_path, Scenario("burst", "", "listening", "", lambda quick: [more])
    )
    assert section is not None
    assert section.results[0].missing == {
        "ours": "no compiler",
        "newer": "was not there when this was measured",
    }
    assert results.earlier(tmp_path, with_cases("idle", old)) is None


def test_the_results_that_are_published_are_read() -> None:
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    names = json.loads((folder / results.NAME).read_text())["scenarios"]
    for name in names:
        section = results.earlier(folder, with_cases(name))
        assert section is not None
        assert section.facts["run"] == "full"


# -- the recording --------------------------------------------------------------------------------


def test_calls_are_read_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(tmp_path / "times")
    for name, value in recording.environ.items():
        monkeypatch.setenv(name, value)
    record = recorder()
    for _ in range(3):
        record(None)
    first = recording.take(2)
    assert first == sorted(first)
    [third] = recording.take(1)
    assert third > first[-1]
    with pytest.raises(LostEvents, match="0 of 1 calls"):
        recording.take(1, timeout=0)


def test_the_ring_of_calls_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.recording.SLOTS", 4)
    recording = Recording(tmp_path / "times")
    monkeypatch.setenv("BENCHMARK_RECORDING", str(recording.path))
    record = recorder()
    taken: list[int] = []
    for _ in range(5):
        for _ in range(3):
            record(None)
        taken += recording.take(3)
    assert taken == sorted(taken)
    assert len(set(taken)) == 15
    with pytest.raises(ValueError, match="4 slots"):
        recording.take(5)
